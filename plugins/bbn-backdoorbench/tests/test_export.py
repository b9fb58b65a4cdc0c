"""What is exported is read by a reader of its own, written from the format's facts, and comes back bit for bit."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from standins import MODEL, TEST, TRAIN, Said

from backdoor_bench_none.api import Record, Store
from bbn_backdoorbench.reading import read_record

Bbn = Callable[..., Said]
Evaluate = Callable[..., dict[str, Record]]
Write = Callable[..., Path]


def keys(bbn: Bbn) -> dict[str, str]:
    """The key of each defense's cell."""
    lines = [line.split() for line in bbn("plan", "-v").out.splitlines() if "/s0" in line]
    return {line[2].split("/")[2]: line[1] for line in lines}


def defended(key: str) -> dict[str, torch.Tensor]:
    """The weights that our results folder holds for a cell's defense."""
    store = Store(Path("results"))
    record = store.read_record(key)
    assert record is not None
    artifact = store.load_artifact("defense", str(record.upstream["defense"]))
    assert artifact is not None
    return {name[6:]: tensor for name, tensor in artifact.tensors.items() if name.startswith("model.")}


def load(path: Path) -> dict[str, Any]:
    """As the toolbox loads it: without restriction; the file is our own."""
    content: dict[str, Any] = torch.load(path, weights_only=False)
    return content


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_import_none_export_and_back_is_bit_equal(
    write_record: Write, write_benchmark: Write, bbn: Bbn, evaluate: Evaluate
) -> None:
    evaluate(write_benchmark(write_record(), defense="no_defense, none"))
    by_defense = keys(bbn)
    said = bbn("backdoorbench", "export", by_defense["none"], "--output", "record2/ours")
    assert said.code == 0, said.err
    result = load(Path("record2/ours/defense/none/defense_result.pt"))
    assert (result["model_name"], result["num_classes"]) == (MODEL, 10)
    assert equal(result["model"], defended(by_defense["none"]))
    attack = load(Path("record2/ours/attack_result.pt"))
    assert equal(attack["model"], defended(by_defense["no_defense"]))
    # through our own reader, and as an attack again
    again = read_record(Path("record2/ours"))
    assert equal(dict(again.weights), defended(by_defense["no_defense"]))
    original = read_record(Path("record/badnet_1"))
    assert again.train is not None
    assert original.train is not None
    assert again.train.indices.tolist() == original.train.indices.tolist()
    assert again.test.labels.tolist() == original.test.labels.tolist()
    for one, other in zip(again.train.files, original.train.files, strict=True):
        assert np.array_equal(np.asarray(Image.open(one)), np.asarray(Image.open(other)))
    imported = bbn("backdoorbench", "import", "record2/ours", "--npz", "clean.npz", "--results", "results2")
    assert imported.code == 0, imported.err
    before = Store(Path("results")).read_record(by_defense["no_defense"])
    (after,) = Store(Path("results2")).records()
    assert before is not None
    assert after.counts == before.counts


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["all_to_one", "all_to_all"])
def test_our_own_attack_becomes_a_record(
    mode: str, write_benchmark: Write, bbn: Bbn, evaluate: Evaluate, clean: dict[str, Any]
) -> None:
    attack = f"{{name: badnets, params: {{label_mode: {mode}, trigger_kind: static, poison_rate: 0.2}}}}"
    path = write_benchmark(attack=attack, architecture='"backdoorbench:resnet18"')
    path.write_text(
        path.read_text().replace("epochs: 1, batch_size: 20, lr: 0.001", "epochs: 6, batch_size: 20, lr: 0.02")
    )
    evaluate(path)
    (key,) = keys(bbn).values()
    assert bbn("backdoorbench", "export", key, "--output", "out/record/ours").code == 0
    raw = load(Path("out/record/ours/attack_result.pt"))
    assert (raw["data_path"], raw["img_size"], raw["clean_data"]) == ("./data/cifar10", (32, 32, 3), "cifar10")
    for name, labels, size in (("bd_train", clean["y_train"], TRAIN), ("bd_test", clean["y_test"], TEST)):
        part = raw[name]
        order, indicator = part["original_index_array"], part["poison_indicator"]
        assert isinstance(order, np.ndarray)
        assert (order.dtype, indicator.dtype, len(indicator)) == (np.int64, np.float64, size)
        entries = part["bd_data_container"]["data_dict"]
        assert all(type(index) is int for index in entries)
        assert sorted(entries) == np.flatnonzero(indicator).tolist()
        for index, entry in entries.items():
            wanted, true = entry["other_info"]
            assert true == labels[index]
            assert wanted == ((true + 1) % 10 if mode == "all_to_all" else 0)
            assert entry["path"] == f"./record/ours/{name}_dataset/{true}/{index}.png"
            image = np.asarray(Image.open(Path("out") / entry["path"]))
            assert image.shape == (32, 32, 3)
            assert (image[-1, -1] == (255, 0, 0)).all()
    assert raw["bd_train"]["original_index_array"].tolist() == list(range(TRAIN))
    everyone = TEST if mode == "all_to_all" else int((clean["y_test"] != 0).sum())
    assert len(raw["bd_test"]["original_index_array"]) == everyone
    info = load(Path("out/record/ours/info.pickle"))
    assert (info["attack"], info["pratio"], info["model"]) == ("badnets", 0.2, "resnet18")
    assert info["attack_label_trans"] == {"all_to_one": "all2one", "all_to_all": "all2all"}[mode]


def test_the_tables_that_tools_look_for(
    write_record: Write, write_benchmark: Write, bbn: Bbn, evaluate: Evaluate
) -> None:
    evaluate(write_benchmark(write_record(), defense=REPAIR))
    (key,) = keys(bbn).values()
    assert bbn("backdoorbench", "export", key).code == 0
    (folder,) = Path("results/backdoorbench").glob("*/defense/fine_tune")
    with (folder / "fine_tune_df_summary.csv").open() as file:
        rows = {row[""]: row for row in csv.DictReader(file)}
    record = Store(Path("results")).read_record(key)
    assert record is not None
    assert record.counts is not None
    assert set(rows) == {"last", "valid_max", "exist_nan_value"}
    assert float(rows["last"]["test_acc"]) == record.counts.benign_accuracy.rate
    assert record.counts.attack_success_rate is not None
    assert float(rows["last"]["test_asr"]) == record.counts.attack_success_rate.rate
    with (folder / "fine_tune_df.csv").open() as file:
        assert {"epoch", "batch", "test_acc", "test_asr", "test_ra"} <= set(next(csv.DictReader(file)))


REPAIR = "{name: fine_tune, params: {epochs: 1, clean_fraction: 0.5}}"
MLP = "{name: mlp, params: {hidden: 8, depth: 1}}"
REFUSED = {
    "another activation function": ({"architecture": MLP, "activation": "elu"}, "ReLU"),
    "no network of the toolbox": ({"architecture": MLP}, "mlp is not a network of BackdoorBench"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_the_toolbox_would_evaluate_wrongly_is_refused(fault: str, write_benchmark: Write, bbn: Bbn) -> None:
    axes, message = REFUSED[fault]
    write_benchmark(attack="{name: badnets, params: {trigger_kind: static, poison_rate: 0.2}}", **axes)
    (key,) = keys(bbn).values()
    said = bbn("backdoorbench", "export", key)
    assert said.code == 2
    assert message in said.err
    assert not Path("results/backdoorbench").exists()


def test_another_normalisation_is_refused(write_benchmark: Write, bbn: Bbn) -> None:
    path = write_benchmark(attack="{name: badnets, params: {trigger_kind: static, poison_rate: 0.2}}")
    path.write_text(path.read_text().replace('name: "backdoorbench:npz"', "name: npz"))
    (key,) = keys(bbn).values()
    said = bbn("backdoorbench", "export", key)
    assert said.code == 2
    assert "normalises images differently" in said.err


def test_a_cell_without_numbers(write_record: Write, write_benchmark: Write, bbn: Bbn) -> None:
    write_benchmark(write_record())
    (key,) = keys(bbn).values()
    said = bbn("backdoorbench", "export", key)
    assert said.code == 2
    assert "has no results yet" in said.err
    assert "no cell of 'benchmark.yaml' has a key" in bbn("backdoorbench", "export", "zz").err


def test_nothing_that_is_there_is_overwritten(
    write_record: Write, write_benchmark: Write, bbn: Bbn, evaluate: Evaluate
) -> None:
    evaluate(write_benchmark(write_record(), defense=f"no_defense, {REPAIR}"))
    by_defense = keys(bbn)
    bbn("backdoorbench", "export", by_defense["no_defense"], "--output", "ours")
    said = bbn("backdoorbench", "export", by_defense["no_defense"], "--output", "ours")
    assert said.code == 2
    assert "'ours' exists already" in said.err
    theirs = Path("ours/defense/fine_tune")
    theirs.mkdir(parents=True)
    (theirs / "defense_result.pt").write_bytes(b"theirs")
    said = bbn("backdoorbench", "export", by_defense["fine_tune"], "--output", "ours")
    assert said.code == 2
    assert "not written by this package" in said.err
    assert (theirs / "defense_result.pt").read_bytes() == b"theirs"
    assert not list(Path().rglob("*.partial"))
