"""The verbs `bbn plan` and `bbn run`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
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
)
from backdoor_bench_none.cli.output import say
from backdoor_bench_none.errors import DatasetError, ExitCode
from backdoor_bench_none.planning.reading import find_file
from backdoor_bench_none.planning.stage_table import find_stage, in_order, record_key
from backdoor_bench_none.words import plural

if TYPE_CHECKING:
    from backdoor_bench_none.contracts.cell import Cell
    from backdoor_bench_none.planning.plan import Plan
    from backdoor_bench_none.run.runner import Only, Summary

#: axis -> what its entries are called
AXIS_WORDS = {
    "dataset": "data set",
    "attack": "attack",
    "defense": "defense",
    "architecture": "architecture",
    "activation": "activation",
}

only_option = click.option(
    "--only",
    type=click.Choice(["missing", "failed", "all"]),
    default="missing",
    show_default=True,
    help="missing: cells without results, including failed ones; failed: failed cells; all: every cell again.",
)


@click.command("plan")
@file_argument
@results_option
@only_option
@selection_options
@click.option("-v", "--verbose", is_flag=True, help="Name every cell.")
def plan_command(file: Path | None, results: Path | None, only: Only, selection: Selection, verbose: bool) -> int:
    """Show what `bbn run` would do: the cells to run, the stages they share, what is done and what is skipped."""
    from backdoor_bench_none.results.store import Store
    from backdoor_bench_none.run.runner import choose_cells, count_done, find_missing_stages

    plan, _, folder = read_plan(file, results, selection)
    store = Store(folder)
    todo = [cell for cell in choose_cells(plan, store, only) if record_key(cell) not in plan.skipped]
    lines = describe_plan(plan)
    if verbose:
        lines += describe_cells(plan, {record_key(cell) for cell in todo})
    lines.append(f"  done        {plural('cell', count_done(plan, store))}")
    lines.append(f"  to do       {describe_work(todo, find_missing_stages(todo, store).values())}")
    lines.append(f"Nothing was run. To run it: {_again('bbn run', file, results)}")
    for line in lines:
        say(line)
    return ExitCode.OK


def describe_work(cells: list[Cell], missing: Iterable[str]) -> str:
    """The number of cells to run, and of the stages they share, in the order of the stage table."""
    counts = Counter(missing)
    shared = [plural(find_stage(name).words, counts[name]) for name in in_order(counts)]
    if not shared:
        return plural("cell", len(cells))
    return f"{plural('cell', len(cells))}, and what they share: {', '.join(shared)}"


def describe_cells(plan: Plan, pending: set[str]) -> list[str]:
    """One line for each cell: whether it is skipped, to be run or done, its key and its title."""
    lines = []
    for cell in plan.cells:
        key = record_key(cell)
        state = "done"
        if key in plan.skipped:
            state = "skip"
        elif key in pending:
            state = "run"
        lines.append(f"  {state:4} {key}  {cell.title}")
    return lines


def describe_plan(plan: Plan) -> list[str]:
    """The size of the matrix, and what is left out of it."""
    sizes = [plural(word, len({cell.choices[axis].label for cell in plan.cells})) for axis, word in AXIS_WORDS.items()]
    sizes.append(plural("seed", len({cell.seed for cell in plan.cells})))
    title = f"{plan.config.name}: {plural('cell', len(plan.cells))} of {', '.join(sizes)}"
    if plan.excluded:
        title += f", {plan.excluded} excluded"
    lines = [title]
    selected = {record_key(cell) for cell in plan.cells}
    reasons = Counter(reason for key, reason in plan.skipped.items() if key in selected)
    lines += [f"  skipped     {count}: {reason}" for reason, count in reasons.items()]
    deviations = Counter((cell.architecture.label, cell.recipe_deviation) for cell in plan.cells)
    lines += [
        f"  recipe      not as published in {plural('cell', count)} of {label}: {deviation}"
        for (label, deviation), count in deviations.items() if deviation
    ]  # fmt: skip
    lines += describe_data(plan)
    lines += [f"  absent      data set {name}: `bbn run` downloads it if it may" for name in plan.absent]
    return lines


def describe_data(plan: Plan) -> list[str]:
    """How people's own data are read, and which classes attacks aim at where these have names."""
    lines: dict[str, None] = {}  # each once, in order
    for dataset in {cell.dataset.label: cell.dataset for cell in plan.cells}.values():
        with suppress(DatasetError):  # the records may be there without the data
            lines |= dict.fromkeys(f"  data        {dataset.label}: {line}" for line in dataset.component.reading())
    for cell in {(cell.attack.identity, cell.dataset.identity): cell for cell in plan.cells}.values():
        for name in ("target", "source"):
            label = getattr(cell.attack.component, name, None)
            if isinstance(label, int) and cell.info.classes:
                where = f"{cell.attack.label} on {cell.dataset.label}"
                lines[f"  {name:11} {where}: class {cell.info.describe_class(label)}"] = None
    return list(lines)


@click.command("run")
@file_argument
@results_option
@only_option
@selection_options
@click.option(
    "-j",
    "--slots",
    type=click.IntRange(min=1),
    help="Jobs at the same time (default: one per core, or one per GPU); on a CPU they share its threads.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("-x", "fail_fast", is_flag=True, help="Stop after the first failure.")
@click.option("--maxfail", type=click.IntRange(min=1), help="Stop after this many failures.")
@click.option("-q", "--quiet", is_flag=True, help="Print only failures and the table.")
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
    """Run the missing cells of a benchmark file (default: benchmark.yaml) and print its matrix.

    A run that was stopped continues where it stopped.
    """
    from backdoor_bench_none.contracts.context import choose_device
    from backdoor_bench_none.planning.plan import make_plan
    from backdoor_bench_none.report.tables import open_console, print_matrix
    from backdoor_bench_none.results.rows import make_rows
    from backdoor_bench_none.run.progress import Bars, Lines
    from backdoor_bench_none.run.runner import Options, run_plan

    if device not in ("auto", "cpu"):
        choose_device(device)
    path = find_file(file)
    registry = open_registry(path)
    plan = selection.apply(make_plan(path, registry, need_data=True))
    folder = results or plan.config.results
    console = open_console()
    reporter = Lines(console, quiet)
    if console.is_terminal and not quiet:
        reporter = Bars(console)
    options = Options(folder, device, slots, only, 1 if fail_fast else maxfail)
    if not quiet:
        for line in describe_data(plan):
            say(line)
    summary = run_plan(plan, registry, options, reporter)
    print_matrix(make_rows(plan, folder), console)
    for line in describe_summary(summary, file, folder):
        say(line)
    if summary.interrupted:
        return ExitCode.INTERRUPTED
    return ExitCode.CELLS_FAILED if summary.failed else ExitCode.OK


def describe_summary(summary: Summary, file: Path | None, folder: Path) -> list[str]:
    """The failed cells, how many cells ended how, and the command to type next."""
    results = None if folder == Path("results") else folder
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
    """`command` with the benchmark file and the results folder of this call."""
    words = [command]
    if file is not None:
        words.append(str(file))
    if results is not None:
        words += ["--results", str(results)]
    return " ".join(words)
