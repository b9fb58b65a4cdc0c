"""The values of a record that tables need: the columns of the index."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from backdoor_bench_none.contracts.cell import AXES
from backdoor_bench_none.contracts.measures import Counts, Detection
from backdoor_bench_none.contracts.record import Cost, Record
from backdoor_bench_none.seeds import canonical_json


@dataclass(frozen=True, slots=True)
class Measurement:
    """One record as a flat row: labels of its axes, counts, seconds and bytes.

    `names` are the names and parameters of the components by axis, as JSON; `identity` distinguishes records with
    equal labels; `victim_seconds` is None where no victim was trained.
    """

    key: str
    title: str
    status: str
    reason: str | None
    dataset: str
    attack: str
    defense: str
    architecture: str
    activation: str
    trainer: str
    seed: int
    names: str
    identity: str
    ba_hits: int | None = None
    ba_total: int | None = None
    asr_hits: int | None = None
    asr_total: int | None = None
    ra_hits: int | None = None
    ra_total: int | None = None
    tpr: float | None = None
    fpr: float | None = None
    auroc: float | None = None
    tpr_at_1_fpr: float | None = None
    seconds: float | None = None
    victim_seconds: float | None = None
    peak_memory: int | None = None
    clean_fraction: float = 0.0
    defense_stage: str | None = None
    sees_ground_truth: bool = False
    unchanged: bool = False

    @classmethod
    def of(cls, record: Record) -> Self:
        """The measurement of a record."""
        axes = {axis: value.model_dump(exclude={"label"}) for axis, value in record.axes.items()}
        identity = canonical_json([axes, record.recipe, record.upstream.get("dataset_sha256")])
        names = {axis: {"name": value.name, "params": value.params} for axis, value in record.axes.items()}
        values: dict[str, Any] = {
            **{axis: record.axes[axis].label for axis in AXES},
            **_counts(record.counts),
            **_detection(record.detection),
            **_costs(record.costs),
        }
        return cls(
            key=record.key, title=record.title, status=record.status, reason=record.reason, seed=record.seed,
            names=canonical_json(names), identity=hashlib.sha256(identity.encode()).hexdigest()[:16],
            clean_fraction=record.clean_fraction, defense_stage=record.defense_stage,
            sees_ground_truth=record.sees_ground_truth, unchanged=record.unchanged, **values,
        )  # fmt: skip

    def rate(self, name: str) -> float | None:
        """The share `ba`, `asr` or `ra`; None where it was not measured."""
        hits, total = getattr(self, f"{name}_hits"), getattr(self, f"{name}_total")
        if not total:
            return None
        share: float = hits / total
        return share

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of all axes."""
        return tuple(getattr(self, axis) for axis in AXES)

    def as_row(self) -> tuple[Any, ...]:
        """The values in the order of the fields."""
        return tuple(asdict(self).values())


COLUMNS = tuple(field.name for field in fields(Measurement))


def _counts(counts: Counts | None) -> dict[str, int]:
    if counts is None:
        return {}
    rates = {"ba": counts.benign_accuracy, "asr": counts.attack_success_rate, "ra": counts.robust_accuracy}
    columns: dict[str, int] = {}
    for name, count in rates.items():
        if count:
            columns |= {f"{name}_hits": count.hits, f"{name}_total": count.total}
    return columns


def _detection(detection: Detection | None) -> dict[str, float | None]:
    if detection is None:
        return {}
    return {name: getattr(detection, name) for name in ("tpr", "fpr", "auroc", "tpr_at_1_fpr")}


def _costs(costs: Mapping[str, Cost]) -> dict[str, float | int | None]:
    columns: dict[str, float | int | None] = {}
    if (defense := costs.get("defense")) is not None:
        columns |= {"seconds": defense.seconds, "peak_memory": defense.peak_memory}
    if (victim := costs.get("victim")) is not None:
        columns["victim_seconds"] = victim.seconds
    return columns
