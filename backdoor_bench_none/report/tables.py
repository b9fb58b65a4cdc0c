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
from backdoor_bench_none.report.pivot import Box, Layout, Pivot, pivot
from backdoor_bench_none.results.metrics import METRICS
from backdoor_bench_none.results.rows import Row

FORMATS = ("terminal", "markdown", "latex", "csv", "json", "html")
#: columns where the output is no terminal, so that a log keeps the matrix whole
LOG_WIDTH = 200
#: metrics with a deviation and an interval in CSV
SPREAD = ("ba", "asr", "ra", "der")


def print_matrix(rows: Sequence[Row], console: Console, layout: Layout | None = None) -> None:
    """Print the matrix on a terminal; if it is too wide, one line per column."""
    made = pivot(rows, layout)
    lines = [[*map(Text, labels), *map(_as_text, boxes)] for labels, boxes in made.lines]
    table = _table(made.header, lines, len(made.axes))
    if console.measure(table, options=console.options.update(max_width=10_000)).maximum > console.width:
        lines = [
            [*map(Text, labels), Text(column), _as_text(box)]
            for labels, boxes in made.lines
            for column, box in zip(made.columns, boxes, strict=True)
            if box is not None
        ]
        heading = " / ".join(metric.title for metric in made.metrics)
        column_axes = " · ".join((layout or Layout()).columns)
        table = _table([*made.axes, column_axes, heading], lines, len(made.axes) + 1)
    console.print(made.title, style="bold", markup=False, highlight=False, soft_wrap=True)
    console.print(table, markup=False)
    for note in made.footnotes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)


def open_console() -> Console:
    """A console as wide as the terminal, or wide enough for a log."""
    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=LOG_WIDTH)


def _as_text(box: Box | None) -> Text:
    if box is None:
        return Text("")
    if not box.parts:
        return Text(box.text())
    text = Text(" / ").join(Text(p.text + "≈" * p.close, style="bold" if p.best else "") for p in box.parts)
    return text if box.note is None else text.append(f" [{box.note}]")


def _table(header: Sequence[str], lines: Sequence[Sequence[Text]], labels: int) -> Table:
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
    made = pivot(rows, layout)
    return {"latex": render_latex, "html": render_html, "markdown": render_markdown}[form](made)


def render_markdown(made: Pivot) -> str:
    """A GitHub table; best numbers in bold."""
    lines = [
        [*map(escape_markdown, labels), *("" if box is None else _markdown(box) for box in boxes)]
        for labels, boxes in made.lines
    ]
    text = tabulate(lines, list(map(escape_markdown, made.header)), tablefmt="github", disable_numparse=True)
    notes = "\n".join(f"{escape_markdown(note)}  " for note in made.footnotes)
    return "\n\n".join([f"**{escape_markdown(made.title)}**", text, notes])


def _markdown(box: Box) -> str:
    return box.text("**{}**") if box.parts else escape_markdown(box.text())


def render_latex(made: Pivot) -> str:
    """A booktabs tabular (`\\usepackage{booktabs}`) and its notes; best numbers in bold."""
    body = []
    for labels, boxes in made.lines:
        cells = [*map(escape_latex, labels), *("" if box is None else _latex(box) for box in boxes)]
        body.append(" & ".join(cells) + r" \\")
    columns = "l" * len(made.axes) + "r" * len(made.columns)
    header = " & ".join(map(escape_latex, made.header)) + r" \\"
    notes = [rf"\par\noindent{{\footnotesize {escape_latex(note)}}}" for note in made.footnotes]
    title = escape_latex(made.title)
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", header, r"\midrule", *body, r"\bottomrule"]
    return "\n".join([f"% {title}", *lines, r"\end{tabular}", *notes])


def _latex(box: Box) -> str:
    if not box.parts:
        return escape_latex(box.text())
    parts = [escape_latex(part.text + "≈" * part.close) for part in box.parts]
    shown = [rf"\textbf{{{text}}}" if part.best else text for text, part in zip(parts, box.parts, strict=True)]
    return " / ".join(shown) + ("" if box.note is None else f" [{box.note}]")


def render_html(made: Pivot) -> str:
    """A table element with its title before and its notes behind it."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in made.header)
    body = []
    for labels, boxes in made.lines:
        cells = "".join(f'<th scope="row">{escape(label)}</th>' for label in labels)
        cells += "".join(f"<td>{'' if box is None else _html(box)}</td>" for box in boxes)
        body.append(f"<tr>{cells}</tr>")
    table = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(body) + "\n</tbody>\n</table>"
    return "\n".join([f"<p>{escape(made.title)}</p>", table, *(f"<p>{escape(note)}</p>" for note in made.footnotes)])


def _html(box: Box) -> str:
    if not box.parts:
        return escape(box.text())
    shown = [f"<b>{escape(p.text)}</b>" if p.best else escape(p.text + "≈" * p.close) for p in box.parts]
    return " / ".join(shown) + ("" if box.note is None else f" [{box.note}]")


def render_csv(rows: Sequence[Row]) -> str:
    """One line for each row, with all numbers; nothing in it is a formula to a spreadsheet."""
    plain = ["dataset", "attack", "defense", "architecture", "activation", "trainer", "seeds", "status", "reason"]
    spread = [f"{name}_{part}" for name in SPREAD for part in ("sd", "low", "high")]
    out = io.StringIO()
    writer = csv.DictWriter(out, [*plain, *METRICS, *spread, "sees_ground_truth"], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        values = {name: getattr(row, name) for name in (*plain, *METRICS, "sees_ground_truth")}
        values["seeds"] = " ".join(map(str, row.seeds))
        for name in SPREAD:
            interval = row.intervals.get(name)
            values[f"{name}_sd"] = row.deviations.get(name)
            values |= {f"{name}_{part}": interval and getattr(interval, part) for part in ("low", "high")}
        writer.writerow({name: escape_csv(value) for name, value in values.items()})
    return out.getvalue().rstrip("\n")


def print_table(table: PlainTable, console: Console) -> None:
    """Print a plain table on a terminal."""
    console.print(table.title, style="bold", markup=False, highlight=False, soft_wrap=True)
    lines = [list(map(Text, line)) for line in table.lines]
    console.print(_table(table.header, lines, len(table.header)), markup=False)
    for note in table.footnotes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)


def render_table(table: PlainTable, form: str) -> str:
    """A plain table as markdown, latex, html, csv or json."""
    if form == "json":
        lines = [dict(zip(table.header, line, strict=True)) for line in table.lines]
        return json.dumps(
            {"title": table.title, "lines": lines, "notes": table.footnotes}, indent=1, ensure_ascii=False
        )
    if form == "csv":
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows(
            [[escape_csv(x) for x in line] for line in (table.header, *table.lines)]
        )
        return out.getvalue().rstrip("\n")
    boxes: list[tuple[tuple[str, ...], list[Box | None]]] = [(tuple(line), []) for line in table.lines]
    made = Pivot(table.title, tuple(table.header), [], boxes, (), table.footnotes)
    return {"latex": render_latex, "html": render_html, "markdown": render_markdown}[form](made)
