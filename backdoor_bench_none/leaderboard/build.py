"""The leaderboard site: a page for each track and each submission, CSV and JSON; static, and usable offline."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from backdoor_bench_none.errors import BenchError
from backdoor_bench_none.leaderboard.standings import SCORED, Entry, Refused, as_table, rank_entries, read_entries, show
from backdoor_bench_none.leaderboard.track import Track, read_track, track_names
from backdoor_bench_none.registry.plugins import own_version
from backdoor_bench_none.report.escape import escape_csv
from backdoor_bench_none.results.metrics import METRICS
from backdoor_bench_none.results.rows import Row
from backdoor_bench_none.words import plural

#: marks the pages of this package: only folders with such a page are overwritten
MARK = '<meta name="generator" content="backdoor-bench-none">'


def build_site(paths: Sequence[Path], output: Path, verifications: Path) -> tuple[list[Entry], list[Refused]]:
    """Write the site of all submissions at or below `paths` into `output`, replacing an older site.

    Submissions that cannot be read are refused, with the reason on the front page. `BenchError` if `output` holds
    anything but an older site; it is then left unchanged.
    """
    entries, refused = read_entries(paths, verifications)
    by_track, strays = _split_by_track(entries)
    pages: dict[str, str] = {}
    standings = []
    listed: list[Entry] = []
    for name in track_names():
        track, ranked = read_track(name), rank_entries(by_track.get(name, []))
        standings.append((track, ranked))
        listed += ranked
        pages |= _track_pages(track, ranked)
    refused += strays
    pages["index.html"] = _render("index.html.jinja", tracks=standings, refused=refused, root=".", title="Leaderboard")
    _write(pages, output)
    return listed, refused


def _split_by_track(entries: Sequence[Entry]) -> tuple[dict[str, list[Entry]], list[Refused]]:
    """The entries of each track, and those refused because their track, or its version, does not exist here."""
    refused: list[Refused] = []
    by_track: dict[str, list[Entry]] = {}
    for entry in entries:
        name = entry.submission.track
        if name in track_names() and entry.submission.track_sha256 == read_track(name).sha256:
            by_track.setdefault(name, []).append(entry)
        else:
            reason = f"it was made for a track '{name}' that is unknown here, or for another version of it"
            refused.append(Refused(entry.submission.title, reason))
    return by_track, refused


def _track_pages(track: Track, entries: Sequence[Entry]) -> dict[str, str]:
    table = as_table(entries)
    metrics = {name: METRICS[name] for name in SCORED}
    pages = {
        f"{track.name}/index.html": _render(
            "track.html.jinja", track=track, entries=entries, metrics=metrics, root="..", title=track.title
        ),
        f"{track.name}/standings.json": json.dumps(table, indent=1, ensure_ascii=False, allow_nan=False),
        f"{track.name}/standings.csv": _csv(table),
    }
    for entry in entries:
        history = [other for other in entries if _is_same_defense(entry, other)]
        pages[f"{track.name}/{entry.slug}.html"] = _render(
            "defense.html.jinja", track=track, entry=entry, metrics=metrics, history=history, root="..",
            title=entry.submission.title,
        )  # fmt: skip
    return pages


def _is_same_defense(one: Entry, other: Entry) -> bool:
    """Whether two entries are versions of one defense: the same name from the same package."""
    first, second = one.submission, other.submission
    return (first.defense.name, first.source.distribution) == (second.defense.name, second.source.distribution)


def _render(template: str, **values: Any) -> str:
    environment = Environment(
        loader=PackageLoader("backdoor_bench_none.leaderboard"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.globals.update(
        show=show, show_row=show_row, is_link=is_link, plural=plural, version=own_version(), METRICS=METRICS
    )
    return environment.get_template(template).render(**values)


def show_row(row: Row, metric: str) -> str:
    """The mean of a row and its interval."""
    facts, interval = METRICS[metric], row.intervals.get(metric)
    mean = facts.show(getattr(row, metric))
    if interval is None:
        return mean
    return f"{mean} [{facts.show(interval.low)}, {facts.show(interval.high)}]"


def is_link(text: str) -> bool:
    """Whether a third-party text may become a link: an https address that a browser cannot run as code."""
    return text.startswith("https://") and not any(c.isspace() or ord(c) < 32 or c in "\"'<>`" for c in text)


def _csv(table: Sequence[Mapping[str, Any]]) -> str:
    if not table:
        return ""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(table[0]), lineterminator="\n")
    writer.writeheader()
    for line in table:
        writer.writerow({name: escape_csv(value) for name, value in line.items()})
    return out.getvalue()


def _write(pages: Mapping[str, str], output: Path) -> None:
    """Write all pages beside `output`, then rename: a failed build leaves the older site unchanged."""
    if output.exists() and not _is_site(output):
        message = f"'{output}' exists already and is not a leaderboard site"
        raise BenchError(message, "choose another folder with --output")
    draft = output.with_name(f".{output.name}.partial")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        for name, text in pages.items():
            path = draft / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        shutil.rmtree(output, ignore_errors=True)
        draft.rename(output)
    except OSError as error:
        raise BenchError(f"'{output}' cannot be written: {error.strerror or error}") from error


def _is_site(folder: Path) -> bool:
    """Whether a folder may be replaced: it is empty, or its front page carries `MARK`."""
    if not folder.is_dir():
        return False
    index = folder / "index.html"
    return not any(folder.iterdir()) or (index.is_file() and MARK in index.read_text("utf-8", "replace"))
