"""The record of a cell: counts and costs that survive JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from backdoor_bench_none.contracts.measures import Count, Detection
from backdoor_bench_none.contracts.record import Cost, Failure, Record
from backdoor_bench_none.planning.plan import Plan
from backdoor_bench_none.planning.stage_table import record_key
from backdoor_bench_none.results.store import Store

MakeRecord = Callable[..., Record]


def refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


def test_json_round_trip(make_record: MakeRecord) -> None:
    detection = Detection(true_positive=3, false_positive=1, true_negative=90, false_negative=6, auroc=0.75)
    record = make_record(
        detection=detection, infected=True, metrics={"m.x": 0.5}, extras={"found": [1, "two", None]},
        victim_losses=[2.3, 0.1], upstream={"data": "ab", "poisoned_samples": 9}, warnings=["one"],
        failure=Failure(type="ValueError", message="“quoted”\nlines", traceback="Traceback"),
    ).model_copy(update={"costs": {"defense": Cost(seconds=1.25, peak_memory=2**40)}})  # fmt: skip
    assert Record.model_validate_json(record.model_dump_json(by_alias=True)) == record


def test_the_schema_stands_in_the_file_by_its_alias(make_record: MakeRecord, tmp_path: Path) -> None:
    store, record = Store(tmp_path), make_record()
    store.write_record(record)
    written = json.loads(store.record_path(record.key).read_text())
    assert written["schema"] == 1
    assert "schema_version" not in written


def test_counts_are_stored_and_shares_are_not(make_record: MakeRecord) -> None:
    written = make_record(ba=90, asr=None).model_dump(mode="json", by_alias=True)
    assert written["counts"] == {
        "benign_accuracy": {"hits": 90, "total": 100},
        "attack_success_rate": None,
        "robust_accuracy": None,
    }


@pytest.mark.parametrize("change", [{"schema": 2}, {"unknown": 1}, {"status": "well"}, {"seed": "x"}, {"costs": 1}])
def test_a_record_of_another_shape_is_refused(change: dict[str, Any], make_record: MakeRecord) -> None:
    written = make_record().model_dump(mode="json", by_alias=True)
    with pytest.raises(ValidationError):
        Record.model_validate({**written, **change})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_stay_readable_json(value: float, make_record: MakeRecord, tmp_path: Path) -> None:
    store, record = Store(tmp_path), make_record(metrics={"m.x": value}, extras={"loss": value})
    store.write_record(record)
    json.loads(store.record_path(record.key).read_text(), parse_constant=refuse)
    read = store.read_record(record.key)
    assert read is not None
    assert read.counts == record.counts


def test_a_record_of_a_cell_says_what_took_part(tiny_plan: Callable[..., Plan]) -> None:
    cell = tiny_plan(defense="none").cells[0]
    record = Record.of(cell, record_key(cell), "skipped", reason="because")
    assert (record.key, record.seed, record.reason, record.counts) == (record_key(cell), 0, "because", None)
    assert record.axes["defense"].params["epochs"] == 1
    assert record.axes["attack"].params["target"] == 0
    assert record.axes["dataset"].params == {"image_size": 8}
    assert record.recipe["epochs"] == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"key": "../../outside"},
        {"key": "not hexadecimal"},
        {"seed": 10**30},
        {"clean_fraction": math.inf},
        {"clean_fraction": 1.5},
        {"victim_losses": [2.0, math.nan]},
    ],
)
def test_values_that_no_run_gives_are_refused(fields: dict[str, Any], make_record: MakeRecord) -> None:
    with pytest.raises(ValidationError, match=next(iter(fields))):
        Record.model_validate({**make_record().model_dump(by_alias=True), **fields})


@pytest.mark.parametrize("cost", [{"seconds": math.inf}, {"seconds": -1.0}, {"seconds": 1.0, "peak_memory": 10**30}])
def test_costs_are_finite(cost: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Cost(**cost)


@pytest.mark.parametrize(
    "count", [{"hits": 5, "total": 4}, {"hits": -1, "total": 4}, {"hits": 0, "total": 0}, {"hits": 1, "total": 10**30}]
)
def test_counts_are_possible(count: dict[str, int]) -> None:
    with pytest.raises(ValidationError):
        Count(**count)


def test_the_hash_of_a_file_that_a_component_reads_is_part_of_its_axis(
    tiny_plan: Callable[..., Plan], tmp_path: Path
) -> None:
    """As of a transfer trainer with a file of weights."""
    import torch

    torch.save({"weight": torch.zeros(2)}, tmp_path / "backbone.pth")
    trainer = f"{{name: transfer, params: {{weights: {tmp_path / 'backbone.pth'}}}}}"
    (cell,) = tiny_plan(trainer=trainer, defense="no_defense").cells
    record = Record.of(cell, record_key(cell), "skipped", reason="not run")
    assert len(record.axes["trainer"].content["weights_sha256"]) == 64
    assert Record.model_validate_json(record.model_dump_json(by_alias=True)) == record
