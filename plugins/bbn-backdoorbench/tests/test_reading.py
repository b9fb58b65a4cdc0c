"""Records: what is read of them, and every way in which one can be wrong."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from standins import CLASSES, POISONED, TRAIN, stamped

from bbn_backdoorbench.attack import load_weights
from bbn_backdoorbench.networks import SqueezeNet10
from bbn_backdoorbench.reading import RecordError, hash_record, read_images, read_record

WriteRecord = Callable[..., Path]


def entries(raw: dict[str, Any], part: str = "bd_train") -> dict[Any, Any]:
    samples: dict[Any, Any] = raw[part]["bd_data_container"]["data_dict"]
    return samples


def first(raw: dict[str, Any]) -> dict[str, Any]:
    sample: dict[str, Any] = entries(raw)[POISONED[0]]
    return sample


def test_a_record_is_read_whole(write_record: WriteRecord, clean: dict[str, Any], weights: dict[str, Any]) -> None:
    record = read_record(write_record())
    assert (record.model_name, record.num_classes, record.dataset, record.image_size) == (
        "squeezenet1_0", CLASSES, "cifar10", (32, 32, 3),
    )  # fmt: skip
    assert record.info["attack"] == "badnet"
    assert record.has_truth
    assert record.train is not None
    assert record.train.size == TRAIN
    assert record.train.indices.tolist() == POISONED
    assert record.train.labels.tolist() == [0] * len(POISONED)
    assert record.train.true_labels.tolist() == clean["y_train"][POISONED].tolist()
    assert record.test.indices.tolist() == np.flatnonzero(clean["y_test"] != 0).tolist()
    images = read_images(record.train, (3, 32, 32))
    expected = np.stack([stamped(clean["x_train"][index]) for index in POISONED]).transpose(0, 3, 1, 2)
    assert torch.equal(images, torch.from_numpy(expected))
    assert all(torch.equal(record.weights[name], tensor) for name, tensor in weights.items())


def test_a_record_may_be_moved_and_renamed(write_record: WriteRecord, tmp_path: Path) -> None:
    folder = write_record()
    before = hash_record(read_record(folder))
    (tmp_path / "elsewhere").mkdir()
    moved = folder.rename(tmp_path / "elsewhere" / "other name")
    record = read_record(moved)
    assert record.train is not None
    assert len(read_images(record.train, (3, 32, 32))) == len(POISONED)
    assert hash_record(record) == before


def test_the_hash_follows_every_image(write_record: WriteRecord) -> None:
    folder = write_record()
    record = read_record(folder)
    before = hash_record(record)
    path = Path(record.test.files[0])
    pixels = np.asarray(Image.open(path)).copy()
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(path)
    assert hash_record(read_record(folder)) != before


def test_keys_may_be_python_ints_and_weights_have_a_prefix(write_record: WriteRecord) -> None:
    def mutate(raw: dict[str, Any]) -> None:
        raw["bd_train"]["bd_data_container"]["data_dict"] = {int(k): v for k, v in entries(raw).items()}
        raw["model"] = {f"module.{name}": tensor for name, tensor in raw["model"].items()}

    record = read_record(write_record(mutate))
    assert record.train is not None
    assert record.train.indices.tolist() == POISONED
    assert "features.0.weight" in record.weights


def test_no_training_set_and_no_info(write_record: WriteRecord) -> None:
    record = read_record(write_record(lambda raw: raw.update(bd_train=None), info=False))
    assert record.train is None
    assert record.info == {}
    assert record.has_truth


@pytest.mark.parametrize("how", ["info", "folder"])
def test_records_of_attacks_that_control_training_have_no_truth(how: str, write_record: WriteRecord) -> None:
    folder = write_record(info=False)
    if how == "info":
        torch.save({"attack": "wanet"}, folder / "info.pickle")
    else:
        (folder / "cross_test_dataset").mkdir()
    assert not read_record(folder).has_truth


class Malice:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("where", ["attack_result.pt", "info.pickle"])
def test_a_pickle_with_a_command_is_refused_and_named(where: str, write_record: WriteRecord, tmp_path: Path) -> None:
    target = tmp_path / "executed"
    folder = write_record(lambda raw: raw.update(extra=Malice(target)) if where == "attack_result.pt" else None)
    if where == "info.pickle":
        torch.save({"attack": Malice(target)}, folder / "info.pickle")
    with pytest.raises(RecordError, match=rf"(?s){where}.*(posix|nt)\.system.*") as caught:
        read_record(folder)
    assert "nothing was executed" in str(caught.value)
    assert not target.exists()


@pytest.mark.parametrize("name", ["builtins.eval", "torch.jit.load", "PIL.Image.Image"])
def test_any_global_outside_the_list_is_refused(name: str, write_record: WriteRecord) -> None:
    import importlib

    module, _, attribute = name.rpartition(".")
    hostile = getattr(importlib.import_module(module), attribute)
    folder = write_record(lambda raw: raw.update(extra=hostile))
    with pytest.raises(RecordError, match=r"attack_result\.pt' is not unpickled") as caught:
        read_record(folder)
    assert attribute in str(caught.value)


def drop(*path: str) -> Callable[[dict[str, Any]], None]:
    def mutate(raw: dict[str, Any]) -> None:
        part: Any = raw
        for name in path[:-1]:
            part = part[name]
        del part[path[-1]]

    return mutate


#: what is wrong -> how it is made so, what the error says
FAULTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a key is missing": (drop("img_size"), r"lacks img_size"),
    "no container": (drop("bd_train", "bd_data_container"), r"bd_train is not a data set of BackdoorBench"),
    "a defense's file": (lambda raw: [raw.pop(key) for key in ("bd_train", "bd_test")], "lacks bd_train, bd_test"),
    "path with ..": (lambda raw: first(raw).update(path="./record/x/../../y/3/1.png"), "leaves the record"),
    "absolute path": (lambda raw: first(raw).update(path="/etc/bd_train_dataset/3/1.png"), "leaves the record"),
    "windows path": (lambda raw: first(raw).update(path="C:\\x\\3\\1.png"), "leaves the record"),
    "not an image's path": (lambda raw: first(raw).update(path="./record/x/passwd"), "does not end as"),
    "a path to no file": (lambda raw: first(raw).update(path="./record/x/bd_train_dataset/3/999.png"), "is missing"),
    "no labels": (lambda raw: first(raw).pop("other_info"), "lacks its two labels"),
    "label beyond": (lambda raw: first(raw).update(other_info=[10, 3]), "label 10 is none of the 10 classes"),
    "negative label": (lambda raw: first(raw).update(other_info=[0, -1]), "label -1 is none"),
    "index beyond": (
        lambda raw: raw["bd_train"].update(original_index_array=np.array([0, TRAIN])), f"beyond the {TRAIN} images",
    ),
    "negative index": (lambda raw: raw["bd_train"].update(original_index_array=np.array([-1, 0])), "beyond the 60"),
    "index twice": (lambda raw: raw["bd_train"].update(original_index_array=np.array([1, 1])), "occurs twice"),
    "no indices": (lambda raw: raw["bd_train"].update(original_index_array=np.array([0.5])), "not a list of"),
    "odd indicator": (lambda raw: raw["bd_train"].update(poison_indicator=np.full(TRAIN, 0.5)), "not of 0 and 1"),
    "marked without image": (lambda raw: entries(raw).pop(POISONED[0]), "sample 3 is marked .* no image"),
    "no test set": (lambda raw: raw.update(bd_test=None), "bd_test is empty"),
    "no weights": (lambda raw: raw.update(model={}), "not a state dictionary"),
    "weights that are none": (lambda raw: raw.update(model={"a": 1}), "not a state dictionary"),
    "odd classes": (lambda raw: raw.update(num_classes="ten"), "num_classes is 'ten'"),
    "odd size": (lambda raw: raw.update(img_size=(32, 32)), "img_size is"),
    "not square": (lambda raw: raw.update(img_size=(32, 16, 3)), "square images"),
    "huge": (lambda raw: raw.update(img_size=(10**6, 10**6, 3)), "square images"),
    "odd name": (lambda raw: raw.update(model_name=7), "model_name is 7"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_with_its_file(fault: str, write_record: WriteRecord) -> None:
    mutate, message = FAULTS[fault]
    folder = write_record(mutate)
    with pytest.raises(RecordError, match=message) as caught:
        read_record(folder)
    assert str(folder) in str(caught.value)


def test_no_record(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="is not a record"):
        read_record(tmp_path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02}q\x00.", b"nonsense" * 100])
def test_a_file_that_is_no_pickle(content: bytes, write_record: WriteRecord) -> None:
    folder = write_record()
    (folder / "attack_result.pt").write_bytes(content)
    with pytest.raises(RecordError, match=r"attack_result\.pt"):
        read_record(folder)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_file(share: float, write_record: WriteRecord) -> None:
    folder = write_record()
    whole = (folder / "attack_result.pt").read_bytes()
    (folder / "attack_result.pt").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(RecordError, match=r"attack_result\.pt' is truncated, or not a file of torch"):
        read_record(folder)


def test_a_compressed_file_is_no_work_of_torch(write_record: WriteRecord) -> None:
    path = write_record() / "attack_result.pt"
    with zipfile.ZipFile(path) as source:
        parts = {part.filename: source.read(part) for part in source.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name, content in parts.items():
            target.writestr(name, content)
    with pytest.raises(RecordError, match="is compressed"):
        read_record(path.parent)


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_symbolic_link_is_refused(what: str, write_record: WriteRecord, tmp_path: Path) -> None:
    folder = write_record()
    record = read_record(folder)
    assert record.train is not None
    path = Path(record.train.files[0])
    path = path if what == "file" else path.parent
    path.rename(tmp_path / "outside")
    path.symlink_to(tmp_path / "outside")
    with pytest.raises(RecordError, match="symbolic link"):
        read_record(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Image.new("RGB", (16, 16)), "is 16x16, the record says 32x32"),
        (Image.new("RGB", (5000, 5000)), "is 5000x5000"),
        (b"no image", "cannot be read as PNG"),
        (b"", "cannot be read as PNG"),
    ],
)
def test_an_image_that_is_not_what_it_should_be(content: Any, message: str, write_record: WriteRecord) -> None:
    record = read_record(write_record())
    path = Path(record.test.files[2])
    path.write_bytes(content) if isinstance(content, bytes) else content.save(path)
    with pytest.raises(RecordError, match=message) as caught:
        read_images(record.test, (3, 32, 32))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("classifier.1.bias"), r"classifier\.1\.bias is absent"),
        (lambda weights: weights.update({"extra": torch.zeros(1)}), "extra is none of its tensors"),
        (
            lambda weights: weights.update({"classifier.1.bias": torch.zeros(3)}),
            r"classifier\.1\.bias has shape \(3,\)",
        ),
    ],
)
def test_weights_that_do_not_fit(change: Any, message: str, weights: dict[str, Any], tmp_path: Path) -> None:
    from torch import nn

    from backdoor_bench_none.api import ModelSpec

    network = SqueezeNet10().build(ModelSpec(CLASSES, 3, 32, nn.ReLU))
    given = dict(weights)
    change(given)
    with pytest.raises(RecordError, match=message):
        load_weights(network, given, tmp_path / "attack_result.pt")
