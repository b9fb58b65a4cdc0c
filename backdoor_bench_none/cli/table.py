"""bbn table."""

from __future__ import annotations

from pathlib import Path

import click

from backdoor_bench_none.cli.options import (
    Selection,
    file_argument,
    find_file,
    open_registry,
    results_option,
    selection_options,
    warn_of_absent,
)
from backdoor_bench_none.errors import ExitCode


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
    help="csv and json have one row per combination, with all numbers.",
)
@click.option("--all", "everything", is_flag=True, help="All records of the results folder, whatever the file names.")
def table_command(file: Path | None, results: Path | None, selection: Selection, form: str, everything: bool) -> int:
    """Print the comparison matrix of a benchmark file (default:
    benchmark.yaml) from its records; cells without one are shown as missing.
    """
    from backdoor_bench_none.plan import make_plan
    from backdoor_bench_none.report.tables import open_console, print_matrix, render
    from backdoor_bench_none.results.rows import make_rows, rows_of_records
    from backdoor_bench_none.results.store import Store

    if everything:
        rows = rows_of_records(Store(results or Path("results")).records())
    else:
        path = find_file(file)
        plan = selection.apply(make_plan(path, open_registry(path)))
        warn_of_absent(plan)
        rows = make_rows(plan, Store(results or plan.config.results))
    if form == "terminal":
        print_matrix(rows, open_console())
    else:
        click.echo(render(rows, form))
    return ExitCode.OK
