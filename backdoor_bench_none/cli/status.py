"""The verb `bbn status`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

from backdoor_bench_none.cli.options import (
    Selection,
    file_argument,
    open_registry,
    results_option,
    selection_options,
    warn_of_absent,
)
from backdoor_bench_none.cli.output import say
from backdoor_bench_none.errors import ExitCode
from backdoor_bench_none.planning.reading import find_file
from backdoor_bench_none.planning.stage_table import record_key
from backdoor_bench_none.words import plural

if TYPE_CHECKING:
    from backdoor_bench_none.contracts.record import Record


@click.command("status")
@file_argument
@results_option
@selection_options
def status_command(file: Path | None, results: Path | None, selection: Selection) -> int:
    """Count the cells of a benchmark file that are done, failed, skipped or left, and name the failed ones."""
    from backdoor_bench_none.planning.plan import make_plan
    from backdoor_bench_none.results.store import Store

    path = find_file(file)
    plan = selection.apply(make_plan(path, open_registry(path)))
    warn_of_absent(plan)
    store = Store(results or plan.config.results)
    counts: Counter[str] = Counter()
    failed: list[Record] = []
    for key in map(record_key, plan.cells):
        if key in plan.skipped:
            counts["skipped"] += 1
        elif (record := store.read_record(key)) is None:
            counts["left"] += 1
        else:
            counts[record.status] += 1
            if record.status in ("failed", "timeout"):
                failed.append(record)
    states = ", ".join(f"{count} {state}" for state, count in counts.items())
    say(f"{plan.config.name}: {plural('cell', len(plan.cells))}, {states}")
    for record in failed:
        say(f"{record.status.upper()} {record.key}  {record.title} - {record.reason}")
    return ExitCode.OK
