"""The comparison matrix for terminals, papers and programs."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Sequence
from html import escape

from rich.console import Console
from rich.table import Table
from rich.text import Text
from tabulate import tabulate

from backdoor_bench_none.report.comparison import Table as PlainTable
from backdoor_bench_none.report.escape import escape_csv, escape_latex, escape_markdown
from backdoor_bench_none.report.pivot import Box, Layout, Part, Pivot, pivot
from backdoor_bench_none.results.metrics import METRICS
from backdoor_bench_none.results.rows import Row
from backdoor_bench_none.words import wrap

FORMATS = ("terminal", "markdown", "latex", "csv", "json", "html")
#: columns where the output is no terminal, so that lines of the matrix do not wrap in a log
LOG_WIDTH = 200
#: metrics with a deviation and an interval in CSV
SPREAD = ("ba", "asr", "ra", "der")


def print_matrix(rows: Sequence[Row], console: Console, layout: Layout | None = None) -> None:
    """Print the matrix on a terminal; if it is too wide, with a line for each of its cells."""
    layout = layout or Layout()
    matrix = pivot(rows, layout)
    table = _wide_table(matrix)
    if console.measure(table, options=console.options.update(max_width=10_000)).maximum > console.width:
        table = _long_table(matrix, " · ".join(layout.columns))
    console.print(wrap(matrix.title), style="bold", markup=False, highlight=False, soft_wrap=True)
    console.print(table, markup=False)
    for note in matrix.footnotes:
        console.print(wrap(note), markup=False, highlight=False, soft_wrap=True)


def open_console() -> Console:
    """A console as wide as the terminal, or of `LOG_WIDTH` where the output is none."""
    console = Console()
    if console.is_terminal or "COLUMNS" in os.environ:
        return console
    return Console(width=LOG_WIDTH)


def _wide_table(matrix: Pivot) -> Table:
    lines = [[*map(Text, labels), *map(_as_text, boxes)] for labels, boxes in matrix.lines]
    return _table(matrix.header, lines, len(matrix.axes))


def _long_table(matrix: Pivot, column_axes: str) -> Table:
    """The matrix with one cell in each line, whose column becomes a label."""
    lines: list[list[Text]] = []
    for labels, boxes in matrix.lines:
        for column, box in zip(matrix.columns, boxes, strict=True):
            if box is not None:
                lines.append([*map(Text, labels), Text(column), _as_text(box)])
    heading = " / ".join(metric.title for metric in matrix.metrics)
    return _table([*matrix.axes, column_axes, heading], lines, len(matrix.axes) + 1)


def _as_text(box: Box | None) -> Text:
    if box is None:
        return Text("")
    if not box.parts:
        return Text(box.text())
    text = Text(" / ").join(map(_part_as_text, box.parts))
    if box.note is not None:
        text.append(f" [{box.note}]")
    return text


def _part_as_text(part: Part) -> Text:
    return Text(part.marked, style="bold" if part.best else "")


def _table(header: Sequence[str], lines: Sequence[Sequence[Text]], labels: int) -> Table:
    """A table whose first `labels` columns hold texts, the others numbers."""
    table = Table(header_style="bold")
    for index, name in enumerate(header):
        table.add_column(Text(name), justify="left" if index < labels else "right", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    return table


def render(rows: Sequence[Row], form: str, layout: Layout | None = None) -> str:
    """The matrix as markdown, latex or html; the rows as csv or json."""
    if form == "json":
        return json.dumps([row.as_dict() for row in rows], indent=1, ensure_ascii=False)
    if form == "csv":
        return render_csv(rows)
    return _render_pivot(pivot(rows, layout), form)


def _render_pivot(matrix: Pivot, form: str) -> str:
    return {"latex": render_latex, "html": render_html, "markdown": render_markdown}[form](matrix)


def render_markdown(matrix: Pivot) -> str:
    """A GitHub table; best numbers in bold."""
    lines = [[*map(escape_markdown, labels), *map(_markdown, boxes)] for labels, boxes in matrix.lines]
    text = tabulate(lines, list(map(escape_markdown, matrix.header)), tablefmt="github", disable_numparse=True)
    notes = "\n".join(f"{escape_markdown(note)}  " for note in matrix.footnotes)
    return "\n\n".join([f"**{escape_markdown(matrix.title)}**", text, notes])


def _markdown(box: Box | None) -> str:
    if box is None:
        return ""
    if not box.parts:
        return escape_markdown(box.text())
    return box.text(lambda part: f"**{part.text}**" if part.best else part.marked)


def render_latex(matrix: Pivot) -> str:
    """A booktabs tabular (`\\usepackage{booktabs}`) and its notes; best numbers in bold."""
    body = []
    for labels, boxes in matrix.lines:
        cells = [*map(escape_latex, labels), *map(_latex, boxes)]
        body.append(" & ".join(cells) + r" \\")
    columns = "l" * len(matrix.axes) + "r" * len(matrix.columns)
    header = " & ".join(map(escape_latex, matrix.header)) + r" \\"
    notes = [rf"\par\noindent{{\footnotesize {escape_latex(note)}}}" for note in matrix.footnotes]
    title = escape_latex(matrix.title)
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", header, r"\midrule", *body, r"\bottomrule"]
    return "\n".join([f"% {title}", *lines, r"\end{tabular}", *notes])


def _latex(box: Box | None) -> str:
    if box is None:
        return ""
    if not box.parts:
        return escape_latex(box.text())
    return box.text(_latex_part)


def _latex_part(part: Part) -> str:
    text = escape_latex(part.marked)
    return rf"\textbf{{{text}}}" if part.best else text


def render_html(matrix: Pivot) -> str:
    """A table element between its title and its notes; best numbers in bold."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in matrix.header)
    body = []
    for labels, boxes in matrix.lines:
        cells = "".join(f'<th scope="row">{escape(label)}</th>' for label in labels)
        cells += "".join(f"<td>{_html(box)}</td>" for box in boxes)
        body.append(f"<tr>{cells}</tr>")
    table = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(body) + "\n</tbody>\n</table>"
    notes = [f"<p>{escape(note)}</p>" for note in matrix.footnotes]
    return "\n".join([f"<p>{escape(matrix.title)}</p>", table, *notes])


def _html(box: Box | None) -> str:
    if box is None:
        return ""
    if not box.parts:
        return escape(box.text())
    return box.text(_html_part)


def _html_part(part: Part) -> str:
    text = escape(part.marked)
    return f"<b>{text}</b>" if part.best else text


def render_csv(rows: Sequence[Row]) -> str:
    """One line for each row, with all numbers; texts that a spreadsheet would take for formulas are escaped."""
    plain = ["dataset", "attack", "defense", "architecture", "activation", "trainer", "seeds", "status", "reason"]
    spread: list[str] = []
    for name in SPREAD:
        spread += [f"{name}_sd", f"{name}_low", f"{name}_high"]
    out = io.StringIO()
    writer = csv.DictWriter(out, [*plain, *METRICS, *spread, "sees_ground_truth", "unchanged"], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        values = {name: getattr(row, name) for name in (*plain, *METRICS, "sees_ground_truth", "unchanged")}
        values["seeds"] = " ".join(map(str, row.seeds))
        for name in SPREAD:
            interval = row.intervals.get(name)
            values[f"{name}_sd"] = row.deviations.get(name)
            values[f"{name}_low"] = interval and interval.low
            values[f"{name}_high"] = interval and interval.high
        writer.writerow({name: escape_csv(value) for name, value in values.items()})
    return out.getvalue().rstrip("\n")


def print_table(table: PlainTable, console: Console) -> None:
    """Print a plain table on a terminal."""
    console.print(wrap(table.title), style="bold", markup=False, highlight=False, soft_wrap=True)
    lines = [list(map(Text, line)) for line in table.lines]
    console.print(_table(table.header, lines, len(table.header)), markup=False)
    for note in table.footnotes:
        console.print(wrap(note), markup=False, highlight=False, soft_wrap=True)


def render_table(table: PlainTable, form: str) -> str:
    """A plain table as markdown, latex, html, csv or json."""
    if form == "json":
        lines = [dict(zip(table.header, line, strict=True)) for line in table.lines]
        values = {"title": table.title, "lines": lines, "notes": table.footnotes}
        return json.dumps(values, indent=1, ensure_ascii=False)
    if form == "csv":
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        for line in (table.header, *table.lines):
            writer.writerow(map(escape_csv, line))
        return out.getvalue().rstrip("\n")
    boxes: list[tuple[tuple[str, ...], list[Box | None]]] = [(tuple(line), []) for line in table.lines]
    return _render_pivot(Pivot(table.title, tuple(table.header), [], boxes, (), table.footnotes), form)
