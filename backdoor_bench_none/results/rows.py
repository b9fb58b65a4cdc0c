"""The rows of tables: one for each combination of the axes, over its seeds."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backdoor_bench_none.contracts.cell import AXES
from backdoor_bench_none.contracts.measures import defense_effectiveness
from backdoor_bench_none.maths.statistics import Interval, spread_over_seeds, wilson_interval
from backdoor_bench_none.planning.stage_table import record_key
from backdoor_bench_none.results.index import read_measurements
from backdoor_bench_none.results.measurement import Measurement
from backdoor_bench_none.results.metrics import METRICS

if TYPE_CHECKING:
    from backdoor_bench_none.planning.plan import Plan

#: the labels of all axes
Labels = tuple[str, ...]
BASELINE = "no_defense"
DEFENSE = AXES.index("defense")


@dataclass(frozen=True)
class Row:
    """Means over `seeds`, the seeds with results; shares are fractions of 1, seconds those of the defense alone.

    `deviations` are standard deviations over two or more seeds. `intervals` are at 95 %: Student's t over seeds, cut to
    0 to 1 for shares, or for a single seed Wilson's over test images, which leaves out the variation between trainings.
    `per_seed` holds the values behind the means. `cost_ratio` is the time to a defended network divided by that of one
    undefended training. `status` is done; partial if some seeds have no results; failed, timeout, skipped or missing if
    none has. `reason` says why.
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
    tpr_at_1_fpr: float | None = None
    seconds: float | None = None
    cost_ratio: float | None = None
    peak_memory: float | None = None
    clean_fraction: float | None = None
    sees_ground_truth: bool = False
    is_baseline: bool = False
    #: whether the defense returned the victim as it was, in one seed or more
    unchanged: bool = False
    keys: list[str] = field(default_factory=list)
    deviations: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, Interval] = field(default_factory=dict)
    per_seed: dict[str, list[float | None]] = field(default_factory=dict)
    #: name and parameters of each component, by axis
    components: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """All fields, as JSON values."""
        return asdict(self)

    @property
    def rest(self) -> Labels:
        """The labels of all axes but the defense, which rows to be compared have in common."""
        return without_defense(tuple(getattr(self, axis) for axis in AXES))


@dataclass(frozen=True)
class _Slot:
    """One seed of one row: its measurement, or why there is none."""

    labels: Labels
    seed: int
    measured: Measurement | None
    #: distinguishes rows with equal labels
    identity: str = ""
    reason: str | None = None
    is_baseline: bool = False


def make_rows(plan: Plan, results: Path) -> list[Row]:
    """The rows of a plan, in its order; cells without a record are `missing`."""
    known = {measured.key: measured for measured in read_measurements(results)}
    slots = []
    for cell in plan.cells:
        labels, key = tuple(cell.choices[axis].label for axis in AXES), record_key(cell)
        is_baseline = cell.defense.name == BASELINE
        slots.append(_Slot(labels, cell.seed, known.get(key), "", plan.skipped.get(key), is_baseline))
    return _rows(slots)


def rows_of_measurements(measurements: Iterable[Measurement]) -> list[Row]:
    """The rows of all records of a results folder."""
    slots = [
        _Slot(m.labels, m.seed, m, m.identity, None, f'"defense":{{"name":"{BASELINE}"' in m.names)
        for m in measurements
    ]
    return _rows(sorted(slots, key=lambda slot: (slot.labels, slot.identity, slot.seed)))


def _rows(slots: Sequence[_Slot]) -> list[Row]:
    baselines = {
        (without_defense(s.labels), s.seed): s.measured for s in slots if s.is_baseline and s.measured is not None
    }
    seen: Counter[tuple[Labels, str, int]] = Counter()
    grouped: dict[tuple[Labels, str, int], list[_Slot]] = {}
    for slot in slots:
        again = seen[slot.labels, slot.identity, slot.seed]  # a row holds each seed once, whatever else differs
        seen[slot.labels, slot.identity, slot.seed] += 1
        grouped.setdefault((slot.labels, slot.identity, again), []).append(slot)
    return [_row(labels, group, baselines) for (labels, _, _), group in grouped.items()]


def without_defense(labels: Labels) -> Labels:
    """The labels of all axes but the defense."""
    return (*labels[:DEFENSE], *labels[DEFENSE + 1 :])


def _row(labels: Labels, slots: list[_Slot], baselines: Mapping[tuple[Labels, int], Measurement]) -> Row:
    done = [slot.measured for slot in slots if slot.measured is not None and slot.measured.ba_total is not None]
    values = [_values(measured, baselines.get((without_defense(labels), measured.seed))) for measured in done]
    columns = {name: [value[name] for value in values] for name in METRICS}
    per_seed = {name: column for name, column in columns.items() if any(value is not None for value in column)}
    means, deviations, intervals = _summarize(per_seed, done)
    status, reason = _status(slots, len(done))
    axes: dict[str, Any] = dict(zip(AXES, labels, strict=True))
    components = json.loads(done[0].names) if done else {}
    return Row(
        **axes, **means, seeds=[measured.seed for measured in done], status=status, reason=reason,
        sees_ground_truth=any(measured.sees_ground_truth for measured in done),
        is_baseline=any(slot.is_baseline for slot in slots), unchanged=any(measured.unchanged for measured in done),
        keys=[measured.key for measured in done],
        deviations=deviations, intervals=intervals, per_seed=per_seed,
        components=components,
    )  # fmt: skip


def _values(measured: Measurement, baseline: Measurement | None) -> dict[str, float | None]:
    """The values of all metrics for one seed."""
    ba, asr, ra = (measured.rate(name) for name in ("ba", "asr", "ra"))
    return {
        "ba": ba, "asr": asr, "ra": ra, "der": _effectiveness(measured, baseline),
        "tpr": measured.tpr, "fpr": measured.fpr, "auroc": measured.auroc, "tpr_at_1_fpr": measured.tpr_at_1_fpr,
        "seconds": measured.seconds, "cost_ratio": cost_ratio(measured, baseline),
        "peak_memory": measured.peak_memory, "clean_fraction": measured.clean_fraction,
    }  # fmt: skip


def _summarize(
    per_seed: Mapping[str, Sequence[float | None]], done: Sequence[Measurement]
) -> tuple[dict[str, Any], dict[str, float], dict[str, Interval]]:
    means: dict[str, Any] = {}
    deviations, intervals = dict[str, float](), dict[str, Interval]()
    for name, column in per_seed.items():
        spread = spread_over_seeds([value for value in column if value is not None])
        means[name] = spread.mean
        if name == "peak_memory":
            means[name] = max(filter(None, column), default=spread.mean)
        if spread.deviation is not None and spread.interval is not None:
            deviations[name], intervals[name] = spread.deviation, METRICS[name].bound(spread.interval)
    if len(done) == 1:
        for name in ("ba", "asr", "ra"):
            hits, total = getattr(done[0], f"{name}_hits"), getattr(done[0], f"{name}_total")
            if total:
                intervals[name] = wilson_interval(hits, total)
    return means, deviations, intervals


def _status(slots: list[_Slot], done: int) -> tuple[str, str | None]:
    without = [slot for slot in slots if slot.measured is None or slot.measured.ba_total is None]
    if not without:
        return "done", None
    status, reason = _end_of(without[0])
    if done:
        return "partial", reason
    return status, reason


def _end_of(slot: _Slot) -> tuple[str, str | None]:
    """The status and the reason of a seed without results."""
    if slot.reason:
        return "skipped", slot.reason
    if slot.measured is None:
        return "missing", "not run yet"
    return slot.measured.status, slot.measured.reason


def _effectiveness(measured: Measurement, baseline: Measurement | None) -> float | None:
    """DER against the undefended network of the same seed; None for that network itself."""
    if baseline is None or baseline.key == measured.key:
        return None
    ba_before, asr_before = baseline.rate("ba"), baseline.rate("asr")
    ba_after, asr_after = measured.rate("ba"), measured.rate("asr")
    if ba_before is None or asr_before is None or ba_after is None or asr_after is None:
        return None
    return defense_effectiveness((ba_before, asr_before), (ba_after, asr_after))


def cost_ratio(measured: Measurement, baseline: Measurement | None) -> float | None:
    """Seconds to a defended network divided by those of one undefended training, that of `baseline`'s victim.

    The cost of a defense that begins with an ordinary training includes it; that of a repair of a finished network
    does not.
    """
    victim_seconds = measured.victim_seconds
    if not victim_seconds and baseline is not None:
        victim_seconds = baseline.victim_seconds
    if not victim_seconds or measured.seconds is None:
        return None
    seconds = measured.seconds
    if measured.victim_seconds is not None and measured.defense_stage != "post_training":
        seconds += victim_seconds
    return seconds / victim_seconds
