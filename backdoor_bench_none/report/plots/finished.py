"""The artifacts of a finished cell: they are read, and never computed again."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from backdoor_bench_none.contracts.context import Context
from backdoor_bench_none.errors import BenchError, ConfigError
from backdoor_bench_none.planning.stage_table import find_stage, record_key, stage_key
from backdoor_bench_none.report.plots.canvas import plain
from backdoor_bench_none.results.store import Artifact, Store
from backdoor_bench_none.run.stages import Stages

if TYPE_CHECKING:
    from backdoor_bench_none.planning.plan import Plan

#: the most cells that an error names
LISTED = 6


class FinishedStages(Stages):
    """The stages of a finished cell; `BenchError` for one whose artifact is missing."""

    def _artifact(self, name: str, compute: Callable[[], Artifact], key: str | None = None) -> Artifact:
        key = key or stage_key(self.cell, name)
        artifact = self._cached.get(name) or self.store.load_artifact(str(find_stage(name).folder), key)
        if artifact is None:
            title = plain(self.cell.title, 100)
            labels = {"-a": self.cell.attack.label, "-d": self.cell.defense.label}
            choice = "".join(f" {option} {shlex.quote(plain(label))}" for option, label in labels.items())
            raise BenchError(
                f"the {name} stage of {title} is not in '{self.store.root}'",
                f"`bbn run --only all{choice} -s {self.cell.seed}` computes it again",
            )
        self._cached[name] = artifact
        return artifact


def open_cell(plan: Plan, store: Store) -> FinishedStages:
    """The one cell of `plan`, which must be done."""
    if len(plan.cells) > 1:
        titles = ", ".join(plain(cell.title, 100) for cell in plan.cells[:LISTED])
        if len(plan.cells) > LISTED:
            titles += f" and {len(plan.cells) - LISTED} more"
        raise ConfigError(
            f"{len(plan.cells)} cells are selected, this picture shows one: {titles}",
            "narrow it down with -a, -d, -m, --activation, --dataset, -s and -k",
        )
    cell = plan.cells[0]
    record = store.read_record(record_key(cell))
    if record is None or record.status != "done":
        state = "has not been run"
        if record is not None:
            state = f"is {record.status}: {plain(record.reason, 100)}"
        raise BenchError(f"{plain(cell.title, 100)} {state}", "`bbn run` computes what the picture shows")
    return FinishedStages(cell, store, Context(torch.device("cpu"), 0))
