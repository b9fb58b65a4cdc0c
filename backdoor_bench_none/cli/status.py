"""The verb `bbn status`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

from backdoor_bench_none.cli.options import (
    Selection,
    file_argument,
    read_plan,
    results_option,
    selection_options,
    warn_of_absent,
)
from backdoor_bench_none.cli.output import say
from backdoor_bench_none.errors import ExitCode
from backdoor_bench_none.planning.stage_table import record_key
from backdoor_bench_none.words import plural

if TYPE_CHECKING:
    from backdoor_bench_none.results.measurement import Measurement


@click.command("status")
@file_argument
@results_option
@selection_options
def status_command(file: Path | None, results: Path | None, selection: Selection) -> int:
    """Count the cells of a benchmark file that are done, failed, skipped or left, and name the failed ones."""
    from backdoor_bench_none.executors.slurm import count_states
    from backdoor_bench_none.results.index import read_measurements

    plan, _, folder = read_plan(file, results, selection)
    warn_of_absent(plan)
    known = {measured.key: measured for measured in read_measurements(folder)}
    counts: Counter[str] = Counter()
    failed: list[Measurement] = []
    for key in map(record_key, plan.cells):
        if key in plan.skipped:
            counts["skipped"] += 1
        elif (measured := known.get(key)) is None:
            counts["left"] += 1
        else:
            counts[measured.status] += 1
            if measured.status in ("failed", "timeout"):
                failed.append(measured)
    states = ", ".join(f"{count} {state}" for state, count in counts.items())
    say(f"{plan.config.name}: {plural('cell', len(plan.cells))}, {states}")
    if tasks := count_states(folder):
        say("Slurm tasks: " + ", ".join(f"{count} {state}" for state, count in tasks.items()))
    for measured in failed:
        say(f"{measured.status.upper()} {measured.key}  {measured.title} - {measured.reason}")
    return ExitCode.OK
