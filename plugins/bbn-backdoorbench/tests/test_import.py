"""Records in our matrix: to the count, and with what they lack."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from standins import CLASSES, POISONED, TEST, Said

from backdoor_bench_none.api import Record, Store

Bbn = Callable[..., Said]
Evaluate = Callable[..., dict[str, Record]]


def test_the_real_record_comes_out_to_the_count(real_record: Path, real_npz: Path, bbn: Bbn, tmp_path: Path) -> None:
    said = bbn("backdoorbench", "import", real_record, "--npz", real_npz, "--output", "again.yaml")
    assert said.code == 0, said.err
    for name, numbers in (
        ("ACC", "0.397306 = 118 of 297"),
        ("ASR", "1.000000 = 264 of 264"),
        ("RA", "0.000000 = 0 of 264"),
    ):
        line = next(line for line in said.out.splitlines() if line.startswith(name))
        assert numbers in line
        assert line.endswith(f"BackdoorBench wrote {numbers.split(' ')[0]}")
    again = bbn("run", "again.yaml")
    assert "1 done before" in again.out
    (record,) = Store(Path("results")).records()
    assert record.counts is not None
    assert record.counts.benign_accuracy.hits == 118
    assert record.upstream["poisoned_samples"] == 150


def test_a_record_in_a_matrix(
    write_record: Callable[..., Path],
    write_benchmark: Callable[..., Path],
    evaluate: Evaluate,
    bbn: Bbn,
    weights: dict[str, Any],
) -> None:
    none = evaluate(write_benchmark(write_record(), defense="no_defense, none"))["none"]
    assert none.status == "done"
    assert none.detection is not None
    assert none.detection.true_positive + none.detection.false_negative == len(POISONED)
    assert none.counts is not None
    assert none.counts.benign_accuracy.total == TEST
    assert "victim" not in none.costs  # nothing was trained here, so there is no cost to compare with
    row = next(row for row in json.loads(bbn("table", "--format", "json").out) if row["defense"] == "none")
    assert row["cost_ratio"] is None
    assert row["attack"] == "record"
    # the victim is the record's network
    store = Store(Path("results"))
    (path,) = (store.root / "artifacts" / "victim").rglob("*.safetensors")
    artifact = store.load_artifact("victim", path.name.split(".")[0])
    assert artifact is not None
    assert artifact.tensors.keys() == weights.keys()
    assert all(torch.equal(artifact.tensors[name], tensor) for name, tensor in weights.items())


def test_samples_that_bear_no_trigger_say_nothing_of_detection(
    write_record: Callable[..., Path], write_benchmark: Callable[..., Path], evaluate: Evaluate
) -> None:
    folder = write_record()
    torch.save({"attack": "wanet"}, folder / "info.pickle")
    record = evaluate(write_benchmark(folder, defense="none"))["none"]
    assert record.detection is not None
    assert (record.detection.tpr, record.detection.auroc, record.detection.tpr_at_1_fpr) == (None, None, None)


def test_a_record_without_training_set_serves_repairs_only(
    write_record: Callable[..., Path], write_benchmark: Callable[..., Path], evaluate: Evaluate
) -> None:
    folder = write_record(lambda raw: raw.update(bd_train=None))
    repair = "{name: fine_tune, params: {epochs: 1, clean_fraction: 0.5}}"
    records = evaluate(write_benchmark(folder, defense=f"no_defense, none, {repair}"))
    assert {name: record.status for name, record in records.items()} == {
        "no_defense": "done", "none": "skipped", "fine_tune": "done",
    }  # fmt: skip
    assert records["none"].reason == "the record has no training set (bd_train is empty), which this defense needs"


@pytest.mark.parametrize(
    ("axes", "reason"),
    [
        ({"architecture": '"backdoorbench:resnet18"'}, "the network of the record is squeezenet1_0"),
        ({"architecture": "mlp"}, "the network of the record is squeezenet1_0"),
        ({"activation": "elu"}, "squeezenet1_0 of BackdoorBench has its own activation functions"),
    ],
)
def test_cells_that_cannot_be_are_skipped_with_a_reason(
    axes: dict[str, str], reason: str, write_record: Callable[..., Path], write_benchmark: Callable[..., Path], bbn: Bbn
) -> None:
    said = bbn("plan", write_benchmark(write_record(), **axes))
    assert said.code == 0, said.err
    assert f"skipped     1: {reason}" in said.out


def test_another_data_set_is_refused_at_its_place(
    write_record: Callable[..., Path], write_benchmark: Callable[..., Path], bbn: Bbn
) -> None:
    path = write_benchmark(write_record())
    path.write_text(path.read_text().replace('name: "backdoorbench:npz"', "name: npz"))
    said = bbn("run", path)
    assert said.code == 2
    assert "benchmark.yaml:5:" in said.err
    assert "has another data set: backdoorbench:cifar10, not npz" in said.err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(y_train=np.roll(a["y_train"], 1), y_test=np.roll(a["y_test"], 1)), "another true label"),
        (lambda a: a.update(x_train=a["x_train"][:-1], y_train=a["y_train"][:-1]), "another number of training images"),
        (lambda a: a.update(x_test=a["x_test"][:-1], y_test=a["y_test"][:-1]), "is of 30 images, the data set has 29"),
    ],
)
def test_other_clean_images_are_noticed(
    change: Any, message: str, write_record: Callable[..., Path], clean: dict[str, Any], bbn: Bbn
) -> None:
    given = dict(clean)
    change(given)
    np.savez("other.npz", **given)
    said = bbn("backdoorbench", "import", write_record(), "--npz", "other.npz")
    assert said.code == 2
    assert message in said.err
    assert "Traceback" not in said.err


def test_import_of_what_is_no_record(bbn: Bbn, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    said = bbn("backdoorbench", "import", tmp_path, "--npz", "x.npz")
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith(f"error: '{tmp_path}' is not a record")
    assert sorted(tmp_path.rglob("*")) == before


def test_an_altered_image_is_another_attack(
    write_record: Callable[..., Path], write_benchmark: Callable[..., Path], evaluate: Evaluate
) -> None:
    folder = write_record()
    path = write_benchmark(folder)
    before = evaluate(path)["no_defense"].key
    image = next((folder / "bd_test_dataset").rglob("*.png"))
    Image.new("RGB", (32, 32)).save(image)
    assert evaluate(path)["no_defense"].key != before


def test_the_record_is_a_contract_keeping_attack(write_record: Callable[..., Path]) -> None:
    from backdoor_bench_none.testing.checks import COMPONENT_CHECKS, run_check
    from backdoor_bench_none.testing.contracts import open_bench
    from bbn_backdoorbench.attack import BackdoorBenchRecord

    attack = BackdoorBenchRecord(record=write_record())
    assert [v for check in COMPONENT_CHECKS if (v := run_check(check, attack, open_bench())).reason] == []


def test_components_are_listed(bbn: Bbn) -> None:
    said = bbn("list")
    for name in (
        "backdoorbench_record",
        "backdoorbench:cifar10",
        "backdoorbench:preactresnet18",
        "backdoorbench:ft-sam",
    ):
        assert f" {name} " in said.out
    assert "backdoorbench" in bbn("--help").out
    assert CLASSES == 10
