"""The verb `bbn table`."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from backdoor_bench_none.cli.options import (
    Selection,
    file_argument,
    open_registry,
    read_plan,
    results_option,
    selection_options,
    warn_of_absent,
)
from backdoor_bench_none.errors import ConfigError, ExitCode

if TYPE_CHECKING:
    from backdoor_bench_none.results.rows import Row


def _split(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...]:
    return tuple(filter(None, (part.strip() for part in (value or "").split(","))))


@click.command("table")
@file_argument
@results_option
@selection_options
@click.option(
    "--format",
    "form",
    type=click.Choice(["terminal", "markdown", "latex", "csv", "json", "html"]),
    default="terminal",
    show_default=True,
    help="csv and json have one row per combination, with all metrics.",
)
@click.option("--rows", callback=_split, metavar="AXES", help="Axes of rows, as attack,architecture.")
@click.option(
    "--columns", callback=_split, metavar="AXES", default="defense", show_default=True, help="Axes of columns."
)
@click.option(
    "--metric", "metrics", callback=_split, metavar="METRICS", default="ba,asr", show_default=True,
    help="Any of ba, asr, ra, der, tpr, fpr, auroc, tpr_at_1_fpr, seconds, cost_ratio, peak_memory, clean_fraction.",
)  # fmt: skip
@click.option("--compare", nargs=2, metavar="A B", help="Compare two defenses, paired over seeds, cells and images.")
@click.option("--paper", metavar="TABLE", help="Show the paper's numbers beside those of the same cells, as table1.")
@click.option("--near", is_flag=True, help="With --paper: also beside cells that differ, with the differences.")
@click.option(
    "--all", "everything", is_flag=True, help="All records of the results folder, not only those of the file."
)
def table_command(
    file: Path | None,
    results: Path | None,
    selection: Selection,
    form: str,
    rows: tuple[str, ...],
    columns: tuple[str, ...],
    metrics: tuple[str, ...],
    compare: tuple[str, str] | None,
    paper: str | None,
    near: bool,
    everything: bool,
) -> int:
    """Print the comparison matrix of a benchmark file (default: benchmark.yaml) from its records.

    Cells without a record are shown as missing.
    """
    from backdoor_bench_none.report.pivot import Layout
    from backdoor_bench_none.report.tables import open_console, print_matrix, print_table, render, render_table

    layout = Layout(rows, columns, metrics)
    layout.check()
    if near and paper is None:
        raise ConfigError("--near goes with --paper")
    with _no_garbage_collection():
        table_rows, folder = find_rows(file, results, selection, everything)
    if compare is not None or paper is not None:
        from backdoor_bench_none.report.comparison import compare_defenses
        from backdoor_bench_none.report.paper import compare_with_paper
        from backdoor_bench_none.results.store import Store

        if compare is not None:
            table = compare_defenses(table_rows, *compare, folder)
        else:
            registry = open_registry(file)
            table = compare_with_paper(table_rows, Store(folder), registry, str(paper), near=near)
        if form == "terminal":
            print_table(table, open_console())
        else:
            click.echo(render_table(table, form))
    elif form == "terminal":
        print_matrix(table_rows, open_console(), layout)
    else:
        click.echo(render(table_rows, form, layout))
    return ExitCode.OK


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Turn off garbage collection, which takes a tenth of the time of reading 20,000 records and finds nothing."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def find_rows(
    file: Path | None, results: Path | None, selection: Selection, everything: bool
) -> tuple[list[Row], Path]:
    """The rows of a benchmark file, or of all records, and the results folder they are from."""
    from backdoor_bench_none.results.index import read_measurements
    from backdoor_bench_none.results.rows import make_rows, rows_of_measurements

    if everything:
        folder = results or Path("results")
        return rows_of_measurements(m for m in read_measurements(folder) if selection.wants_measured(m)), folder

    plan, _, folder = read_plan(file, results, selection)
    warn_of_absent(plan)
    return make_rows(plan, folder), folder
