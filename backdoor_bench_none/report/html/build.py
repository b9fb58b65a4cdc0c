"""One HTML file: its numbers are there without JavaScript, and with it can be turned around and looked into."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from backdoor_bench_none.errors import BenchError
from backdoor_bench_none.registry.plugins import own_version
from backdoor_bench_none.report.html import summary
from backdoor_bench_none.report.html.colours import STEPS, heat_css, step_of
from backdoor_bench_none.report.html.data import Payload, embed
from backdoor_bench_none.report.html.previews import Preview
from backdoor_bench_none.report.html.source import Pair, Source
from backdoor_bench_none.report.html.texts import LABEL, clean_line, show_number
from backdoor_bench_none.report.pivot import Box, Layout, pivot
from backdoor_bench_none.results.metrics import METRICS, Metric
from backdoor_bench_none.results.rows import Row

SCRIPTS = ("matrix.js", "filters.js", "scatter.js", "drawer.js")
#: the metrics of the matrix as it is first shown
SHOWN = ("ba", "asr")
#: rows of a group of failures that are named at once, and at all
FEW, NAMED = 8, 100


@dataclass(frozen=True)
class Tile:
    """One number of a cell with its colour."""

    title: str
    text: str
    css: str
    close: bool


@dataclass(frozen=True)
class Shown:
    """One cell of the matrix: tiles, or a status; `row` is the number of its row."""

    row: int
    tiles: Sequence[Tile]
    status: str


@dataclass(frozen=True)
class Matrix:
    """The matrix as it is before JavaScript runs."""

    title: str
    axes: Sequence[str]
    columns: Sequence[str]
    lines: Sequence[tuple[Sequence[str], Sequence[Shown | None]]]
    footnotes: Sequence[str]


def build_report(source: Source, previews: Mapping[Pair, Preview] | None = None) -> str:
    """The report of `source`; equal input makes equal text."""
    payload = Payload(source, previews or {})
    style = _resource("report.css") + heat_css()
    script = "\n".join(_resource(name) for name in SCRIPTS)
    environment = Environment(
        loader=PackageLoader("backdoor_bench_none.report.html"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("report.html.jinja").render(
        title=clean_line(source.title, LABEL),
        version=own_version(),
        style=Markup(style),  # noqa: S704 - our own files
        script=Markup(script),  # noqa: S704
        style_hash=_hash(style),
        script_hash=_hash(script),
        data=Markup(embed(payload.collect())),  # noqa: S704 - JSON without angle brackets
        matrix=_matrix(source, payload),
        facts=summary.describe_facts(source),
        best=list(summary.describe_best(source.rows)),
        cautions=list(summary.describe_cautions(source)),
        counts=summary.count_statuses(source.trials),
        total=len(source.trials),
        hardware=summary.describe_hardware(source.trials),
        failures=summary.group_failures(source),
        metrics=payload.metrics,
        few=FEW,
        named=NAMED,
        steps=range(0, STEPS + 1, 2),
        tested=payload.tested,
    )


def write_report(text: str, path: Path) -> None:
    """Write under a temporary name and rename; `BenchError` where that is not possible."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(text, encoding="utf-8", newline="\n")
        draft.replace(path)
    except OSError as error:
        with suppress(OSError):
            draft.unlink()
        raise BenchError(
            f"'{path}' cannot be written: {error.strerror or error}", "choose another file with --output"
        ) from error


def _resource(name: str) -> str:
    return files("backdoor_bench_none.report.html").joinpath(name).read_text("utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}"


def _matrix(source: Source, payload: Payload) -> Matrix:
    metrics = [METRICS[name] for name in SHOWN]
    made = pivot(source.rows, Layout(metrics=SHOWN))
    numbers = {id(row): number for number, row in enumerate(source.rows)}
    lines = [
        (
            [clean_line(label, LABEL) for label in labels],
            [_show(box, numbers, metrics, payload) for box in boxes],
        )
        for labels, boxes in made.lines
    ]
    notes = [clean_line(note, 600) for note in made.footnotes if not note.startswith(("[", "Each cell:"))]
    axes, columns = made.axes, [clean_line(column, LABEL) for column in made.columns]
    return Matrix(clean_line(made.title, 400), axes, columns, lines, notes)


def _show(box: Box | None, numbers: Mapping[int, int], metrics: Sequence[Metric], payload: Payload) -> Shown | None:
    if box is None or box.row is None:
        return None
    if box.row.ba is None:
        return Shown(numbers[id(box.row)], (), box.row.status)
    return Shown(numbers[id(box.row)], [_tile(box.row, metric, payload) for metric in metrics], "")


def _tile(row: Row, metric: Metric, payload: Payload) -> Tile:
    value, rank = getattr(row, metric.name), payload.ranks.get((id(row), metric.name), "")
    text = show_number(value, metric)
    css = "none" if value is None else f"v{step_of(float(text) / 100, metric.better == 'lower')}"
    return Tile(metric.title, text, f"{css} best" if rank == "best" else css, rank == "close")
