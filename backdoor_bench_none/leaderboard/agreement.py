"""Compares a submitted record with its cell, with counts computed from its weights, and with a repeated run.

Each function returns the first difference as a message, and an empty text where there is none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from backdoor_bench_none.contracts.cell import AXES, Cell
from backdoor_bench_none.contracts.measures import Counts
from backdoor_bench_none.contracts.record import Record
from backdoor_bench_none.leaderboard.submission import Submission
from backdoor_bench_none.maths.statistics import spread_over_seeds
from backdoor_bench_none.planning.stage_table import artifact_keys, record_key

#: share of the images by which counts of another device or precision may differ
ROUNDING = 0.005
#: a repeated run may differ by three standard deviations over seeds, or by this share
REPEATED = 0.01
#: what decides whether two machines compute equal numbers, as records state it
MACHINE = ("device", "precision", "threads", "libraries")


def compare_with_cell(record: Record, cell: Cell, submission: Submission) -> str:
    """How a record differs from the cell that its key stands for, or from what the submission declares."""
    if record.key != record_key(cell):
        return f"the record's key is {record.key}"
    if record.seed != cell.seed:
        return f"the record is of seed {record.seed}, its key of seed {cell.seed}"
    if record.status != "done" or record.counts is None:
        return f"the record is {record.status}"
    for axis in AXES:
        if fault := _compare_axis(record, cell, axis):
            return fault
    if record.recipe != cell.recipe.model_dump(mode="json"):
        return "the record's recipe is not the cell's"
    for stage, key in artifact_keys(cell).items():
        if record.upstream.get(stage) != key:
            return f"the record's {stage} is {record.upstream.get(stage)}, the cell's {key}"
    recorded = (record.clean_fraction, record.sees_ground_truth, record.defense_stage)
    declared = (submission.clean_fraction, submission.sees_ground_truth, submission.stage)
    if recorded != declared:
        return f"the record says of its defense {recorded}, the submission {declared}"
    return ""


def _compare_axis(record: Record, cell: Cell, axis: str) -> str:
    choice, value = cell.choices[axis], record.axes[axis]
    expected = choice.component.identity()
    recorded = {"revision": value.revision, "params": value.params, **value.content}
    if value.name != choice.name or recorded != expected:
        return f"the record's {axis} is {value.name} {recorded}, the cell's {choice.name} {expected}"
    if value.label != choice.label:
        return f"the record's {axis} is labelled {value.label!r}, the cell's {choice.label!r}"
    return ""


def compare_counts(record: Record, recomputed: Counts, exact: bool) -> str:
    """How the counts of a record differ from those of its weights, beyond `ROUNDING` unless they must be `exact`."""
    assert record.counts is not None
    for name in ("benign_accuracy", "attack_success_rate", "robust_accuracy"):
        recorded, count = getattr(record.counts, name), getattr(recomputed, name)
        if (recorded is None) != (count is None):
            return f"{name}: the record says {recorded}, here it is {count}"
        if recorded is None:
            continue
        allowed = 0 if exact else max(1, round(ROUNDING * count.total))
        if recorded.total != count.total or abs(recorded.hits - count.hits) > allowed:
            said = f"the record says {recorded.hits} of {recorded.total}"
            return f"{name}: {said}, its weights give {count.hits} of {count.total}"
    return ""


def is_made_on(record: Record, machine: Mapping[str, Any]) -> bool:
    """Whether a record states the same device, precision, threads and libraries as `machine`."""
    return all(record.provenance.get(name) == machine[name] for name in MACHINE)


def compare_runs(submitted: Record, repeated: Record, matched: Sequence[Record], exact: bool) -> str:
    """How a repeated run differs from a submitted one.

    Unless shares must be `exact`, they may differ by three standard deviations over the seeds of the `matched` records,
    or by `REPEATED`.
    """
    before, after = _shares(submitted), _shares(repeated)
    if set(before) != set(after):
        return f"submitted {sorted(before)}, run again {sorted(after)}"
    for name, share in before.items():
        allowed = 0.0 if exact else max(3 * _deviation(submitted, name, matched), REPEATED)
        if abs(share - after[name]) > allowed:
            return f"{name}: submitted {share:.2%}, run again {after[name]:.2%}"
    return ""


def _shares(record: Record) -> dict[str, float]:
    """The shares of a record that a repeated run must confirm, by name."""
    shares = {name: count.rate for name, count in record.counts or () if count is not None}
    for name in ("tpr", "fpr"):
        share = getattr(record.detection, name, None)
        if share is not None:
            shares[name] = share
    return shares


def _deviation(record: Record, name: str, matched: Sequence[Record]) -> float:
    """The standard deviation of a share over the seeds of the submitted cell; 0 below two seeds."""
    alike = [_shares(other) for other in matched if other.axes == record.axes]
    rates = [shares[name] for shares in alike if name in shares]
    if not rates:
        return 0.0
    return spread_over_seeds(rates).deviation or 0.0
