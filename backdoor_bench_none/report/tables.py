"""The comparison matrix: one line per data set, attack, architecture and activation, one column per defense."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Sequence
from html import escape

from rich.console import Console
from rich.table import Table
from rich.text import Text
from tabulate import tabulate

from backdoor_bench_none.results.rows import Row

FORMATS = ("terminal", "markdown", "latex", "csv", "json", "html")
LEGEND = (
    "Each cell: BA / ASR in percent. BA benign accuracy, higher is better; ASR attack success rate, lower is better"
)
#: columns where the output is no terminal, so that a log keeps the matrix whole
LOG_WIDTH = 200
#: axes that make the lines of the matrix; those with a single value go into the title
LINE_AXES = ("dataset", "attack", "architecture", "activation", "trainer")


class Matrix:
    """Rows pivoted: `title` has the axes that do not vary, `header` and `lines` the rest."""

    def __init__(self, rows: Sequence[Row]) -> None:
        varying = [axis for axis in LINE_AXES if len({getattr(row, axis) for row in rows}) > 1] or ["attack"]
        fixed = (
            [getattr(rows[0], axis) for axis in LINE_AXES if axis not in varying and axis != "trainer"] if rows else []
        )
        defenses = list(dict.fromkeys(row.defense for row in rows))
        given = {row.defense: _given(row) for row in rows if _given(row)}
        cells = {(tuple(getattr(row, axis) for axis in varying), row.defense): row for row in rows}
        lines = dict.fromkeys(line for line, _ in cells)
        self.notes: list[str] = []
        self.grants = [f"* {defense} was {what}" for defense, what in given.items()]
        self.title = " · ".join([*fixed, _seeds(rows)])
        self.header = [*varying, *(d + "*" * (d in given) for d in defenses)]
        self.lines = [[*line, *(self._cell(cells.get((line, defense))) for defense in defenses)] for line in lines]

    def _cell(self, row: Row | None) -> str:
        if row is None:
            return ""
        mark = "" if row.status == "done" else self._note(f"{row.status}: {row.reason}")
        if row.ba is None:
            return row.status + mark
        return f"{100 * row.ba:.1f} / " + ("–" if row.asr is None else f"{100 * row.asr:.1f}") + mark

    def _note(self, text: str) -> str:
        if text not in self.notes:
            self.notes.append(text)
        return f" [{self.notes.index(text) + 1}]"

    def footnotes(self) -> list[str]:
        """The legend, and why cells have no numbers."""
        return [LEGEND, *self.grants, *(f"[{number}] {note}" for number, note in enumerate(self.notes, 1))]


def _given(row: Row) -> str:
    """What a defense was granted beyond the untrusted training set."""
    if row.sees_ground_truth:
        return "told which samples are poisoned: an upper bound, not a defense"
    return f"given {100 * row.clean_fraction:g} % of the training set as clean data" if row.clean_fraction else ""


def _seeds(rows: Sequence[Row]) -> str:
    counts = {len(row.seeds) for row in rows if row.seeds}
    if not counts:
        return "no results yet"
    if counts == {1}:
        return "1 seed"
    return f"mean over {min(counts)} seeds" if len(counts) == 1 else f"mean over {min(counts)} to {max(counts)} seeds"


def print_matrix(rows: Sequence[Row], console: Console) -> None:
    """Print the matrix on a terminal; if it is too wide, one line per defense instead of one column."""
    matrix = Matrix(rows)
    table = _table(matrix.header, matrix.lines)
    unbounded = console.options.update(max_width=10_000)
    if console.measure(table, options=unbounded).maximum > console.width:
        axes = [name for name in matrix.header if name in LINE_AXES]
        lines = [
            [*line[: len(axes)], defense, cell]
            for line in matrix.lines
            for defense, cell in zip(matrix.header[len(axes) :], line[len(axes) :], strict=True)
            if cell
        ]
        table = _table([*axes, "defense", "BA / ASR"], lines)
    console.print(matrix.title, style="bold", markup=False, highlight=False, soft_wrap=True)
    console.print(table, markup=False)
    for note in matrix.footnotes():
        console.print(note, markup=False, highlight=False, soft_wrap=True)


def open_console() -> Console:
    """A console as wide as the terminal, or wide enough for a log."""
    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=LOG_WIDTH)


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    table = Table(header_style="bold")
    for name in header:
        table.add_column(Text(name), justify="left" if name in (*LINE_AXES, "defense") else "right", no_wrap=True)
    for line in lines:
        table.add_row(*map(Text, line))
    return table


def render(rows: Sequence[Row], form: str) -> str:
    """The matrix as markdown, latex or html; the rows as csv or json."""
    if form == "json":
        return json.dumps([row.as_dict() for row in rows], indent=1, ensure_ascii=False)
    if form == "csv":
        return _csv(rows)
    matrix = Matrix(rows)
    if form == "latex":
        text = tabulate(matrix.lines, matrix.header, tablefmt="latex_booktabs", disable_numparse=True)
        notes = [rf"\par\noindent{{\footnotesize {_escape_latex(note)}}}" for note in matrix.footnotes()]
        return "\n".join([f"% {matrix.title}", text, *notes])
    if form == "html":
        text = tabulate(matrix.lines, matrix.header, tablefmt="html", disable_numparse=True)
        return "\n".join([f"<p>{escape(matrix.title)}</p>", text, *(f"<p>{escape(n)}</p>" for n in matrix.footnotes())])
    text = tabulate(matrix.lines, matrix.header, tablefmt="github", disable_numparse=True)
    return "\n\n".join([f"**{matrix.title}**", text, "\n".join(f"{note}  " for note in matrix.footnotes())])


def _escape_latex(text: str) -> str:
    return re.sub(r"([#$%&_{}])", r"\\\1", text.replace("\\", "/").replace("~", " ").replace("^", " "))


def _csv(rows: Sequence[Row]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(Row.__dataclass_fields__))
    writer.writeheader()
    for row in rows:
        writer.writerow({**row.as_dict(), "seeds": " ".join(map(str, row.seeds))})
    return out.getvalue().rstrip("\r\n")
