"""People's own images: folders named as people name them, and files of every kind, read right or refused by name."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from backdoor_bench_none.contracts.dataset import DatasetInfo, check_info
from backdoor_bench_none.data.folders import find_parts
from backdoor_bench_none.data.pixels import SeveralPicturesWarning
from backdoor_bench_none.data.user import ImageFolder, Npz
from backdoor_bench_none.errors import ConfigError, DatasetError

RED = (200, 30, 30)


def picture(level: int = 120, size: int = 16) -> Image.Image:
    return Image.fromarray(np.full((size, size, 3), level, np.uint8))


def save(path: Path, image: Image.Image | None = None, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or picture()).save(path, **options)
    return path


def fill(folder: Path, count: int = 10, level: int = 120) -> None:
    for index in range(count):
        save(folder / f"{index}.png", picture(level))


def two_classes(folder: Path, names: tuple[str, str] = ("cat", "dog"), count: int = 10) -> Path:
    for label, name in enumerate(names):
        fill(folder / name, count, 60 + 120 * label)
    return folder


# splits


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train", "val"), ("train", "valid"), ("train", "validation"), ("Train", "Test"), ("training", "testing"),
        ("train", "eval"), ("TRAIN", "VAL"), ("Training", "Validation"), ("train", "Evaluation"), ("train", "dev"),
    ],
)  # fmt: skip
def test_a_pair_of_names_is_a_split(train: str, test: str, tmp_path: Path) -> None:
    two_classes(tmp_path / train, count=10)
    two_classes(tmp_path / test, count=3)
    data = ImageFolder(root=tmp_path, image_size=16)
    assert [len(part) for part in data.load()] == [20, 6]
    assert data.info().classes == ("cat", "dog")
    assert f"split into {train} and {test}" in data.reading()[0]


@pytest.mark.parametrize("root", [".", "train"])
def test_a_test_part_inside_the_training_part(root: str, tmp_path: Path) -> None:
    """`root` is the training part itself, or the folder that holds it."""
    two_classes(tmp_path / "train", count=10)
    two_classes(tmp_path / "train" / "val", count=3)
    data = ImageFolder(root=tmp_path / root, image_size=16)
    assert [len(part) for part in data.load()] == [20, 6]
    assert "val inside the training part" in data.reading()[0]


def test_one_of_several_test_parts_is_used_and_the_others_are_named(tmp_path: Path) -> None:
    for name, count in (("train", 10), ("val", 3), ("test", 4)):
        two_classes(tmp_path / name, count=count)
    data = ImageFolder(root=tmp_path, image_size=16)
    assert len(data.load()[1]) == 8
    assert "val not used" in data.reading()[0]


def test_two_classes_that_look_like_a_split(tmp_path: Path) -> None:
    """A train and a test: vehicles and exams."""
    two_classes(tmp_path, ("train", "test"))
    with pytest.raises(DatasetError, match="may be a split or two classes: train and test hold images") as caught:
        ImageFolder(root=tmp_path).prepare()
    assert caught.value.hint == "say `layout: split` or `layout: classes`"
    assert ImageFolder(root=tmp_path, layout="classes").info().classes == ("test", "train")
    with pytest.raises(DatasetError, match="no class folders"):
        ImageFolder(root=tmp_path, layout="split").prepare()


def test_a_split_beside_other_classes_is_ambiguous(tmp_path: Path) -> None:
    for name in ("train", "test"):
        two_classes(tmp_path / name)
    fill(tmp_path / "bus")
    with pytest.raises(DatasetError, match="bus beside them hold images"):
        ImageFolder(root=tmp_path).prepare()
    assert ImageFolder(root=tmp_path, layout="classes").info().num_classes == 3
    assert ImageFolder(root=tmp_path, layout="split").info().classes == ("cat", "dog")
    (tmp_path / "bus").rename(tmp_path / ".bus")
    assert ImageFolder(root=tmp_path).info().classes == ("cat", "dog")


def test_a_class_named_like_a_part_is_a_class(tmp_path: Path) -> None:
    two_classes(tmp_path, ("train", "plane"))
    assert ImageFolder(root=tmp_path).info().classes == ("plane", "train")


def test_two_training_parts(tmp_path: Path) -> None:
    for name in ("train", "training", "val"):
        two_classes(tmp_path / name)
    with pytest.raises(DatasetError, match=r"train and training .* both training parts"):
        ImageFolder(root=tmp_path).prepare()


def test_a_split_that_is_not_there(tmp_path: Path) -> None:
    two_classes(tmp_path)
    with pytest.raises(DatasetError, match="has no training part"):
        ImageFolder(root=tmp_path, layout="split").prepare()
    assert find_parts(tmp_path, "auto").test is None


# files that are none of the data


def test_hidden_files_and_folders_are_ignored(tmp_path: Path) -> None:
    two_classes(tmp_path)
    expected = ImageFolder(root=tmp_path).files()
    fill(tmp_path / ".ipynb_checkpoints")
    fill(tmp_path / "cat" / ".ipynb_checkpoints")
    fill(tmp_path / "__MACOSX")
    for name in ("._0.png", ".DS_Store", "Thumbs.db", "desktop.ini"):
        (tmp_path / "cat" / name).write_bytes(b"\0\5\26\7")
    data = ImageFolder(root=tmp_path)
    assert data.files() == expected
    assert not any("left out" in line for line in data.reading())


def test_files_that_are_no_images_are_counted(tmp_path: Path) -> None:
    two_classes(tmp_path)
    for name in ("notes.txt", "more.TXT", "labels.csv", "README"):
        (tmp_path / "dog" / name).write_text("text")
    reading = ImageFolder(root=tmp_path).reading()
    assert reading[-1] == "left out, since they are no images here: 2 .txt, 1 .csv, 1 without an ending"


def test_a_class_without_images_says_what_it_holds(tmp_path: Path) -> None:
    two_classes(tmp_path)
    (tmp_path / "fish").mkdir()
    with pytest.raises(DatasetError, match=r"class 'fish' in .* has no images"):
        ImageFolder(root=tmp_path).prepare()
    for index in range(3):
        (tmp_path / "fish" / f"{index}.heic").write_bytes(b"x")
    with pytest.raises(DatasetError, match=r"has no images; it holds 3 \.heic"):
        ImageFolder(root=tmp_path).prepare()


def test_a_folder_that_links_to_itself(tmp_path: Path) -> None:
    two_classes(tmp_path)
    (tmp_path / "cat" / "again").symlink_to(tmp_path / "cat")
    assert len(ImageFolder(root=tmp_path).files()) in (20, 30)  # its images once, or once more through the link


# names of classes


def test_numbers_are_sorted_as_numbers(tmp_path: Path) -> None:
    for label in range(12):
        fill(tmp_path / str(label), 5, 20 * label)
    data = ImageFolder(root=tmp_path, image_size=16)
    train, _ = data.load()
    assert data.info().classes == tuple(map(str, range(12)))
    assert train.images[train.labels == 2].unique().tolist() == [40]


def test_mixed_names_are_sorted_as_texts(tmp_path: Path) -> None:
    for name in ("10", "9", "a"):
        fill(tmp_path / name)
    assert ImageFolder(root=tmp_path).info().classes == ("10", "9", "a")


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    for label, name in enumerate((b"caf\xe9", b"th\xe9")):
        folder = os.path.join(os.fsencode(tmp_path), name)
        os.makedirs(folder)
        for index in range(12):
            picture(60 + 120 * label).save(os.path.join(folder, b"%d.png" % index), "PNG")
    data = ImageFolder(root=tmp_path, image_size=16)
    assert data.info().classes == ("caf\\udce9", "th\\udce9")
    assert len(data.fingerprint()) == 64
    assert data.load()[0].images.unique().tolist() == [60, 180]


@pytest.mark.parametrize(("target", "label"), [("dog", 1), ("cat", 0), (1, 1)])
def test_a_class_is_given_by_name(target: object, label: int, tmp_path: Path) -> None:
    from bbn_attacks.badnets import BadNets

    info = ImageFolder(root=two_classes(tmp_path)).info()
    resolved = BadNets(target=target).resolve(info)  # type: ignore[arg-type]
    assert resolved.target == label
    assert resolved.identity() == BadNets(target=label).resolve(info).identity()


def test_an_unknown_class_has_a_suggestion(tmp_path: Path) -> None:
    from bbn_attacks.badnets import BadNets

    info = ImageFolder(root=two_classes(tmp_path)).info()
    with pytest.raises(ConfigError, match="target 'dgo' is not a class of image_folder") as caught:
        BadNets(target="dgo").resolve(info)
    assert caught.value.hint == "did you mean 'dog'?"
    with pytest.raises(ConfigError, match="target 2 is not a class"):
        BadNets(target=2).resolve(info)


def test_plan_run_and_record_name_the_class(write_benchmark: Callable[..., Path], bbn: Any, tmp_path: Path) -> None:
    two_classes(tmp_path / "mine")
    write_benchmark(
        dataset="{name: image_folder, params: {root: mine, image_size: 16}, as: mine, recipe: {batch_size: 4}}",
        attack="{name: badnets, params: {target: dog, poison_rate: 0.25}}",
        defense="no_defense",
    )
    for verb in ("plan", "run"):
        said = bbn(verb).out
        assert "badnets on mine: class 1 ('dog')" in said
        assert "mine: classes 0 cat, 1 dog" in said
    (path,) = (tmp_path / "results" / "records").glob("*/*.json")
    assert "target=1 ('dog')" in bbn("results", "show", path.stem).out


# pixels


def read(tmp_path: Path, image: Image.Image, ending: str = "png", channels: int = 3, **options: Any) -> torch.Tensor:
    """The one picture of a class whose every file is `image`, as it is read: (C, 16, 16)."""
    for name in ("a", "b"):
        for index in range(10):
            save(tmp_path / name / f"{index}.{ending}", image, **options)
    train, _ = ImageFolder(root=tmp_path, image_size=16, channels=channels).load()
    return train.images[0]


def ramp(dtype: str, highest: float) -> Image.Image:
    return Image.fromarray((np.linspace(0, 1, 256).reshape(16, 16) * highest).astype(dtype))


@pytest.mark.parametrize("ending", ["png", "tif", "tiff"])
@pytest.mark.parametrize("channels", [1, 3])
def test_16_bits_are_scaled_to_8(ending: str, channels: int, tmp_path: Path) -> None:
    got = read(tmp_path, ramp("uint16", 65535), ending, channels)
    assert torch.equal(got, torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16).expand(channels, 16, 16))


def test_12_bits_are_refused_until_white_is_known(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="levels up to 4095 only, nearly black") as caught:
        read(tmp_path, ramp("uint16", 4095))
    assert "`white: 4095`" in str(caught.value.hint)
    train, _ = ImageFolder(root=tmp_path, image_size=16, channels=1, white=4095).load()
    assert (train.images[0].min(), train.images[0].max()) == (0, 255)
    dark, _ = ImageFolder(root=tmp_path, image_size=16, channels=1, white=65535).load()
    assert dark.images.max() == 16
    with pytest.raises(DatasetError, match="0 to 4095, beyond white, which is 1023"):
        ImageFolder(root=tmp_path, image_size=16, white=1023).load()


@pytest.mark.parametrize(("dtype", "highest", "reason"), [
    ("float32", 1.0, "floating-point"), ("int32", 1e6, "beyond white"), ("int32", -5, "beyond white"),
])  # fmt: skip
def test_other_numbers_are_refused_by_name(dtype: str, highest: float, reason: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=rf"\d\.tif cannot be read: .*{reason}"):
        read(tmp_path, ramp(dtype, highest), "tif")


def test_what_is_transparent_becomes_white(tmp_path: Path) -> None:
    hidden = np.zeros((16, 16, 4), np.uint8)
    hidden[:] = (*RED, 0)
    hidden[:8, :, 3] = 255
    got = read(tmp_path, Image.fromarray(hidden))
    assert got[:, :8].amin((1, 2)).tolist() == list(RED)
    assert got[:, 8:].min() == 255


def test_a_transparent_colour_of_a_palette_becomes_white(tmp_path: Path) -> None:
    indexed = Image.fromarray(np.repeat([[0], [1]], 8, 0).repeat(16, 1).astype(np.uint8), "L").convert("P")
    indexed.putpalette([*RED, 0, 0, 0])
    got = read(tmp_path, indexed, transparency=1)
    assert got[:, 2].amax(1).tolist() == list(RED)
    assert got[:, -2].min() == 255


@pytest.mark.parametrize(("mode", "ending"), [
    ("P", "png"), ("CMYK", "jpg"), ("CMYK", "tif"), ("RGB", "jfif"), ("RGB", "gif"), ("RGB", "bmp"), ("RGB", "webp"),
    ("RGB", "JPEG"), ("RGB", "tiff"), ("RGB", "ppm"), ("YCbCr", "jpg"), ("RGBA", "png"), ("RGBX", "tif"),
])  # fmt: skip
def test_kinds_of_files_and_colours(mode: str, ending: str, tmp_path: Path) -> None:
    image = Image.new("RGB", (16, 16), RED).convert(mode)
    format_of = {"jfif": {"format": "JPEG"}}.get(ending, {})
    got = read(tmp_path, image, ending, **format_of).float().mean((1, 2))
    assert (got - torch.tensor(RED)).abs().max() < 8


def test_one_bit(tmp_path: Path) -> None:
    got = read(tmp_path, Image.fromarray(np.eye(16) > 0), channels=1)
    assert torch.equal(got[0], torch.eye(16).to(torch.uint8) * 255)


@pytest.mark.parametrize("tag", range(1, 9))
def test_pictures_are_turned_as_their_tag_says(tag: int, tmp_path: Path) -> None:
    """Stored so that a viewer shows every one of them alike: dark, with a bright corner top left."""
    upright = np.zeros((16, 16), np.uint8)
    upright[:8, :8] = 250
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.T,
        6: np.rot90(upright), 7: upright[::-1, ::-1].T, 8: np.rot90(upright, -1),
    }[tag]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = tag
    got = read(tmp_path, Image.fromarray(stored.copy()), "jpg", channels=1, exif=exif, quality=95)[0].float()
    assert got[1:7, 1:7].mean() > 230
    assert got[9:].mean() < 20
    assert got[:, 9:].mean() < 20


def test_of_an_animation_the_first_picture_is_used_and_it_is_said(tmp_path: Path) -> None:
    two_classes(tmp_path)
    save(tmp_path / "cat" / "moving.gif", picture(250), save_all=True, append_images=[picture(5)])
    with pytest.warns(SeveralPicturesWarning, match="1 file with several pictures"):
        train, test = ImageFolder(root=tmp_path, image_size=16).load()
    assert sum(int((part.images == 250).all((1, 2, 3)).sum()) for part in (train, test)) == 1


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def huge_png() -> bytes:
    """20,000 x 20,000 pixels in its header."""
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


DAMAGED = {
    "no image": lambda path: path.write_bytes(b"no image"),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-30]),
    "huge": lambda path: path.write_bytes(huge_png()),
    "program": lambda path: path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\n"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_file_that_cannot_be_read_is_named(damage: str, tmp_path: Path) -> None:
    two_classes(tmp_path)
    DAMAGED[damage](save(tmp_path / "cat" / "3.png", Image.effect_noise((16, 16), 50)))
    with pytest.raises(DatasetError, match=r"3\.png cannot be read: "):
        ImageFolder(root=tmp_path).load()


def test_pictures_that_are_not_square_are_resized_as_a_whole(tmp_path: Path) -> None:
    wide = np.zeros((16, 64, 3), np.uint8)
    wide[:, 32:] = 255
    got = read(tmp_path, Image.fromarray(wide))
    assert got[:, :, :7].max() == 0
    assert got[:, :, 9:].min() == 255


# sets of classes


def test_a_class_of_one_image(tmp_path: Path) -> None:
    two_classes(tmp_path)
    fill(tmp_path / "fish", 1)
    with pytest.raises(DatasetError, match="cannot divide 21 images"):
        ImageFolder(root=tmp_path).prepare()


def test_a_thousand_classes(tmp_path: Path) -> None:
    for label in range(1000):
        for index in range(2):
            save(tmp_path / f"class{label}" / f"{index}.png", picture(size=8))
    data = ImageFolder(root=tmp_path, image_size=8, test_fraction=0.5)
    assert data.info().num_classes == 1000
    assert "990 more" in data.reading()[2]


# npz


def arrays(**changed: Any) -> dict[str, Any]:
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    labels = np.arange(12) % 3
    return {"x_train": images, "y_train": labels, "x_test": images[:6], "y_test": labels[:6], **changed}


REFUSED = {
    "labels as floats": ({"y_train": np.arange(12) % 3.0}, "float64, not integers"),
    "one-hot labels": ({"y_train": np.eye(3, dtype=int)[np.arange(12) % 3]}, r"shape \(12, 3\)"),
    "labels as texts": ({"y_train": np.array(list("abc") * 4)}, "not integers"),
    "negative labels": ({"y_train": np.arange(12) % 3 - 1}, "labels in y_train are -1, 0, 1"),
    "labels from 1": ({"y_train": np.arange(12) % 3 + 1}, "labels in y_train are 1, 2, 3"),
    "a gap": ({"y_train": np.arange(12) % 3 * 2}, "labels in y_train are 0, 2, 4"),
    "labels beyond": ({"y_test": np.arange(6) % 4}, "y_test has labels that y_train lacks: 3"),
    "one class": ({"y_train": np.zeros(12, int), "y_test": np.zeros(6, int)}, "one class only"),
    "images of 0 to 1": ({"x_train": np.random.rand(12, 8, 8, 3)}, "float64, not uint8"),
    "NaN": ({"x_train": np.full((12, 8, 8, 3), np.nan)}, "float64, not uint8"),
    "16 bits": ({"x_train": np.zeros((12, 8, 8, 3), np.uint16)}, "uint16, not uint8"),
    "truth values": ({"x_train": np.zeros((12, 8, 8, 3), bool)}, "bool, not uint8"),
    "not square": ({"x_train": np.zeros((12, 8, 6, 3), np.uint8)}, "8x6 pixels"),
    "different sizes": ({"x_test": np.zeros((6, 9, 9, 3), np.uint8)}, "give both the same shape|and x_test"),
    "alpha": ({"x_train": np.zeros((12, 8, 8, 4), np.uint8)}, "has the shape"),
    "objects": ({"x_train": np.array([np.zeros((8, 8)), np.zeros((9, 9))] * 6, object)}, "never unpickled"),
    "fewer labels": ({"y_train": np.arange(11) % 3}, "12 images in x_train and 11 labels"),
    "complex": ({"x_train": np.zeros((12, 8, 8, 3), complex)}, "not uint8"),
    "no images": ({"x_train": np.zeros((0, 8, 8, 3), np.uint8), "y_train": np.zeros(0, int)}, "is empty"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_arrays_that_are_refused(what: str, tmp_path: Path) -> None:
    changed, reason = REFUSED[what]
    np.savez(tmp_path / "a.npz", **arrays(**changed))
    with pytest.raises(DatasetError, match=reason) as caught:
        Npz(path=tmp_path / "a.npz").prepare()
    assert caught.value.hint


def test_an_array_that_claims_more_than_it_holds(tmp_path: Path) -> None:
    """Without reading it, which would allocate a terabyte."""
    import zipfile

    from numpy.lib import format as npy

    np.savez(tmp_path / "a.npz", **arrays())
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        for name, content in members.items():
            if name != "y_train.npy":
                archive.writestr(name, content)
        with archive.open("y_train.npy", "w") as member:
            npy.write_array_header_1_0(member, {"descr": "<i8", "fortran_order": False, "shape": (10**12,)})
    with pytest.raises(DatasetError, match=r"y_train\.npy is cut off"):
        Npz(path=tmp_path / "b.npz").prepare()


@pytest.mark.parametrize("order", ["NHWC", "NCHW", "NHW", "NHW1", "N1HW"])
def test_orders_of_the_axes(order: str, tmp_path: Path) -> None:
    change: dict[str, Callable[[Any], Any]] = {
        "NHWC": lambda x: x, "NCHW": lambda x: x.transpose(0, 3, 1, 2), "NHW": lambda x: x[..., 0],
        "NHW1": lambda x: x[..., :1], "N1HW": lambda x: x[..., 0][:, None],
    }  # fmt: skip
    plain = arrays()
    made = {name: change[order](x) if name.startswith("x") else x for name, x in plain.items()}
    np.savez(tmp_path / "a.npz", **made)
    train, _ = Npz(path=tmp_path / "a.npz").load()
    channels = 3 if order in ("NHWC", "NCHW") else 1
    expected = torch.from_numpy(plain["x_train"][..., :channels].transpose(0, 3, 1, 2).copy())
    assert torch.equal(train.images, expected)


def test_a_data_set_that_is_not_square_is_refused_when_planning(write_benchmark: Callable[..., Path], bbn: Any) -> None:
    path = write_benchmark(dataset="wide")
    (path.parent / "bbnfile.py").write_text(
        "from backdoor_bench_none.api import Dataset, DatasetInfo, hookimpl\n"
        "class Wide(Dataset):\n"
        "    'Wide pictures.'\n"
        "    def info(self): return DatasetInfo('wide', (1, 16, 24), 2, train_size=200, mean=(0.4,), std=(0.2,))\n"
        "    def fingerprint(self): return 'ab' * 32\n"
        "@hookimpl\n"
        "def bbn_datasets(): return {'wide': Wide}\n"
    )
    said = bbn("plan")
    assert said.code == 2
    assert "wide has images of 16x24 pixels, and networks take squares" in said.err


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"shape": (3, 16, 16)}, "3 channels, 1 means"), ({"num_classes": 1}, "1 classes"),
        ({"train_size": 0}, "0 training images"), ({"classes": ("a",)}, "2 classes and 1 names"),
    ],
)  # fmt: skip
def test_metadata_that_contradict_themselves(changed: dict[str, Any], reason: str) -> None:
    info = DatasetInfo("x", (1, 16, 16), 2, train_size=10, mean=(0.4,), std=(0.2,))
    check_info(info)
    with pytest.raises(ConfigError, match=reason):
        check_info(replace(info, **changed))


def test_a_plan_says_how_arrays_are_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **arrays())
    assert Npz(path=tmp_path / "a.npz").reading() == ["12 training and 6 test images (3, 8, 8), 3 classes"]
