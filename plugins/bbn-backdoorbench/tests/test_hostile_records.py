"""Records that are not what the toolbox writes: odd values, odd files, odd images; and what looks odd and is none."""

from __future__ import annotations

import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from standins import CLASSES, POISONED, Said
from torch import nn

from backdoor_bench_none.api import ModelSpec
from bbn_backdoorbench.attack import load_weights
from bbn_backdoorbench.networks import SqueezeNet10
from bbn_backdoorbench.reading import Part, RecordError, read_images, read_record

WriteRecord = Callable[..., Path]
Raw = dict[str, Any]
PLACE = "./record/x/bd_train_dataset"


def entries(raw: Raw) -> dict[Any, Any]:
    samples: dict[Any, Any] = raw["bd_train"]["bd_data_container"]["data_dict"]
    return samples


def first(raw: Raw) -> dict[str, Any]:
    sample: dict[str, Any] = entries(raw)[POISONED[0]]
    return sample


def train(raw: Raw, **values: object) -> None:
    raw["bd_train"].update(values)


#: what is odd -> how it is made so, what the error says
ODD: dict[str, tuple[Callable[[Raw], object], str]] = {
    "a null byte in a path": (lambda raw: first(raw).update(path=f"{PLACE}/3/\0.png"), "does not end as"),
    "a null byte in a folder": (lambda raw: first(raw).update(path=f"{PLACE}/\0/1.png"), "does not end as"),
    "half a character in a path": (lambda raw: first(raw).update(path=f"{PLACE}/3/\ud800.png"), "does not end as"),
    "a line break in a path": (lambda raw: first(raw).update(path=f"{PLACE}/3/a\nb.png"), "does not end as"),
    "an endless path": (lambda raw: first(raw).update(path=f"{PLACE}/3/{'a' * 5000}.png"), "is missing"),
    "an endless folder": (lambda raw: first(raw).update(path=f"{PLACE}/{'a' * 5000}/1.png"), "is missing"),
    "a path that is a folder": (lambda raw: first(raw).update(path="./record/x/./bd_train_dataset/3"), "not end as"),
    "an infinite label": (lambda raw: first(raw).update(other_info=[float("inf"), 3]), "lacks its two labels"),
    "a fraction as label": (lambda raw: first(raw).update(other_info=[0.5, 3]), "0.5 is not a whole number"),
    "three labels": (lambda raw: first(raw).update(other_info=[0, 3, 3]), "lacks its two labels"),
    "an infinite index": (lambda raw: entries(raw).update({float("inf"): {}}), "bd_train is not a data set"),
    "a fraction as index": (lambda raw: entries(raw).update({3.5: {}}), "3.5 is not a whole number"),
    "a text as index": (lambda raw: entries(raw).update({"3": {}}), "'3' is not a whole number"),
    "an entry that is none": (lambda raw: entries(raw).update({POISONED[0]: None}), "lacks its two labels"),
    "a list of entries": (lambda raw: raw["bd_train"]["bd_data_container"].update(data_dict=[1]), "not a data set"),
    "a part that is a list": (lambda raw: raw.update(bd_train=[1]), "bd_train is not a data set"),
    "indicators that learn": (
        lambda raw: train(raw, poison_indicator=torch.zeros(60, requires_grad=True)), "bd_train is not a data set",
    ),
    "indicators that are texts": (lambda raw: train(raw, poison_indicator=["a"] * 60), "not of 0 and 1"),
    "indicators that are nan": (lambda raw: train(raw, poison_indicator=np.full(60, np.nan)), "not of 0 and 1"),
    "an index of 71 bits": (lambda raw: train(raw, original_index_array=[2**70]), "not a list of indices"),
    "an infinite size": (lambda raw: raw.update(img_size=(float("inf"), 32, 3)), "img_size is"),
    "a fraction as size": (lambda raw: raw.update(img_size=(32.5, 32.5, 3)), "img_size is"),
    "a name that colours the terminal": (lambda raw: raw.update(model_name="\x1b[31mresnet18"), "not a name"),
    "a name of two lines": (lambda raw: raw.update(clean_data="cifar10\nerror: all is well"), "not a name"),
    "a tensor twice": (lambda raw: raw["model"].update({"module.classifier.1.bias": torch.ones(10)}), "tensor twice"),
}  # fmt: skip


@pytest.mark.parametrize("oddity", ODD)
def test_an_odd_value_is_an_error_that_names_the_file(oddity: str, write_record: WriteRecord) -> None:
    mutate, message = ODD[oddity]
    folder = write_record(mutate)
    with pytest.raises(RecordError, match=message) as caught:
        read_record(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("said", [["wanet"], {"wanet": 1}, 7, None, torch.zeros(2)])
def test_an_attack_that_is_no_name_harms_nothing(said: object, write_record: WriteRecord) -> None:
    folder = write_record(info=False)
    torch.save({"attack": said}, folder / "info.pickle")
    assert read_record(folder).has_truth


def test_what_an_attack_calls_itself_does_not_reach_the_terminal_raw(
    write_record: WriteRecord, npz: Path, bbn: Callable[..., Said]
) -> None:
    folder = write_record(info=False)
    torch.save({"attack": "\x1b[31mred\nACC 1.0", "pratio": 0.1}, folder / "info.pickle")
    said = bbn("backdoorbench", "import", folder, "--npz", npz)
    assert said.code == 0, said.err
    assert "attack    pratio 0.1\n" in said.out
    assert "red" not in said.out


@pytest.mark.parametrize("name", ["attack_result.pt", "info.pickle"])
def test_a_file_behind_a_symbolic_link_is_refused(name: str, write_record: WriteRecord, tmp_path: Path) -> None:
    folder = write_record()
    (folder / name).rename(tmp_path / "outside")
    (folder / name).symlink_to(tmp_path / "outside")
    with pytest.raises(RecordError, match=rf"{name}' is a symbolic link"):
        read_record(folder)


def test_a_folder_behind_a_symbolic_link_is_the_users_own_way(write_record: WriteRecord, tmp_path: Path) -> None:
    (tmp_path / "mine").symlink_to(write_record())
    record = read_record(tmp_path / "mine")
    assert record.train is not None
    assert len(read_images(record.train, (3, 32, 32))) == len(POISONED)


def test_records_written_with_numpy_1_are_read(write_record: WriteRecord) -> None:
    """Its arrays name numpy.core where those of numpy 2 name numpy._core."""
    path = write_record() / "attack_result.pt"
    with zipfile.ZipFile(path) as source:
        parts = {part.filename: source.read(part) for part in source.infolist()}
    (pickle,) = (name for name in parts if name.endswith("data.pkl"))
    assert b"cnumpy._core.multiarray\n" in parts[pickle]
    parts[pickle] = parts[pickle].replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as target:
        for name, content in parts.items():
            target.writestr(name, content)
    record = read_record(path.parent)
    assert record.train is not None
    assert record.train.indices.tolist() == POISONED


@pytest.mark.parametrize("kind", ["meta", "sparse", "complex"])
def test_weights_that_are_no_arrays_of_real_numbers(kind: str, weights: dict[str, Any], tmp_path: Path) -> None:
    bias = torch.zeros(10)
    made = {"meta": bias.to("meta"), "sparse": bias.to_sparse(), "complex": bias.to(torch.complex64)}[kind]
    network = SqueezeNet10().build(ModelSpec(CLASSES, 3, 32, nn.ReLU))
    with pytest.raises(RecordError, match=r"attack_result\.pt' .*classifier\.1\.bias is not an array of real numbers"):
        load_weights(network, {**weights, "classifier.1.bias": made}, tmp_path / "attack_result.pt")


def one(path: Path) -> torch.Tensor:
    """The pixels (H, W, C) of one image, as a record's."""
    zero = np.zeros(1, np.int64)
    return read_images(Part(1, zero, zero, zero, (str(path),)), (3, 32, 32))[0].permute(1, 2, 0)


@pytest.fixture
def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "turned", "transparent", "gamma"])
def test_every_png_is_decoded_as_pillow_does(mode: str, noise: Image.Image, tmp_path: Path) -> None:
    """The toolbox reads images with Pillow; `turned` is how a camera was held, which it does not follow."""
    path, options = tmp_path / "1.png", dict[str, Any]()
    image = noise if mode in ("turned", "transparent", "gamma") else noise.convert(mode)
    if mode == "turned":
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = 6
    options |= {"transparent": {"transparency": (1, 2, 3)}, "gamma": {"gamma": 0.3}}.get(mode, {})
    image.save(path, **options)
    with warnings.catch_warnings(), Image.open(path) as read:
        expected = np.asarray(read.convert("RGB"))
    assert torch.equal(one(path), torch.from_numpy(expected.copy()))


def damage(whole: bytes, how: str) -> bytes:
    """A PNG with this fault; it begins and ends as one."""
    start = whole.index(b"IDAT")
    (size,) = struct.unpack(">I", whole[start - 4 : start])
    data, after = whole[start + 4 : start + 4 + size], whole[start + 8 + size :]
    if how == "a flipped bit":
        return whole[: start + 60] + bytes([whole[start + 60] ^ 1]) + whole[start + 61 :]
    if how == "cut":
        return whole[: start + 4 + size // 2] + after
    if how == "no data":
        return whole[: start - 4] + after
    short = zlib.compress(zlib.decompress(data)[:1000])
    chunk = struct.pack(">I", len(short)) + b"IDAT" + short + struct.pack(">I", zlib.crc32(b"IDAT" + short))
    return whole[: start - 4] + chunk + after


@pytest.mark.parametrize("how", ["a flipped bit", "cut", "no data", "too few rows"])
def test_a_damaged_png_is_refused(how: str, noise: Image.Image, tmp_path: Path) -> None:
    path = tmp_path / "1.png"
    noise.save(path)
    path.write_bytes(damage(path.read_bytes(), how))
    with pytest.raises(RecordError, match=r"1\.png' cannot be read as PNG: its data are damaged"):
        one(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_name": "vit_b_16"}, "unknown architecture 'backdoorbench:vit_b_16'"),
        ({"clean_data": "tiny"}, "'tiny' is none of cifar10, cifar100, gtsrb"),
        (
            {"model_name": "resnet18"},
            "the weights in '.*attack_result.pt' do not fit the network that the record names",
        ),
        ({"num_classes": 7}, "label [789] is none of the 7 classes"),
        ({"num_classes": 11}, "has another number of classes: 11, not 10"),
        ({"img_size": (64, 64, 3)}, r"has another shape: \(3, 64, 64\), not \(3, 32, 32\)"),
    ],
)
def test_a_record_that_does_not_fit_is_refused_without_a_result(
    change: dict[str, Any], message: str, write_record: WriteRecord, npz: Path, bbn: Callable[..., Said]
) -> None:
    said = bbn("backdoorbench", "import", write_record(lambda raw: raw.update(change)), "--npz", npz)
    assert said.code == 2, said.err
    assert re.search(message, said.err)
    assert "Traceback" not in said.err
    assert said.out == ""
    assert not list(Path().glob("results/**/*.json"))


@pytest.mark.parametrize("output", ["there.yaml", "nowhere/new.yaml"])
def test_a_file_that_cannot_be_written_is_told_before_anything_is_computed(
    output: str, write_record: WriteRecord, npz: Path, bbn: Callable[..., Said]
) -> None:
    Path("there.yaml").write_text("mine")
    said = bbn("backdoorbench", "import", write_record(), "--npz", npz, "--output", output)
    assert said.code == 2
    assert said.err.startswith(f"error: '{output}' ")
    assert Path("there.yaml").read_text() == "mine"
    assert not Path("results").exists()
