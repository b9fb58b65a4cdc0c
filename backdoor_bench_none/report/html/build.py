"""Renders the report as one HTML file: numbers show without JavaScript, which adds selectors, plots and details."""

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
from backdoor_bench_none.words import plural

SCRIPTS = ("matrix.js", "filters.js", "scatter.js", "drawer.js")
#: the metrics that the matrix shows at first
SHOWN = ("ba", "asr")
#: the most rows of a group of failures that are named at first, and after unfolding the list
FEW, NAMED = 8, 100


@dataclass(frozen=True)
class Tile:
    """One number of a cell and its colour class."""

    title: str
    text: str
    css: str
    close: bool


@dataclass(frozen=True)
class Shown:
    """One cell of the matrix: tiles, or a status; `row` is the index of its row."""

    row: int
    tiles: Sequence[Tile]
    status: str


@dataclass(frozen=True)
class Matrix:
    """The matrix that is shown before JavaScript runs."""

    title: str
    axes: Sequence[str]
    columns: Sequence[str]
    lines: Sequence[tuple[Sequence[str], Sequence[Shown | None]]]
    footnotes: Sequence[str]


def build_report(source: Source, previews: Mapping[Pair, Preview] | None = None) -> str:
    """The HTML of the report of `source`; equal input gives equal text."""
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
        style=Markup(style),  # noqa: S704 - files of this package
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
        plural=plural,
    )


def write_report(text: str, path: Path) -> None:
    """Write under a temporary name and rename; `BenchError` if the file cannot be written."""
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
    table = pivot(source.rows, Layout(metrics=SHOWN))
    indices = {id(row): index for index, row in enumerate(source.rows)}
    lines = []
    for labels, boxes in table.lines:
        cells = [_show(box, indices, metrics, payload) for box in boxes]
        lines.append(([clean_line(label, LABEL) for label in labels], cells))
    notes = [clean_line(note, 600) for note in table.footnotes if not note.startswith(("[", "Each cell:"))]
    columns = [clean_line(column, LABEL) for column in table.columns]
    return Matrix(clean_line(table.title, 400), table.axes, columns, lines, notes)


def _show(box: Box | None, indices: Mapping[int, int], metrics: Sequence[Metric], payload: Payload) -> Shown | None:
    if box is None or box.row is None:
        return None
    if box.row.ba is None:
        return Shown(indices[id(box.row)], (), box.row.status)
    return Shown(indices[id(box.row)], [_tile(box.row, metric, payload) for metric in metrics], "")


def _tile(row: Row, metric: Metric, payload: Payload) -> Tile:
    value, rank = getattr(row, metric.name), payload.ranks.get((id(row), metric.name), "")
    text, css = show_number(value, metric), "none"
    if value is not None:
        css = f"v{step_of(float(text) / 100, metric.better == 'lower')}"
    if rank == "best":
        css += " best"
    return Tile(metric.title, text, css, rank == "close")
