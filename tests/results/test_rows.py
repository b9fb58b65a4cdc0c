"""Rows: means over seeds, what became of seeds without numbers, and what is paired with the undefended network."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from backdoor_bench_none.contracts.measures import Detection
from backdoor_bench_none.contracts.record import Cost, Record
from backdoor_bench_none.planning.plan import Plan
from backdoor_bench_none.planning.stage_table import record_key
from backdoor_bench_none.results.measurement import Measurement
from backdoor_bench_none.results.rows import Row, make_rows, rows_of_measurements
from backdoor_bench_none.results.store import Store

MakeRecord = Callable[..., Record]
TinyPlan = Callable[..., Plan]


@pytest.fixture
def record(make_record: MakeRecord) -> MakeRecord:
    """As `make_record`, each with a key of its own, by defense."""
    keys = (f"{number:016x}" for number in count())
    return lambda defense="none", **fields: make_record(next(keys), axes={"defense": defense}, **fields)


def rows_of_records(records: list[Record]) -> list[Row]:
    return rows_of_measurements(map(Measurement.of, records))


def row_of(records: list[Record], defense: str = "none") -> Row:
    (row,) = [row for row in rows_of_records(records) if row.defense == defense]
    return row


def test_means_over_seeds(record: MakeRecord) -> None:
    row = row_of([record(ba=90, asr=10, seed=2), record(ba=80, asr=40, seed=0), record(ba=70, asr=100, seed=1)])
    assert row.seeds == [0, 1, 2]
    assert (row.ba, row.asr, row.ra) == pytest.approx((0.8, 0.5, 0.5))
    assert (row.status, row.reason) == ("done", None)


def test_detection_is_averaged_over_the_seeds_that_have_it(record: MakeRecord) -> None:
    detection = Detection(true_positive=3, false_positive=10, true_negative=90, false_negative=1, auroc=0.5)
    row = row_of([record(seed=0, detection=detection), record(seed=1)])
    assert (row.tpr, row.fpr, row.auroc) == pytest.approx((0.75, 0.1, 0.5))


def test_peak_memory_is_that_of_the_hungriest_seed(record: MakeRecord) -> None:
    """What a machine must have, which a mean would understate; a seed on which it was not measured does not count."""
    peaks = (100, 400, None)
    costs = [{"defense": Cost(seconds=1.0, peak_memory=peak)} for peak in peaks]
    records = [record(seed=seed).model_copy(update={"costs": cost}) for seed, cost in enumerate(costs)]
    row = row_of(records)
    assert (row.peak_memory, row.per_seed["peak_memory"]) == (400, [100, 400, None])


def test_no_trigger_has_no_attack_success(record: MakeRecord) -> None:
    row = row_of([record("no_defense", asr=None), record(asr=None)])
    assert (row.asr, row.ra, row.der) == (None, None, None)


def test_der_pairs_each_seed_with_its_own_undefended_network(record: MakeRecord) -> None:
    records = [
        record("no_defense", seed=0, ba=90, asr=100), record("no_defense", seed=1, ba=80, asr=60),
        record(seed=0, ba=85, asr=20), record(seed=1, ba=84, asr=70), record(seed=2, ba=1, asr=1),
    ]  # fmt: skip
    # (0.8 - 0.05 + 1) / 2 and (0 - 0 + 1) / 2: neither a higher BA nor a higher ASR counts; seed 2 has no pair
    assert row_of(records).der == pytest.approx((0.875 + 0.5) / 2)
    assert row_of(records, "no_defense").der is None


def test_der_does_not_pair_across_attacks(make_record: MakeRecord) -> None:
    records = [
        make_record("00", axes={"attack": "clean", "defense": "no_defense"}, ba=90, asr=90),
        make_record("01", axes={"attack": "badnets"}, ba=90, asr=0),
    ]
    assert row_of(records).der is None


@pytest.mark.parametrize(
    ("stage", "seconds", "ratio"),
    [
        ("in_training", {"victim": 10.0, "defense": 5.0}, 1.5),
        ("pre_training", {"victim": 10.0, "defense": 5.0}, 1.5),
        ("post_training", {"victim": 10.0, "defense": 5.0}, 0.5),
        ("in_training", {"defense": 30.0}, 1.5),  # from scratch: over the 20 s of the undefended network
    ],
)
def test_cost_ratio(stage: str, seconds: dict[str, float], ratio: float, record: MakeRecord) -> None:
    undefended = record("no_defense", seconds={"victim": 20.0, "defense": 0.1}, defense_stage="post_training")
    assert row_of([undefended, record(defense_stage=stage, seconds=seconds)]).cost_ratio == pytest.approx(ratio)


def test_cost_ratio_from_scratch_needs_the_undefended_network(record: MakeRecord) -> None:
    assert row_of([record(defense_stage="in_training", seconds={"defense": 30.0})]).cost_ratio is None


# what became of the cells of a plan


@pytest.fixture
def rows(tiny_plan: TinyPlan, tmp_path: Path) -> Callable[..., Row]:
    """The row of one defense, two seeds, after these statuses are recorded; None leaves a seed out."""

    def make(*statuses: str | None, skipped: str | None = None) -> Row:
        plan, store = tiny_plan(defense="none", seeds="0, 1"), Store(tmp_path / "results")
        for cell, status in zip(plan.cells, statuses, strict=True):
            if status is not None:
                reason = None if status == "done" else f"it {status}"
                store.write_record(Record.of(cell, record_key(cell), status, reason=reason))  # type: ignore[arg-type]
        reasons = dict.fromkeys((record_key(cell) for cell in plan.cells), skipped) if skipped else {}
        plan = Plan(plan.config, plan.cells, reasons, 0)
        (row,) = make_rows(plan, store.root)
        return row

    return make


@pytest.mark.parametrize("status", ["failed", "timeout", "skipped"])
def test_all_seeds_ended_alike(status: str, rows: Callable[..., Row]) -> None:
    row = rows(status, status)
    assert (row.status, row.reason, row.seeds, row.ba) == (status, f"it {status}", [], None)


def test_nothing_was_run_yet(rows: Callable[..., Row]) -> None:
    row = rows(None, None)
    assert (row.status, row.reason) == ("missing", "not run yet")


def test_the_plan_says_why_a_cell_is_skipped(rows: Callable[..., Row]) -> None:
    row = rows(None, None, skipped="needs CUDA")
    assert (row.status, row.reason) == ("skipped", "needs CUDA")


def test_partial(tiny_plan: TinyPlan, tmp_path: Path, make_record: MakeRecord) -> None:
    plan, store = tiny_plan(defense="none", seeds="0, 1"), Store(tmp_path / "results")
    store.write_record(make_record(record_key(plan.cells[0]), ba=90))
    store.write_record(Record.of(plan.cells[1], record_key(plan.cells[1]), "failed", reason="it broke"))
    (row,) = make_rows(plan, store.root)
    assert (row.status, row.reason, row.seeds, row.ba) == ("partial", "it broke", [0], 0.9)


def test_rows_stand_in_the_order_of_the_plan(tiny_plan: TinyPlan, tmp_path: Path) -> None:
    plan = tiny_plan(attack="clean, badnets", activation="relu, elu", seeds="0, 1")
    rows = make_rows(plan, tmp_path / "results")
    labels = [(row.attack, row.activation, row.defense) for row in rows]
    assert labels == [
        (attack, activation, defense)
        for attack in ("clean", "badnets") for activation in ("relu", "elu") for defense in ("no_defense", "none")
    ]  # fmt: skip


# never a mean over different things


def distinct_seeds(rows: list[Row]) -> bool:
    return all(len(set(row.seeds)) == len(row.seeds) for row in rows)


def test_records_of_other_parameters_are_not_averaged(make_record: MakeRecord) -> None:
    """As they lie in one folder after an edit of the benchmark file."""
    records = [make_record("00", ba=90), make_record("01", ba=10)]
    assert distinct_seeds(rows_of_records(records))


def test_two_blocks_with_equal_labels_are_not_averaged(
    tiny_plan: TinyPlan, tmp_path: Path, make_record: MakeRecord
) -> None:
    from backdoor_bench_none.errors import ConfigError

    include = """
include:
  - dataset: {name: digits, params: {image_size: 8}}
    attack: {name: badnets, params: {poison_rate: 0.2}}
    defense: none
    architecture: {name: mlp, params: {hidden: 16, depth: 1}}
"""
    try:
        plan: Any = tiny_plan(defense="none", rest=include)
    except ConfigError:
        return  # refusing equal labels is as good
    store = Store(tmp_path / "results")
    for cell in plan.cells:
        store.write_record(make_record(record_key(cell)))
    assert distinct_seeds(make_rows(plan, store.root))
