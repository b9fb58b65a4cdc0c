"""The input of a report: rows, and the cell behind every seed of them, with its record or the reason for none."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, cast

from backdoor_bench_none.contracts.cell import AXES, Cell
from backdoor_bench_none.contracts.record import Record
from backdoor_bench_none.planning.stage_table import record_key
from backdoor_bench_none.results.measurement import Measurement
from backdoor_bench_none.results.rows import Labels, Row, make_rows, rows_of_measurements
from backdoor_bench_none.results.store import Store

if TYPE_CHECKING:
    from backdoor_bench_none.contracts.attack import Attack
    from backdoor_bench_none.contracts.dataset import Dataset
    from backdoor_bench_none.planning.plan import Plan
    from backdoor_bench_none.registry.components import Registry

#: the labels of a data set and of an attack
Pair = tuple[str, str]
#: makes both components, or raises `BenchError`
MakePair = Callable[[], "tuple[Dataset, Attack]"]


@dataclass(frozen=True)
class Trial:
    """One cell: its labels and names by axis, its seed, and its record, or the `reason` why it has no numbers."""

    labels: Labels
    names: Labels
    seed: int
    title: str
    key: str
    status: str
    reason: str | None = None
    record: Record | None = None
    #: tells cells of equal labels apart
    identity: str = ""


@dataclass(frozen=True)
class Source:
    """The rows of a report, and in `groups` the trials behind each row; `file` is the benchmark file for `bbn run`."""

    title: str
    rows: Sequence[Row]
    groups: Sequence[Sequence[Trial]]
    file: Path | None = None
    pairs: Mapping[Pair, MakePair] = field(default_factory=dict)

    @property
    def trials(self) -> list[Trial]:
        """All trials, in the order of the rows."""
        return list(chain.from_iterable(self.groups))


def source_of_plan(plan: Plan, results: Path, file: Path) -> Source:
    """The report's input for the cells that a benchmark file plans."""
    store = Store(results)
    rows = make_rows(plan, results)
    trials = [_trial_of_cell(cell, plan, store.read_record(record_key(cell))) for cell in plan.cells]
    pairs: dict[Pair, MakePair] = {}
    for cell in plan.cells:
        pairs.setdefault((cell.dataset.label, cell.attack.label), partial(_pair_of, cell))
    return Source(plan.config.name, rows, group_trials(rows, trials), file, pairs)


def source_of_records(
    measurements: Iterable[Measurement], results: Path, registry: Registry | None = None, file: Path | None = None
) -> Source:
    """The report's input for some records of a results folder; with a registry, previews of their attacks too."""
    store, measured = Store(results), list(measurements)
    rows = rows_of_measurements(measured)
    trials: list[Trial] = []
    pairs: dict[Pair, MakePair] = {}
    for measurement in measured:
        record = store.read_record(measurement.key)
        if record is None:
            continue
        trials.append(_trial_of_record(measurement, record))
        if registry is not None:
            pair = record.axes["dataset"].label, record.axes["attack"].label
            pairs.setdefault(pair, partial(_create_pair, record, registry))
    return Source(f"All records of {results.name}", rows, group_trials(rows, trials), file, pairs)


def _trial_of_cell(cell: Cell, plan: Plan, record: Record | None) -> Trial:
    labels = tuple(choice.label for choice in cell.choices.values())
    names = tuple(choice.name for choice in cell.choices.values())
    skipped = plan.skipped.get(record_key(cell))
    if record is not None and (record.counts is not None or skipped is None):
        return Trial(labels, names, cell.seed, cell.title, record_key(cell), record.status, record.reason, record)
    status, reason = "missing", "not run yet"
    if skipped is not None:
        status, reason = "skipped", skipped
    return Trial(labels, names, cell.seed, cell.title, record_key(cell), status, reason)


def _trial_of_record(measured: Measurement, record: Record) -> Trial:
    names = tuple(record.axes[axis].name for axis in AXES)
    return Trial(
        measured.labels, names, record.seed, record.title, record.key, record.status, record.reason, record,
        measured.identity,
    )  # fmt: skip


def _pair_of(cell: Cell) -> tuple[Dataset, Attack]:
    return cell.dataset.component, cell.attack.component


def _create_pair(record: Record, registry: Registry) -> tuple[Dataset, Attack]:
    dataset, attack = record.axes["dataset"], record.axes["attack"]
    return (
        cast("Dataset", registry.create("dataset", dataset.name, dataset.params)),
        cast("Attack", registry.create("attack", attack.name, attack.params)),
    )


def group_trials(rows: Sequence[Row], trials: Sequence[Trial]) -> list[list[Trial]]:
    """The trials behind each row: those whose keys it has, and those without numbers that have its labels."""
    by_key = {trial.key: trial for trial in trials}
    groups: list[list[Trial]] = []
    candidates: dict[Labels, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        groups.append([by_key[key] for key in row.keys if key in by_key])
        candidates[tuple(getattr(row, axis) for axis in AXES)].append(index)
    used = {trial.key for trial in chain.from_iterable(groups)}
    without_numbers: dict[tuple[Labels, str], list[Trial]] = defaultdict(list)
    for trial in trials:
        if trial.key not in used:
            without_numbers[trial.labels, trial.identity].append(trial)
    for (labels, identity), group in without_numbers.items():
        groups[_choose_row(candidates[labels], groups, identity)] += group
    return groups


def _choose_row(candidates: Sequence[int], groups: Sequence[Sequence[Trial]], identity: str) -> int:
    """Of rows with equal labels the one of this identity, else one that is still empty, else the last."""
    for index in candidates:
        if any(trial.identity == identity for trial in groups[index]):
            return index
    for index in candidates:
        if not groups[index]:
            return index
    return candidates[-1]
