"""The verb `bbn report`."""

from __future__ import annotations

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
from backdoor_bench_none.cli.output import say
from backdoor_bench_none.errors import ExitCode

if TYPE_CHECKING:
    from backdoor_bench_none.report.html.source import Source


@click.command("report")
@file_argument
@results_option
@click.option(
    "--output", type=click.Path(path_type=Path), default=Path("report.html"), show_default=True, help="The HTML file."
)
@selection_options
@click.option(
    "--all", "everything", is_flag=True, help="All records of the results folder, not only those of the file."
)
@click.option(
    "--previews/--no-previews",
    default=True,
    show_default=True,
    help="Show triggers on images; reads the data sets.",
)
def report_command(
    file: Path | None, results: Path | None, output: Path, selection: Selection, everything: bool, previews: bool
) -> int:
    """Write a report of a benchmark file (default: benchmark.yaml) as one HTML file that opens offline.

    It holds a summary, the matrix, a scatter plot, every cell with its provenance, and the failures.
    """
    from backdoor_bench_none.report.html.build import build_report, write_report
    from backdoor_bench_none.report.html.previews import make_previews

    source = _find_source(file, results, selection, everything)
    text = build_report(source, make_previews(source.pairs) if previews else {})
    write_report(text, output)
    done = sum(trial.status == "done" for trial in source.trials)
    say(f"{output}: {done} of {len(source.trials)} cells have numbers, {len(text.encode()) / 1000:.0f} kB")
    return ExitCode.OK


def _find_source(file: Path | None, results: Path | None, selection: Selection, everything: bool) -> Source:
    from backdoor_bench_none.report.html.source import source_of_plan, source_of_records
    from backdoor_bench_none.results.index import read_measurements

    if everything:
        folder = results or Path("results")
        wanted = (measured for measured in read_measurements(folder) if selection.wants_measured(measured))
        return source_of_records(wanted, folder, open_registry(file), file)

    plan, path, folder = read_plan(file, results, selection)
    warn_of_absent(plan)
    return source_of_plan(plan, folder, path)
