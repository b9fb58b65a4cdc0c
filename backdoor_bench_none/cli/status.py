"""bbn status."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import click

from backdoor_bench_none.cli.options import (
    Selection,
    file_argument,
    open_registry,
    results_option,
    selection_options,
    warn_of_absent,
)
from backdoor_bench_none.errors import ExitCode
from backdoor_bench_none.planning.reading import find_file
from backdoor_bench_none.planning.stage_table import record_key


@click.command("status")
@file_argument
@results_option
@selection_options
def status_command(file: Path | None, results: Path | None, selection: Selection) -> int:
    """Count the cells of a benchmark file that are done, failed, skipped and left, and name those that failed."""
    from backdoor_bench_none.planning.plan import make_plan
    from backdoor_bench_none.results.store import Store

    path = find_file(file)
    plan = selection.apply(make_plan(path, open_registry(path)))
    warn_of_absent(plan)
    store = Store(results or plan.config.results)
    records = [None if record_key(cell) in plan.skipped else store.read_record(record_key(cell)) for cell in plan.cells]
    states = ["skipped" if record_key(cell) in plan.skipped else "left" for cell in plan.cells]
    states = [record.status if record is not None else state for record, state in zip(records, states, strict=True)]
    counts = Counter(states)
    click.echo(
        f"{plan.config.name}: {len(plan.cells)} cells, " + ", ".join(f"{n} {state}" for state, n in counts.items())
    )
    for record in records:
        if record is not None and record.status in ("failed", "timeout"):
            click.echo(f"{record.status.upper()} {record.key}  {record.title} - {record.reason}")
    return ExitCode.OK
