"""bbn plan, bbn run."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

from backdoor_bench_none.cli.options import Selection, file_argument, open_registry, results_option, selection_options
from backdoor_bench_none.errors import ExitCode
from backdoor_bench_none.planning.reading import find_file
from backdoor_bench_none.planning.stage_table import record_key

if TYPE_CHECKING:
    from backdoor_bench_none.planning.plan import Plan
    from backdoor_bench_none.run.runner import Only, Summary

only_option = click.option(
    "--only",
    type=click.Choice(["missing", "failed", "all"]),
    default="missing",
    show_default=True,
    help="missing: cells without numbers, failed ones included; failed: those that failed; all: compute again.",
)


@click.command("plan")
@file_argument
@results_option
@only_option
@selection_options
@click.option("-v", "--verbose", is_flag=True, help="Name every cell.")
def plan_command(file: Path | None, results: Path | None, only: Only, selection: Selection, verbose: bool) -> int:
    """Show what `bbn run` would do: cells, shared stages, what is done and what is skipped."""
    from backdoor_bench_none.planning.plan import make_plan
    from backdoor_bench_none.results.store import Store
    from backdoor_bench_none.run.runner import choose_cells, count_done, pack_jobs

    path = find_file(file)
    plan = selection.apply(make_plan(path, open_registry(path)))
    store = Store(results or plan.config.results)
    todo = [cell for cell in choose_cells(plan, store, only) if record_key(cell) not in plan.skipped]
    for line in describe_plan(plan):
        click.echo(line)
    if verbose:
        pending = {record_key(cell) for cell in todo}
        for cell in plan.cells:
            state = "skip" if record_key(cell) in plan.skipped else "run" if record_key(cell) in pending else "done"
            click.echo(f"  {state:4} {record_key(cell)}  {cell.title}")
    kinds = Counter[str](job.kind for job in pack_jobs(todo, store))
    click.echo(f"  done        {count_done(plan, store)} cells")
    shared = f"{kinds['poison']} poisoned sets and {kinds['victim'] + kinds['benign']} victims"
    for kind, word in (("crafter", "crafting networks"), ("backbone", "backbones")):
        shared = f"{kinds[kind]} {word}, {shared}" if kinds[kind] else shared
    click.echo(f"  to do       {kinds['cell']} cells, and {shared} that they share")
    click.echo(f"Nothing was run. To run it: {_again('bbn run', file, results)}")
    return ExitCode.OK


def describe_plan(plan: Plan) -> list[str]:
    """The size of the matrix, and what is left out of it."""
    axes = {"dataset": "data sets", "attack": "attacks", "defense": "defenses"}
    axes |= {"architecture": "architectures", "activation": "activations"}
    counts = {word: len({cell.choices[axis].label for cell in plan.cells}) for axis, word in axes.items()}
    counts["seeds"] = len({cell.seed for cell in plan.cells})
    sizes = [f"{count} {word if count != 1 else word[:-1]}" for word, count in counts.items()]
    excluded = f", {plan.excluded} excluded" if plan.excluded else ""
    lines = [f"{plan.config.name}: {len(plan.cells)} cells of {', '.join(sizes)}{excluded}"]
    selected = {record_key(cell) for cell in plan.cells}
    reasons = Counter(reason for key, reason in plan.skipped.items() if key in selected)
    lines += [f"  skipped     {count}: {reason}" for reason, count in reasons.items()]
    lines += [f"  absent      data set {name}: `bbn run` downloads it if it may" for name in plan.absent]
    return lines


@click.command("run")
@file_argument
@results_option
@only_option
@selection_options
@click.option(
    "-j",
    "--slots",
    type=click.IntRange(min=1),
    help="Jobs at the same time (default: one per core, or per GPU); on a CPU they share its threads.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("-x", "fail_fast", is_flag=True, help="Stop after the first failure.")
@click.option("--maxfail", type=click.IntRange(min=1), help="Stop after that many failures.")
@click.option("-q", "--quiet", is_flag=True, help="Show failures only, and the table.")
def run_command(
    file: Path | None,
    results: Path | None,
    only: Only,
    selection: Selection,
    slots: int | None,
    device: str,
    fail_fast: bool,
    maxfail: int | None,
    quiet: bool,
) -> int:
    """Run what is missing of a benchmark file (default: benchmark.yaml) and
    print its matrix. A run that was stopped goes on where it was.
    """
    from backdoor_bench_none.contracts.context import choose_device
    from backdoor_bench_none.planning.plan import make_plan
    from backdoor_bench_none.report.tables import open_console, print_matrix
    from backdoor_bench_none.results.rows import make_rows
    from backdoor_bench_none.run.progress import Bars, Lines
    from backdoor_bench_none.run.runner import Options, run_plan

    choose_device(device)
    path = find_file(file)
    registry = open_registry(path)
    plan = selection.apply(make_plan(path, registry, need_data=True))
    folder = results or plan.config.results
    console = open_console()
    reporter = Bars(console) if console.is_terminal and not quiet else Lines(console, quiet)
    options = Options(folder, device, slots, only, 1 if fail_fast else maxfail)
    summary = run_plan(plan, registry, options, reporter)
    print_matrix(make_rows(plan, folder), console)
    for line in describe_summary(summary, file, folder if folder != Path("results") else None):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if summary.interrupted:
        return ExitCode.INTERRUPTED
    return ExitCode.CELLS_FAILED if summary.failed else ExitCode.OK


def describe_summary(summary: Summary, file: Path | None, results: Path | None) -> list[str]:
    """What failed, the numbers of the run, and what to type next."""
    lines = [f"{record.status.upper()} {record.key}  {record.title} - {record.reason}" for record in summary.failed]
    counts = [(summary.done, "done"), (len(summary.failed), "failed"), (summary.skipped, "skipped")]
    counts += [(summary.cached, "done before"), (summary.not_run, "not run")]
    lines.append(", ".join(f"{n} {word}" for n, word in counts if n or word == "done") + f" in {summary.seconds:.0f} s")
    if summary.failed:
        look = _again(f"bbn results show {summary.failed[0].key}", None, results)
        lines.append(f"look: {look}    again: {_again('bbn run --only failed', file, results)}")
    elif summary.not_run:
        lines.append(f"go on: {_again('bbn run', file, results)}")
    else:
        lines.append(f"all numbers: {_again('bbn table --format json', file, results)}")
    return lines


def _again(command: str, file: Path | None, results: Path | None) -> str:
    """`command` with the file and the folder that were given."""
    return " ".join([command, *([str(file)] if file else []), *(["--results", str(results)] if results else [])])
