"""What a report is made of: rows, and for every seed behind them its record, or why there is none."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
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
#: makes both components, or raises a `BenchError`
MakePair = Callable[[], "tuple[Dataset, Attack]"]


@dataclass(frozen=True)
class Trial:
    """One cell: its labels and names by axis, its seed, and its record; `reason` says why there are no numbers."""

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
    """`groups` are the trials behind each row; `file` is what `bbn run` gets."""

    title: str
    rows: Sequence[Row]
    groups: Sequence[Sequence[Trial]]
    file: Path | None = None
    pairs: Mapping[Pair, MakePair] = field(default_factory=dict)

    @property
    def trials(self) -> list[Trial]:
        """All of them, in the order of the rows."""
        return [trial for group in self.groups for trial in group]


def source_of_plan(plan: Plan, results: Path, file: Path) -> Source:
    """What a benchmark file plans."""
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
    """These records of a results folder; with a registry the attacks on them can be shown."""
    store, measured = Store(results), list(measurements)
    rows = rows_of_measurements(measured)
    trials = [_trial_of_record(m, record) for m in measured if (record := store.read_record(m.key)) is not None]
    pairs: dict[Pair, MakePair] = {}
    for record in (trial.record for trial in trials):
        if record is not None and registry is not None:
            pair = record.axes["dataset"].label, record.axes["attack"].label
            pairs.setdefault(pair, partial(_create_pair, record, registry))
    return Source(f"All records of {results.name}", rows, group_trials(rows, trials), file, pairs)


def _trial_of_cell(cell: Cell, plan: Plan, record: Record | None) -> Trial:
    labels, names = (tuple(getattr(getattr(cell, axis), part) for axis in AXES) for part in ("label", "name"))
    skipped = plan.skipped.get(record_key(cell))
    if record is not None and (record.counts is not None or skipped is None):
        return Trial(labels, names, cell.seed, cell.title, record_key(cell), record.status, record.reason, record)
    status, reason = ("missing", "not run yet") if skipped is None else ("skipped", skipped)
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
    dataset, attack = (registry.create(axis, (v := record.axes[axis]).name, v.params) for axis in ("dataset", "attack"))
    return cast("Dataset", dataset), cast("Attack", attack)


def group_trials(rows: Sequence[Row], trials: Sequence[Trial]) -> list[list[Trial]]:
    """The trials behind each row: those whose keys it names, and those without numbers that are most like them."""
    by_key = {trial.key: trial for trial in trials}
    groups = [[by_key[key] for key in row.keys if key in by_key] for row in rows]
    used = {trial.key for group in groups for trial in group}
    rest: dict[Labels, dict[str, list[Trial]]] = defaultdict(lambda: defaultdict(list))
    for trial in trials:
        if trial.key not in used:
            rest[trial.labels][trial.identity].append(trial)
    places: dict[Labels, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        places[tuple(getattr(row, axis) for axis in AXES)].append(index)
    for labels, found in rest.items():
        for identity, without in found.items():
            groups[_place(places[labels], groups, identity)] += without
    return groups


def _place(places: Sequence[int], groups: Sequence[Sequence[Trial]], identity: str) -> int:
    """Of the rows of equal labels the one of this identity, else one that is still empty, else the last."""
    same = [index for index in places if any(trial.identity == identity for trial in groups[index])]
    empty = [index for index in places if not groups[index]]
    return (same or empty or places)[0 if same or empty else -1]
