"""The data sets: what they say, what they load, and what they say when files are absent or wrong."""

from __future__ import annotations

import gzip
import hashlib
import os
import pickle
import shutil
import struct
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.datasets as tv
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError
from sklearn.datasets import load_digits

from backdoor_bench_none.contracts.component import Incidental
from backdoor_bench_none.contracts.dataset import ImageSet
from backdoor_bench_none.data import digits
from backdoor_bench_none.data.digits import Digits
from backdoor_bench_none.data.image_files import GTSRB, Imagenette, SmallerThanPublishedWarning
from backdoor_bench_none.data.torchvision_sets import CIFAR10, MNIST, FashionMNIST
from backdoor_bench_none.data.user import ImageFolder, Npz
from backdoor_bench_none.errors import DatasetError

Arrays = dict[str, NDArray[Any]]

PUBLISHED = [MNIST, FashionMNIST, CIFAR10, GTSRB, Imagenette]
FOLDER = {
    MNIST: "MNIST/raw",
    FashionMNIST: "FashionMNIST/raw",
    CIFAR10: "cifar-10-batches-py",
    GTSRB: "gtsrb/GTSRB/Training",
    Imagenette: "imagenette2/train",
}
REAL = Path(os.environ.get("BBN_TEST_DATA", "nowhere"))


def real(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not (REAL / name).is_dir(), reason=f"BBN_TEST_DATA names no folder with {name}")


def check(part: ImageSet, shape: tuple[int, ...], classes: int) -> None:
    assert part.images.dtype == torch.uint8
    assert part.labels.dtype == torch.int64
    assert part.images.is_contiguous()
    assert tuple(part.images.shape) == (len(part), *shape)
    assert sorted(set(part.labels.tolist())) == list(range(classes))


def same(first: ImageSet, second: ImageSet) -> bool:
    return torch.equal(first.images, second.images) and torch.equal(first.labels, second.labels)


def some_images(count: int, side: int = 20, channels: int = 3) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, channels), dtype=np.uint8)


def write_image(path: Path, pixels: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.squeeze()).save(path)


# digits


def test_digits_sizes_classes_and_range() -> None:
    train, test = Digits().load()
    assert (len(train), len(test)) == (1297, 500)
    for part in (train, test):
        check(part, (1, 16, 16), 10)
    assert train.images.min() == 0
    assert train.images.max() == 255
    info = Digits().info()
    assert (info.shape, info.num_classes, info.train_size) == ((1, 16, 16), 10, 1297)
    pixels = train.images / 255
    assert pixels.mean().item() == pytest.approx(info.mean[0], abs=1e-3)
    assert pixels.std().item() == pytest.approx(info.std[0], abs=1e-3)


def test_digits_unenlarged_are_scikit_learns_and_in_its_order() -> None:
    digits = load_digits()
    train, test = Digits(image_size=8).load()
    levels = np.rint(digits.images * 255 / 16).astype(np.uint8)
    expected = sorted((label, image.tobytes()) for image, label in zip(levels, digits.target, strict=True))
    both = [
        (int(y), x.numpy().tobytes()) for part in (train, test) for x, y in zip(part.images, part.labels, strict=True)
    ]
    assert sorted(both) == expected
    place = {image.tobytes(): index for index, image in enumerate(levels)}
    for part in (train, test):
        places = [place[image.numpy().tobytes()] for image in part.images]
        assert places == sorted(places)


def test_digits_split_is_stratified_and_fixed() -> None:
    train, test = Digits().load()
    share = test.labels.bincount() / (train.labels.bincount() + test.labels.bincount())
    assert (share - 500 / 1797).abs().max() < 0.01
    again = Digits().load()
    assert same(train, again[0])
    assert same(test, again[1])
    assert Digits().fingerprint() == Digits().fingerprint() != Digits(image_size=8).fingerprint()
    assert Digits().files() == []


@pytest.mark.parametrize("size", [7, 65])
def test_digits_size_has_bounds(size: int) -> None:
    with pytest.raises(ValidationError):
        Digits(image_size=size)


# identity


@pytest.mark.parametrize("kind", PUBLISHED)
def test_root_and_download_stay_out_of_the_identity(kind: Any, tmp_path: Path) -> None:
    assert all(Incidental in kind.model_fields[name].metadata for name in ("root", "download"))
    assert kind().identity() == kind(root=tmp_path, download=False).identity()
    assert set(kind().identity()["params"]) <= {"image_size", "classes"}


@pytest.mark.parametrize("kind", [MNIST, FashionMNIST, CIFAR10])
def test_a_part_of_the_training_set_is_another_data_set_and_the_whole_is_what_it_was(kind: Any) -> None:
    assert kind().identity() == {"revision": 1, "params": {}}
    assert kind(first=100).identity() == {"revision": 1, "params": {"first": 100}}


def test_only_the_place_of_users_files_stays_out_of_the_identity(tmp_path: Path) -> None:
    assert ImageFolder(root=tmp_path).identity() == ImageFolder(root=tmp_path / "b").identity()
    assert ImageFolder(root=tmp_path).identity() != ImageFolder(root=tmp_path, test_fraction=0.3).identity()
    assert Npz(path=tmp_path).identity() == Npz(path=tmp_path / "b").identity()
    assert Npz(path=tmp_path).identity() != Npz(path=tmp_path, flip=True).identity()
    assert GTSRB().identity() != GTSRB(image_size=48).identity()


def test_root_falls_back_on_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BBN_DATA", str(tmp_path))
    assert MNIST().folder() == tmp_path
    assert MNIST(root=tmp_path / "own").folder() == tmp_path / "own"
    monkeypatch.delenv("BBN_DATA")
    assert MNIST().folder() == Path.home() / ".cache" / "backdoor-bench-none" / "data"


def test_what_the_paper_uses(tmp_path: Path) -> None:
    infos = [kind(root=tmp_path).info() for kind in PUBLISHED]
    assert [info.paper_target for info in infos] == [0, 0, 0, 1, 1]
    assert [info.paper_trigger for info in infos] == ["pixel", "pixel", "dynamic", "static", "watermark"]
    assert [info.train_size for info in infos] == [60_000, 60_000, 50_000, 39_209, 9_469]
    assert [info.num_classes for info in infos] == [10, 10, 10, 43, 10]
    assert [info.flip for info in infos] == [False, False, True, False, True]
    assert [info.crop_padding for info in infos] == [0, 0, 4, 4, 4]
    assert all(len(info.mean) == len(info.std) == info.shape[0] for info in infos)


# absent files


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    asked: list[str] = []

    def refuse(request: Any, *args: Any, **kwargs: Any) -> None:
        asked.append(getattr(request, "full_url", request))
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    return asked


@pytest.mark.parametrize("kind", PUBLISHED)
def test_without_network_the_error_says_what_to_put_where(kind: Any, tmp_path: Path, no_network: list[str]) -> None:
    with pytest.raises(DatasetError) as caught:
        kind(root=tmp_path / "new").prepare()
    assert no_network
    assert "no route to host" in caught.value.message
    assert caught.value.hint is not None
    assert str(tmp_path / "new" / FOLDER[kind]) in caught.value.hint


@pytest.mark.parametrize("kind", PUBLISHED)
def test_without_leave_to_download_nothing_is_asked(kind: Any, tmp_path: Path, no_network: list[str]) -> None:
    data = kind(root=tmp_path / "new", download=False)
    for act in (data.prepare, data.files, data.load, data.fingerprint):
        with pytest.raises(DatasetError, match="is not there") as caught:
            act()
        assert str(tmp_path / "new" / FOLDER[kind]) in str(caught.value)
        assert "download: true" in str(caught.value)
    assert no_network == []
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", PUBLISHED)
@pytest.mark.parametrize("download", [True, False])
def test_root_that_is_a_file(kind: Any, download: bool, tmp_path: Path, no_network: list[str]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DatasetError, match="file"):
        kind(root=tmp_path / "file", download=download).prepare()
    with pytest.raises(DatasetError, match="cannot be fetched"):
        kind(root=tmp_path / "file" / "below").prepare()
    assert no_network == []


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 0)() == 0, reason="the superuser may read everything")
@pytest.mark.parametrize("mode", [0o000, 0o600])
def test_root_that_may_not_be_read(mode: int, tmp_path: Path, no_network: list[str]) -> None:
    root = tmp_path / "locked"
    root.mkdir()
    root.chmod(mode)
    try:
        with pytest.raises(DatasetError, match="cannot be read"):
            MNIST(root=root, download=False).prepare()
        with pytest.raises(DatasetError, match="cannot be fetched"):
            MNIST(root=root).prepare()
    finally:
        root.chmod(0o700)


# MNIST's format


def idx(array: NDArray[np.uint8]) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_mnist(
    root: Path, name: str = "MNIST", *, packed: bool = False
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    digits = load_digits()
    images = np.zeros((70, 28, 28), np.uint8)
    images[:, 10:18, 10:18] = digits.images[:70] * 15
    labels = digits.target[:70].astype(np.uint8)
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    for part, chosen in (("train", slice(0, 30)), ("t10k", slice(30, 70))):
        for kind, array in (("images-idx3", images[chosen]), ("labels-idx1", labels[chosen])):
            content = idx(array)
            if packed:
                (raw / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(content))
            else:
                (raw / f"{part}-{kind}-ubyte").write_bytes(content)
    return images, labels


@pytest.mark.parametrize("kind", [MNIST, FashionMNIST])
@pytest.mark.parametrize("packed", [False, True])
def test_mnist_files(kind: Any, packed: bool, tmp_path: Path, no_network: list[str]) -> None:
    images, labels = write_mnist(tmp_path, kind.__name__, packed=packed)
    data = kind(root=tmp_path)
    data.prepare()
    train, test = data.load()
    assert np.array_equal(train.images[:, 0], images[:30])
    assert np.array_equal(test.images[:, 0], images[30:])
    assert np.array_equal(torch.cat([train.labels, test.labels]), labels)
    for part in (train, test):
        check(part, (1, 28, 28), 10)
    assert data.info().train_size == 30
    assert sorted(path.name for path in data.files()) == [
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
    ]
    assert no_network == []


def test_the_first_images_are_taken_in_their_order(tmp_path: Path, no_network: list[str]) -> None:
    images, labels = write_mnist(tmp_path)
    part, whole = MNIST(root=tmp_path, first=12), MNIST(root=tmp_path)
    train, test = part.load()
    assert np.array_equal(train.images[:, 0], images[:12])
    assert np.array_equal(train.labels, labels[:12])
    assert len(test) == 40
    assert (part.info().train_size, part.fingerprint()) == (12, whole.fingerprint())


def test_more_images_than_there_are_cannot_be_asked_for(tmp_path: Path, no_network: list[str]) -> None:
    write_mnist(tmp_path)
    for ask in (MNIST(root=tmp_path, first=31).info, MNIST(root=tmp_path, first=31).load):
        with pytest.raises(DatasetError, match="MNIST has 30 training images, fewer than first = 31"):
            ask()
    with pytest.raises(DatasetError, match=r"CIFAR-10 has 50,000 training images, fewer than first = 50,001"):
        CIFAR10(first=50_001).info()


def test_mnist_fingerprint_follows_every_byte_and_not_the_place(tmp_path: Path) -> None:
    write_mnist(tmp_path / "a")
    write_mnist(tmp_path / "b")
    first, second = MNIST(root=tmp_path / "a"), MNIST(root=tmp_path / "b")
    before = first.fingerprint()
    assert second.fingerprint() == before
    for path in second.files():
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert second.fingerprint() != before
        path.write_bytes(content)
    assert second.fingerprint() == before


def test_mnist_ignores_a_legacy_processed_folder(tmp_path: Path) -> None:
    images, _ = write_mnist(tmp_path)
    processed = tmp_path / "MNIST" / "processed"
    processed.mkdir()
    for name in ("training.pt", "test.pt"):
        torch.save((torch.zeros(3, 28, 28, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64)), processed / name)
    assert np.array_equal(MNIST(root=tmp_path).load()[0].images[:, 0], images[:30])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train-images-idx3-ubyte", b""),
        ("train-images-idx3-ubyte", idx(np.zeros((30, 27, 27), np.uint8))),
        ("train-images-idx3-ubyte", idx(np.zeros((29, 28, 28), np.uint8))),
        ("train-images-idx3-ubyte", idx(np.zeros((30, 28, 28), np.uint8))[:-5]),
        ("t10k-labels-idx1-ubyte", b"no idx"),
        ("t10k-labels-idx1-ubyte", idx(np.full(40, 10, np.uint8))),
        ("train-labels-idx1-ubyte", b"short"),
        ("train-labels-idx1-ubyte", b"not an idx file"),
    ],
)
def test_mnist_damaged_files(name: str, content: bytes, tmp_path: Path) -> None:
    write_mnist(tmp_path)
    (tmp_path / "MNIST" / "raw" / name).write_bytes(content)
    with pytest.raises(DatasetError, match="MNIST"):
        MNIST(root=tmp_path).load()


def test_mnist_damaged_gz(tmp_path: Path) -> None:
    write_mnist(tmp_path, packed=True)
    packed = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte.gz"
    packed.write_bytes(packed.read_bytes()[:100])
    with pytest.raises(DatasetError, match="cannot be fetched"):
        MNIST(root=tmp_path, download=False).prepare()
    assert not packed.with_suffix("").exists()


def test_download_happens_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: list[str]) -> None:
    calls: list[str] = []

    def download(self: Any) -> None:
        calls.append(str(self.root))
        write_mnist(Path(self.root))

    monkeypatch.setattr(tv.MNIST, "download", download)
    data = MNIST(root=tmp_path / "new")
    data.prepare()
    data.prepare()
    assert calls == [str(tmp_path / "new")]
    assert len(data.load()[0]) == 30


@pytest.mark.parametrize("fault", [RuntimeError("md5"), TimeoutError("slow"), EOFError(), ValueError("proxy")])
def test_any_fault_of_a_download_is_reported(fault: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(self: Any) -> None:
        raise fault

    monkeypatch.setattr(tv.CIFAR10, "download", download)
    with pytest.raises(DatasetError, match=str(fault) or "EOFError"):
        CIFAR10(root=tmp_path).prepare()


# CIFAR-10's format


@pytest.fixture
def small_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, NDArray[np.uint8]]:
    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()
    pixels = some_images(120, 32).transpose(0, 3, 1, 2)
    sums: list[list[str]] = []
    for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        rows = pixels[number * 20 : number * 20 + 20].reshape(20, -1)
        content = pickle.dumps({"data": rows, "labels": [i % 10 for i in range(20)]})
        (base / name).write_bytes(content)
        sums.append([name, hashlib.md5(content).hexdigest()])
    content = pickle.dumps({"label_names": [str(i) for i in range(10)]})
    (base / "batches.meta").write_bytes(content)
    meta = {"filename": "batches.meta", "key": "label_names", "md5": hashlib.md5(content).hexdigest()}
    monkeypatch.setattr(tv.CIFAR10, "train_list", sums[:5])
    monkeypatch.setattr(tv.CIFAR10, "test_list", sums[5:])
    monkeypatch.setattr(tv.CIFAR10, "meta", meta)
    return tmp_path, pixels


def test_cifar_files(small_cifar: tuple[Path, NDArray[np.uint8]], no_network: list[str]) -> None:
    root, pixels = small_cifar
    data = CIFAR10(root=root)
    data.prepare()
    train, test = data.load()
    check(train, (3, 32, 32), 10)
    check(test, (3, 32, 32), 10)
    assert np.array_equal(train.images, pixels[:100])
    assert np.array_equal(test.images, pixels[100:])
    assert len(data.files()) == 7
    assert no_network == []


def test_cifar_never_unpickles_what_is_not_published(small_cifar: tuple[Path, NDArray[np.uint8]]) -> None:
    root, _ = small_cifar
    mark = root / "unpickled"

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (mark,)

    (root / "cifar-10-batches-py" / "data_batch_1").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(DatasetError, match="not the published one"):
        CIFAR10(root=root, download=False).prepare()
    with pytest.raises(DatasetError, match="cannot be read"):
        CIFAR10(root=root).load()
    assert not mark.exists()


# GTSRB's format


@pytest.fixture
def small_gtsrb(tmp_path: Path) -> Path:
    base = tmp_path / "gtsrb"
    pixels = some_images(43 * 3)
    lines = ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    for label in range(43):
        for number in range(2):
            # Real signs have sizes of their own.
            image = pixels[3 * label + number][:, : 15 + label % 5]
            write_image(base / "GTSRB" / "Training" / f"{label:05d}" / f"{number:05d}.ppm", image)
        name = f"{42 - label:05d}.ppm"
        write_image(base / "GTSRB" / "Final_Test" / "Images" / name, pixels[3 * label + 2])
        lines.append(f"{name};20;20;0;0;19;19;{label}")
    (base / "GT-final_test.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_gtsrb_files(small_gtsrb: Path, no_network: list[str]) -> None:
    data = GTSRB(root=small_gtsrb, image_size=16)
    with pytest.warns(SmallerThanPublishedWarning, match=r"86 training images.*39,209.*26,640"):
        data.prepare()
    assert data.info().train_size == 86
    assert data.info().shape == (3, 16, 16)
    train, test = data.load()
    for part, split in ((train, "train"), (test, "test")):
        check(part, (3, 16, 16), 43)
        theirs = tv.GTSRB(str(small_gtsrb), split=split)
        for index, (image, label) in enumerate(theirs):
            expected = np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
            assert np.array_equal(part.images[index], expected)
            assert part.labels[index] == label
    assert len(data.files()) == 86 + 43 + 1
    assert no_network == []


def test_gtsrb_whole_does_not_warn(small_gtsrb: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GTSRB, "published", 86)
    GTSRB(root=small_gtsrb).prepare()


def test_gtsrb_without_a_class(small_gtsrb: Path, no_network: list[str]) -> None:
    folder = small_gtsrb / "gtsrb" / "GTSRB" / "Training" / "00007"
    before = GTSRB(root=small_gtsrb).fingerprint()
    folder.rename(folder.with_name("other"))
    with pytest.raises(DatasetError, match="00007"):
        GTSRB(root=small_gtsrb).prepare()
    assert GTSRB(root=small_gtsrb).info().train_size == 39_209
    folder.mkdir()
    with pytest.raises(DatasetError, match="00007"):
        GTSRB(root=small_gtsrb).load()
    folder.rmdir()
    folder.with_name("other").rename(folder)
    assert GTSRB(root=small_gtsrb).fingerprint() == before


def test_gtsrb_damaged_files(small_gtsrb: Path) -> None:
    data = GTSRB(root=small_gtsrb)
    broken = data.files()[5]
    broken.write_bytes(broken.read_bytes()[:30])
    with pytest.raises(DatasetError, match=broken.name):
        data.load()
    data.files()[-2].unlink()
    with pytest.raises(DatasetError, match="is missing"):
        data.files()
    (small_gtsrb / "gtsrb" / "GT-final_test.csv").write_text("a;b\n1;2\n")
    with pytest.raises(DatasetError, match="Filename"):
        data.load()


# Imagenette's format


@pytest.fixture
def small_imagenette(tmp_path: Path) -> Path:
    pixels = some_images(10 * 3, side=40)
    for label, wnid in enumerate(Imagenette.wnids):
        for number, part in enumerate(("train", "train", "val")):
            image = pixels[3 * label + number]
            # The real set has grey pictures, and no squares.
            grey = image[:30, :, 0] if label == 3 else image[:30]
            write_image(tmp_path / "imagenette2" / part / wnid / f"{wnid}_{number}.JPEG", grey)
    return tmp_path


def test_imagenette_files(small_imagenette: Path, no_network: list[str]) -> None:
    data = Imagenette(root=small_imagenette, image_size=24)
    with pytest.warns(SmallerThanPublishedWarning, match=r"20 training images.*9,469"):
        data.prepare()
    assert data.info().train_size == 20
    train, test = data.load()
    for part, split in ((train, "train"), (test, "val")):
        check(part, (3, 24, 24), 10)
        theirs = tv.Imagenette(str(small_imagenette), split=split)
        assert tuple(theirs.wnids) == Imagenette.wnids
        for index, (image, label) in enumerate(theirs):
            expected = np.asarray(image.resize((24, 24), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
            assert np.array_equal(part.images[index], expected)
            assert part.labels[index] == label
    grey = train.images[train.labels == 3]
    assert torch.equal(grey[:, 0], grey[:, 2])
    assert len(data.files()) == 30
    assert no_network == []


def test_imagenette_interrupted_download(small_imagenette: Path, no_network: list[str]) -> None:
    shutil.rmtree(small_imagenette / "imagenette2" / "val")
    with pytest.raises(DatasetError, match="rest of an interrupted download"):
        Imagenette(root=small_imagenette).prepare()


def test_imagenette_fingerprint_sees_a_file_change_sides(small_imagenette: Path) -> None:
    data = Imagenette(root=small_imagenette)
    before = data.fingerprint()
    base = small_imagenette / "imagenette2"
    name = f"{Imagenette.wnids[0]}/{Imagenette.wnids[0]}_1.JPEG"
    (base / "train" / name).rename(base / "val" / name)
    assert data.fingerprint() != before


# image_folder


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    pixels = some_images(30)
    for number, image in enumerate(pixels):
        write_image(tmp_path / "classes" / "abc"[number % 3] / f"{number:02d}.png", image)
    return tmp_path / "classes"


def test_image_folder_divides_one_folder(classes: Path) -> None:
    data = ImageFolder(root=classes, image_size=20, mean=0.4, crop_padding=2)
    data.prepare()
    train, test = data.load()
    assert (len(train), len(test)) == (24, 6)
    check(train, (3, 20, 20), 3)
    assert test.labels.bincount().tolist() == [2, 2, 2]
    assert same(train, data.load()[0])
    pixels = some_images(30).transpose(0, 3, 1, 2)
    order = {image.tobytes(): index for index, image in enumerate(pixels)}
    for part in (train, test):
        places = [order[image.numpy().tobytes()] for image in part.images]
        assert [place % 3 for place in places] == part.labels.tolist()
        assert sorted(places, key=lambda place: (place % 3, place)) == places
    info = data.info()
    assert (info.shape, info.num_classes, info.train_size, info.mean) == ((3, 20, 20), 3, 24, (0.4,) * 3)
    assert (info.crop_padding, info.flip, info.paper_target, info.paper_trigger) == (2, False, 0, "dynamic")
    assert len(data.files()) == 30


@pytest.mark.parametrize("name", ["test", "val"])
def test_image_folder_takes_the_users_split(name: str, classes: Path, tmp_path: Path) -> None:
    shutil.copytree(classes, tmp_path / "set" / "train")
    classes.rename(tmp_path / "set" / name)
    (tmp_path / "set" / name / "a" / "00.png").unlink()
    data = ImageFolder(root=tmp_path / "set", channels=1, image_size=8)
    train, test = data.load()
    assert (len(train), len(test)) == (30, 29)
    check(train, (1, 8, 8), 3)
    before = data.fingerprint()
    (tmp_path / "set" / "train" / "a" / "00.png").rename(tmp_path / "set" / name / "a" / "00.png")
    assert data.fingerprint() != before


def test_image_folder_faults(classes: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="not a folder"):
        ImageFolder(root=tmp_path / "nowhere").prepare()
    with pytest.raises(DatasetError, match="cannot divide 30 images"):
        ImageFolder(root=classes, test_fraction=0.01).prepare()
    with pytest.raises(ValidationError):
        ImageFolder(root=classes, channels=2)  # type: ignore[arg-type]
    (classes / "a" / "00.png").write_bytes(b"no image")
    with pytest.raises(DatasetError, match=r"00\.png"):
        ImageFolder(root=classes).load()
    (classes / "empty").mkdir()
    with pytest.raises(DatasetError, match="empty"):
        ImageFolder(root=classes).prepare()
    shutil.copytree(classes / "a", tmp_path / "one" / "a")
    with pytest.raises(DatasetError, match="one class only"):
        ImageFolder(root=tmp_path / "one").prepare()
    (classes / "empty").rmdir()
    shutil.copytree(classes, tmp_path / "set" / "train")
    classes.rename(tmp_path / "set" / "val")
    (tmp_path / "set" / "val" / "b").rename(tmp_path / "set" / "val" / "d")
    with pytest.raises(DatasetError, match="same classes: b, d"):
        ImageFolder(root=tmp_path / "set").prepare()


# npz


def arrays() -> Arrays:
    pixels = some_images(14, side=12)
    labels = np.arange(14) % 3
    return {"x_train": pixels[:9], "y_train": labels[:9], "x_test": pixels[9:], "y_test": labels[9:]}


def saved(path: Path, content: Arrays) -> Npz:
    np.savez(path / "set.npz", **content)  # type: ignore[arg-type]
    return Npz(path=path / "set.npz")


LAYOUTS: dict[str, Callable[[NDArray[Any]], NDArray[Any]]] = {
    "NHWC": lambda x: x,
    "NCHW": lambda x: x.transpose(0, 3, 1, 2),
    "NHW": lambda x: x[..., 0],
    "NHW1": lambda x: x[..., :1],
    "N1HW": lambda x: x[..., :1].transpose(0, 3, 1, 2),
    "Fortran": lambda x: np.asfortranarray(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["int64", "uint8", ">i4"])
def test_npz_round_trip(layout: str, kind: str, tmp_path: Path) -> None:
    content = arrays()
    expected = {key: value.transpose(0, 3, 1, 2) for key, value in content.items() if value.ndim == 4}
    for key, value in content.items():
        content[key] = LAYOUTS[layout](value) if value.ndim == 4 else value.astype(kind)
    data = saved(tmp_path, content)
    data.prepare()
    channels = 1 if "1" in layout or layout == "NHW" else 3
    for part, name in zip(data.load(), ("train", "test"), strict=True):
        check(part, (channels, 12, 12), 3)
        assert np.array_equal(part.images, expected[f"x_{name}"][:, :channels])
        assert np.array_equal(part.labels, content[f"y_{name}"].astype(np.int64))
    info = data.info()
    assert (info.shape, info.num_classes, info.train_size) == ((channels, 12, 12), 3, 9)
    assert (info.mean, info.std) == ((0.5,) * channels, (0.5,) * channels)


def test_npz_info_reads_no_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved(tmp_path, arrays())
    read: list[str] = []
    original = Npz._array
    monkeypatch.setattr(Npz, "_array", lambda self, key: read.append(key) or original(self, key))
    data.info()
    assert read == ["y_train", "y_test"]


def test_npz_fingerprint_follows_content_and_not_name(tmp_path: Path) -> None:
    data = saved(tmp_path, arrays())
    shutil.copy(tmp_path / "set.npz", tmp_path / "other.npz")
    assert Npz(path=tmp_path / "other.npz").fingerprint() == data.fingerprint()
    changed = arrays()
    changed["x_test"][0, 0, 0, 0] ^= 1
    before = data.fingerprint()
    assert saved(tmp_path, changed).fingerprint() != before


FAULTS: dict[str, tuple[Callable[[Arrays], Any], str]] = {
    "missing": (lambda a: a.pop("y_test"), "lacks y_test"),
    "float": (lambda a: a.update(x_train=a["x_train"] / 255), "multiply by 255 and cast to uint8"),
    "wide": (lambda a: a.update(x_test=a["x_test"].astype(np.int32)), "int32.*\n.*cast to uint8"),
    "float labels": (lambda a: a.update(y_train=a["y_train"] / 1), "not integers"),
    "one-hot": (lambda a: a.update(y_train=np.eye(3, dtype=int)[a["y_train"]]), "one integer per image"),
    "unequal": (lambda a: a.update(y_train=a["y_train"][1:]), "9 images in x_train and 8 labels"),
    "oblong": (lambda a: a.update(x_train=a["x_train"][:, :10]), "10x12"),
    "other size": (lambda a: a.update(x_test=a["x_test"][:, :10, :10]), "same shape"),
    "channels": (lambda a: a.update(x_train=a["x_train"][..., :2]), "C of 1 or 3"),
    "flat": (lambda a: a.update(x_train=a["x_train"].reshape(9, -1)), r"\(N, H, W\)"),
    "scalar": (lambda a: a.update(x_train=np.uint8(3)), r"\(N, H, W\)"),
    "negative": (lambda a: a.update(y_train=a["y_train"] - 1), "-1, 0, 1"),
    "gap": (lambda a: a.update(y_train=a["y_train"] * 2), "0, 2, 4"),
    "too many": (lambda a: a.update(y_test=a["y_test"] + 1), "y_test has labels that y_train lacks: 3"),
    "one class": (lambda a: a.update(y_train=a["y_train"] * 0), "one class only"),
    "empty": (lambda a: a.update(x_test=a["x_test"][:0], y_test=a["y_test"][:0]), "x_test is empty"),
    "no pixels": (lambda a: a.update(x_train=a["x_train"][:, :0, :0]), "0x0"),
    "objects": (lambda a: a.update(x_train=np.array([None, "x"], dtype=object)), "never unpickled"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_npz_faults(name: str, tmp_path: Path) -> None:
    content = arrays()
    spoil, message = FAULTS[name]
    spoil(content)
    data = saved(tmp_path, content)
    for act in (data.prepare, data.info, data.load):
        with pytest.raises(DatasetError, match=message):
            act()


def test_npz_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no file"):
        Npz(path=tmp_path).prepare()
    path = tmp_path / "set.npz"
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(path)
    with pytest.raises(DatasetError, match="not an npz"):
        Npz(path=path).prepare()
    content = saved(tmp_path, arrays()).path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DatasetError, match="not an npz"):
        Npz(path=path).prepare()
    spoiled = bytearray(content)
    spoiled[300] ^= 255
    path.write_bytes(spoiled)
    with pytest.raises(DatasetError, match="x_train"):
        Npz(path=path).load()


# the real files


@real("MNIST")
def test_real_mnist() -> None:
    data = MNIST(root=REAL, download=False)
    data.prepare()
    train, test = data.load()
    assert (len(train), len(test), data.info().train_size) == (60_000, 10_000, 60_000)
    for part in (train, test):
        check(part, (1, 28, 28), 10)
    assert train.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert train.images.float().mean().item() / 255 == pytest.approx(data.info().mean[0], abs=1e-3)
    assert train.images.float().std().item() / 255 == pytest.approx(data.info().std[0], abs=1e-3)


@real("cifar-10-batches-py")
def test_real_cifar10(tmp_path: Path) -> None:
    data = CIFAR10(root=REAL, download=False)
    data.prepare()
    train, test = data.load()
    assert (len(train), len(test), data.info().train_size) == (50_000, 10_000, 50_000)
    for part in (train, test):
        check(part, (3, 32, 32), 10)
        assert len(set(part.labels.bincount().tolist())) == 1
    assert train.labels[:5].tolist() == [6, 9, 9, 4, 1]
    means = [train.images[:, channel].double().mean().item() / 255 for channel in range(3)]
    assert means == pytest.approx(data.info().mean, abs=1e-3)
    copy = tmp_path / "cifar-10-batches-py"
    copy.mkdir()
    for path in data.files():
        shutil.copy(path, copy)
    path = copy / "test_batch"
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.chmod(0o600)
    path.write_bytes(content)
    copied = CIFAR10(root=tmp_path, download=False)
    assert copied.fingerprint() != data.fingerprint()
    with pytest.raises(DatasetError, match="not the published one"):
        copied.prepare()


@real("gtsrb")
def test_real_gtsrb() -> None:
    data = GTSRB(root=REAL, download=False)
    size = data.info().train_size
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data.prepare()
    assert [issubclass(item.category, SmallerThanPublishedWarning) for item in caught] == [True] * (size < 39_209)
    train, test = data.load()
    assert len(train) == size == len(tv.GTSRB(str(REAL), split="train"))
    assert len(test) == len(tv.GTSRB(str(REAL), split="test"))
    for part in (train, test):
        check(part, (3, 32, 32), 43)


@real("imagenette2")
@pytest.mark.filterwarnings("ignore::backdoor_bench_none.data.image_files.SmallerThanPublishedWarning")
def test_real_imagenette() -> None:
    data = Imagenette(root=REAL, download=False, image_size=32)
    data.prepare()
    train, test = data.load()
    assert len(train) == data.info().train_size
    for part in (train, test):
        check(part, (3, 32, 32), 10)
    theirs = tv.Imagenette(str(REAL), split="train")
    assert theirs.class_to_idx["tench"] == 0
    assert theirs.class_to_idx["parachute"] == 9
    names = [path.parent.name for path in data.files()[: len(train)]]
    assert [Imagenette.wnids.index(name) for name in names] == train.labels.tolist()


def test_digits_of_other_libraries_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = Digits().load()  # compares its images with the fingerprint
    assert (len(train), len(test)) == (1297, 500)
    monkeypatch.setattr(digits, "_KNOWN", "0" * 64)
    with pytest.raises(DatasetError, match=r"scikit-learn .* and Pillow .* make other images"):
        Digits().load()
    assert Digits(image_size=8).load()[0].images.shape == (1297, 1, 8, 8)
