"""Rows of the table: one per combination of the axes, over its seeds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from backdoor_bench_none.cell import AXES
from backdoor_bench_none.evaluation import Count, defense_effectiveness
from backdoor_bench_none.plan import Plan
from backdoor_bench_none.results.record import Record
from backdoor_bench_none.results.store import Store
from backdoor_bench_none.seeds import canonical_json

#: the labels of all axes
Labels = tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """Means over `seeds`, the seeds with numbers; shares are fractions of 1, seconds those of the defense alone.

    `cost_ratio` is the time to a defended network over that of one undefended training. `status` is done, or partial
    when some seeds lack numbers, or what became of all of them: failed, timeout, skipped, missing; `reason` says why.
    """

    dataset: str
    attack: str
    defense: str
    architecture: str
    activation: str
    trainer: str
    seeds: list[int]
    status: str
    reason: str | None = None
    ba: float | None = None
    asr: float | None = None
    ra: float | None = None
    der: float | None = None
    tpr: float | None = None
    fpr: float | None = None
    auroc: float | None = None
    seconds: float | None = None
    cost_ratio: float | None = None
    peak_memory: int | None = None
    clean_fraction: float | None = None
    sees_ground_truth: bool = False

    def as_dict(self) -> dict[str, Any]:
        """All fields, as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class _Slot:
    """One seed of one row: its record, or why there is none."""

    labels: Labels
    seed: int
    record: Record | None
    #: tells rows of equal labels apart
    identity: str = ""
    reason: str | None = None
    is_baseline: bool = False


def make_rows(plan: Plan, store: Store) -> list[Row]:
    """The rows of a plan, in its order; cells without a record are `missing`."""
    slots = []
    for cell in plan.cells:
        labels = tuple(getattr(cell, axis).label for axis in AXES)
        baseline = cell.defense.name == "no_defense"
        slots.append(_Slot(labels, cell.seed, store.read_record(cell.key), "", plan.skipped.get(cell.key), baseline))
    return _rows(slots)


def rows_of_records(records: Iterable[Record]) -> list[Row]:
    """The rows of all records of a results folder."""
    slots = []
    for record in records:
        labels = tuple(record.axes[axis].label for axis in AXES)
        axes = {axis: value.model_dump(exclude={"label"}) for axis, value in record.axes.items()}
        identity = canonical_json([axes, record.recipe, record.upstream.get("dataset_sha256")])
        slots.append(_Slot(labels, record.seed, record, identity, None, record.axes["defense"].name == "no_defense"))
    return _rows(sorted(slots, key=lambda slot: (slot.labels, slot.identity, slot.seed)))


def _rows(slots: Sequence[_Slot]) -> list[Row]:
    baselines = {
        (_without_defense(s.labels), s.seed): s.record for s in slots if s.is_baseline and s.record is not None
    }
    seen: Counter[tuple[Labels, str, int]] = Counter()
    grouped: dict[tuple[Labels, str, int], list[_Slot]] = {}
    for slot in slots:
        again = seen[slot.labels, slot.identity, slot.seed]  # a seed stands once in a row, whatever else differs
        seen[slot.labels, slot.identity, slot.seed] += 1
        grouped.setdefault((slot.labels, slot.identity, again), []).append(slot)
    return [_row(labels, group, baselines) for (labels, _, _), group in grouped.items()]


def _without_defense(labels: Labels) -> Labels:
    return tuple(label for axis, label in zip(AXES, labels, strict=True) if axis != "defense")


def _row(labels: Labels, slots: list[_Slot], baselines: Mapping[tuple[Labels, int], Record]) -> Row:
    done = [slot.record for slot in slots if slot.record is not None and slot.record.counts is not None]
    pairs = [(record, baselines.get((_without_defense(labels), record.seed))) for record in done]
    status, reason = _status(slots, len(done))
    return Row(
        **dict(zip(AXES, labels, strict=True)),
        seeds=[record.seed for record in done],
        status=status,
        reason=reason,
        ba=_mean(done, lambda r: _rate(r.counts and r.counts.benign_accuracy)),
        asr=_mean(done, lambda r: _rate(r.counts and r.counts.attack_success_rate)),
        ra=_mean(done, lambda r: _rate(r.counts and r.counts.robust_accuracy)),
        der=_mean(pairs, lambda pair: _der(*pair)),
        tpr=_mean(done, lambda r: r.detection and r.detection.tpr),
        fpr=_mean(done, lambda r: r.detection and r.detection.fpr),
        auroc=_mean(done, lambda r: r.detection and r.detection.auroc),
        seconds=_mean(done, lambda r: r.costs["defense"].seconds),
        cost_ratio=_mean(pairs, lambda pair: cost_ratio(*pair)),
        peak_memory=max((m for r in done if (m := r.costs["defense"].peak_memory) is not None), default=None),
        clean_fraction=done[0].clean_fraction if done else None,
        sees_ground_truth=any(record.sees_ground_truth for record in done),
    )


def _status(slots: list[_Slot], done: int) -> tuple[str, str | None]:
    without = [slot for slot in slots if slot.record is None or slot.record.counts is None]
    if not without:
        return "done", None
    reasons = [slot.reason or (slot.record.reason if slot.record else "not run yet") for slot in without]
    first = without[0]
    status = "skipped" if first.reason else first.record.status if first.record else "missing"
    return ("partial" if done else status), reasons[0]


def _mean(values: Sequence[Any], of: Callable[[Any], float | None]) -> float | None:
    found = [number for value in values if (number := of(value)) is not None]
    return fmean(found) if found else None


def _rate(count: Count | None) -> float | None:
    return None if count is None else count.rate


def _der(record: Record, baseline: Record | None) -> float | None:
    if baseline is None or baseline.counts is None or record.counts is None or record.key == baseline.key:
        return None
    return defense_effectiveness(baseline.counts, record.counts)


def cost_ratio(record: Record, baseline: Record | None) -> float | None:
    """Seconds to a defended network over those of one undefended training, `baseline`'s victim.

    A defense that begins with an ordinary training bears its cost; a repair of a finished network does not.
    """
    victim = record.costs.get("victim") or (baseline.costs.get("victim") if baseline else None)
    if victim is None or victim.seconds == 0:
        return None
    begins = "victim" in record.costs and record.defense_stage != "post_training"
    return (record.costs["defense"].seconds + (victim.seconds if begins else 0.0)) / victim.seconds
