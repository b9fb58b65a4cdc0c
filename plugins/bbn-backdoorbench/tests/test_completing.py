"""Exports of cells whose attacks leave less than a record holds, or more, and exports into records that are there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from standins import MODEL, Said

from backdoor_bench_none.api import BenchError, Context, Record, Registry, Stages, Store, make_plan
from bbn_backdoorbench.export import export_attack
from bbn_backdoorbench.reading import read_record

Bbn = Callable[..., Said]
Evaluate = Callable[..., dict[str, Record]]
Write = Callable[..., Path]
REPAIR = "{name: fine_tune, params: {epochs: 1, clean_fraction: 0.5}}"
RESNET = '"backdoorbench:resnet18"'


def train_longer(path: Path) -> None:
    """So that a network of one's own learns enough to be taken."""
    text = path.read_text()
    path.write_text(text.replace("epochs: 1, batch_size: 20, lr: 0.001", "epochs: 6, batch_size: 20, lr: 0.02"))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_defense_completes_the_record_that_it_defends(
    write_record: Write, write_benchmark: Write, evaluate: Evaluate, bbn: Bbn
) -> None:
    """And again: a result of ours is replaced."""
    folder = write_record()
    key = evaluate(write_benchmark(folder, defense=REPAIR))["fine_tune"].key
    before = files(folder)
    for _ in range(2):
        said = bbn("backdoorbench", "export", key, "--output", folder)
        assert said.code == 0, said.err
        after = files(folder)
        assert {name: after[name] for name in before} == before
        assert {name for name in after if name not in before} == {
            f"defense/fine_tune/{name}"
            for name in ("defense_result.pt", "fine_tune_df.csv", "fine_tune_df_summary.csv", "written_by")
        }


@pytest.mark.parametrize("other", ["another network", "another data set", "no record"])
def test_a_defense_is_not_written_into_another_record(
    other: str, write_record: Write, write_benchmark: Write, evaluate: Evaluate, bbn: Bbn
) -> None:
    """The toolbox would take it for a defense of what is there."""
    key = evaluate(write_benchmark(write_record(), defense=REPAIR))["fine_tune"].key

    def mutate(raw: dict[str, Any]) -> None:
        if other == "another network":
            raw["model"]["classifier.1.bias"] = raw["model"]["classifier.1.bias"] + 1
        else:
            raw["clean_data"] = "gtsrb"

    target = Path("elsewhere")
    target.mkdir() if other == "no record" else write_record(mutate, name="../elsewhere")
    before = files(target)
    said = bbn("backdoorbench", "export", key, "--output", target)
    assert said.code == 2
    assert ("is not a record" if other == "no record" else "is a record of another network than") in said.err
    assert files(target) == before


def test_weights_are_written_in_the_order_of_the_network(
    write_record: Write, write_benchmark: Write, evaluate: Evaluate, bbn: Bbn
) -> None:
    """The toolbox gives them names by their place."""
    reverse = write_record(lambda raw: raw.update(model=dict(reversed(raw["model"].items()))))
    records = evaluate(write_benchmark(reverse, defense=f"no_defense, {REPAIR}"))
    assert bbn("backdoorbench", "export", records["fine_tune"].key, "--output", "out").code == 0
    order = list(torchvision.models.get_model(MODEL, weights=None, num_classes=10).state_dict())
    for name in ("attack_result.pt", "defense/fine_tune/defense_result.pt"):
        assert list(torch.load(Path("out") / name, weights_only=False)["model"]) == order


def test_a_record_without_training_set_stays_without_one(
    write_record: Write, write_benchmark: Write, evaluate: Evaluate, bbn: Bbn
) -> None:
    folder = write_record(lambda raw: raw.update(bd_train=None))
    key = evaluate(write_benchmark(folder))["no_defense"].key
    assert bbn("backdoorbench", "export", key, "--output", "out").code == 0
    assert torch.load("out/attack_result.pt", weights_only=False)["bd_train"] is None
    assert not Path("out/bd_train_dataset").exists()
    assert read_record(Path("out")).train is None


@pytest.mark.slow
@pytest.mark.parametrize(("attack", "more"), [("adaptive_blend", ", cover_rate: 0.1"), ("wanet", "")])
def test_samples_without_a_trigger_are_not_taken_for_poison_when_they_come_back(
    attack: str, more: str, write_benchmark: Write, evaluate: Evaluate, bbn: Bbn
) -> None:
    """In a record they are marked as the poisoned ones are."""
    path = write_benchmark(attack=f"{{name: {attack}, params: {{poison_rate: 0.2{more}}}}}", architecture=RESNET)
    train_longer(path)
    record = evaluate(path)["no_defense"]
    assert record.upstream["poisoned_samples"] == 12
    assert bbn("backdoorbench", "export", record.key, "--output", "out").code == 0
    info = torch.load("out/info.pickle", weights_only=True)
    assert info["pratio"] == 0.2
    again = read_record(Path("out"))
    assert again.train is not None
    assert len(again.train.files) == 12 + info["bbn_decoys"]
    assert info["bbn_decoys"] > 0
    assert not again.has_truth


def test_an_imported_record_without_truth_stays_so(
    write_record: Write, write_benchmark: Write, evaluate: Evaluate, bbn: Bbn
) -> None:
    folder = write_record(info=False)
    (folder / "cross_test_dataset").mkdir()
    key = evaluate(write_benchmark(folder))["no_defense"].key
    assert bbn("backdoorbench", "export", key, "--output", "out").code == 0
    assert not read_record(Path("out")).has_truth


def test_what_is_learnt_of_the_truth_later_makes_another_cell(
    write_record: Write, write_benchmark: Write, evaluate: Evaluate
) -> None:
    """Else detection would be scored with samples that were kept before."""
    folder = write_record(info=False)
    path = write_benchmark(folder, defense="none")
    before = evaluate(path)["none"]
    assert before.detection is not None
    assert before.detection.tpr is not None
    torch.save({"attack": "wanet"}, folder / "info.pickle")
    after = evaluate(path)["none"]
    assert after.key != before.key
    assert after.detection is not None
    assert after.detection.tpr is None


def test_an_attack_without_triggered_images_is_no_record(write_benchmark: Write) -> None:
    """BackdoorBench has nothing to measure such an attack on, and we do not read one."""
    path = write_benchmark(attack="clean", architecture=RESNET)
    (cell,) = make_plan(path, Registry.default(path.parent), need_data=True).cells
    stages = Stages(cell, store := Store(Path("results")), Context(torch.device("cpu"), 0))
    store.create()
    with pytest.raises(BenchError, match="clean has no triggered images"):
        export_attack(cell, stages, Path("out"))
    assert not Path("out").exists()


def test_the_real_record_is_defended_and_completed(
    real_record: Path, real_npz: Path, write_benchmark: Write, evaluate: Evaluate, bbn: Bbn
) -> None:
    """Through the matrix: the victim to the count, a repair of it, and that repair in the toolbox's layout."""
    repair = "{name: fine_tune, params: {epochs: 1, clean_fraction: 0.05}}"
    path = write_benchmark(real_record, images=real_npz, defense=f"no_defense, {repair}")
    records = evaluate(path)
    counts = records["no_defense"].counts
    assert counts is not None
    assert counts.attack_success_rate is not None
    assert (counts.benign_accuracy.hits, counts.attack_success_rate.hits, counts.attack_success_rate.total) == (
        118, 264, 264,
    )  # fmt: skip
    assert bbn("backdoorbench", "export", records["fine_tune"].key, "--output", "out").code == 0
    original, written = (torch.load(f / "attack_result.pt", weights_only=False) for f in (real_record, Path("out")))
    for part in ("bd_train", "bd_test"):
        for name in ("original_index_array", "poison_indicator"):
            assert original[part][name].dtype == written[part][name].dtype
            assert np.array_equal(original[part][name], written[part][name])
        labels = [
            {int(index): tuple(map(int, entry["other_info"])) for index, entry in raw[part]["bd_data_container"][
                "data_dict"
            ].items()}
            for raw in (original, written)
        ]  # fmt: skip
        assert labels[0] == labels[1]
    assert all(torch.equal(original["model"][name], tensor) for name, tensor in written["model"].items())
    assert original["model"].keys() == written["model"].keys()
    defended = torch.load("out/defense/fine_tune/defense_result.pt", weights_only=True)["model"]
    artifact = Store(Path("results")).load_artifact("defense", str(records["fine_tune"].upstream["defense"]))
    assert artifact is not None
    assert all(torch.equal(artifact.tensors[f"model.{name}"], tensor) for name, tensor in defended.items())
    assert any(not torch.equal(original["model"][name], tensor) for name, tensor in defended.items())
