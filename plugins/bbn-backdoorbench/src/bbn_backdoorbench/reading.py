"""Reads record folders: attack_result.pt with an allow-list of harmless globals, images only from inside the folder."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import stat
import struct
import zipfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy._core import multiarray
from numpy.typing import NDArray
from torch import Tensor

from backdoor_bench_none.api import BenchError
from bbn_backdoorbench.words import ATTACK_RESULT, DECOYS, INFO, RECORD_KEYS, TRAINING_CONTROLLED

#: all globals that numpy's arrays and scalars need; numpy 1 called the module `numpy.core`
HARMLESS: list[Any] = [
    np.ndarray, np.dtype, multiarray._reconstruct, multiarray.scalar, type(np.dtype("float64")),
    type(np.dtype("int64")), (multiarray._reconstruct, "numpy.core.multiarray._reconstruct"),
    (multiarray.scalar, "numpy.core.multiarray.scalar"),
]  # fmt: skip
#: images that one task of the pool decodes
CHUNK = 128
#: bytes of the largest image file
LARGEST_IMAGE = 2**25
PNG = b"\x89PNG\r\n\x1a\n"


class RecordError(BenchError):
    """A file of BackdoorBench is not what it should be."""


@dataclass(frozen=True)
class Part:
    """bd_train or bd_test: the samples whose images are in the record, in the order of the file.

    `indices` (k,) are positions in the clean set of `size` images; `labels` (k,) are those of the attacker,
    `true_labels` (k,) those of the clean set; `files` are below the record's folder.
    """

    size: int
    indices: NDArray[np.int64]
    labels: NDArray[np.int64]
    true_labels: NDArray[np.int64]
    files: tuple[str, ...] = field(repr=False)


@dataclass(frozen=True)
class ToolboxRecord:
    """A checked record folder; `image_size` is (H, W, C), `info` the content of info.pickle, empty if that is absent.

    `has_truth` says whether the changed training samples are the poisoned ones: attacks that control training also
    mark samples without a trigger.
    """

    folder: Path
    model_name: str
    num_classes: int
    dataset: str
    image_size: tuple[int, int, int]
    weights: Mapping[str, Tensor] = field(repr=False)
    train: Part | None
    test: Part
    info: Mapping[str, Any]
    has_truth: bool


def read_record(folder: Path) -> ToolboxRecord:
    """The record in `folder`; `RecordError` names the file and its fault."""
    path = folder / ATTACK_RESULT
    if not path.is_file():
        raise RecordError(f"'{folder}' is not a record: it has no {ATTACK_RESULT}", "name a folder below record/")
    for own in (path, folder / INFO):
        if own.is_symlink():
            raise RecordError(f"'{own}' is a symbolic link; a record holds its own files", "copy the file there")
    raw = load_checked(path)
    if missing := [key for key in RECORD_KEYS if key not in raw]:
        raise RecordError(f"'{path}' is not a record of an attack: it lacks {', '.join(missing)}")
    classes, size = _whole(raw["num_classes"], path, "num_classes"), _image_size(raw["img_size"], path)
    info = _read_info(folder)
    parts = {name: _read_part(raw[name], name, classes, path) for name in ("bd_train", "bd_test")}
    test = parts["bd_test"]
    if test is None:
        raise RecordError(f"'{path}': bd_test is empty, so the attack cannot be measured")
    crossed = (folder / "cross_test_dataset").exists() or str(info.get("attack")) in TRAINING_CONTROLLED
    has_truth = not crossed and not info.get(DECOYS)
    return ToolboxRecord(
        folder, _text(raw["model_name"], path, "model_name"), classes, _text(raw["clean_data"], path, "clean_data"),
        size, read_weights(raw["model"], path), parts["bd_train"], test, info, has_truth,
    )  # fmt: skip


def load_checked(path: Path) -> Mapping[str, Any]:
    """The mapping in a file of torch; only tensors, numbers, texts and numpy arrays are unpickled."""
    try:
        _refuse_compression(path)
        with torch.serialization.safe_globals(HARMLESS):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it names {name[1]}, which is" if name else "it holds something that is"
        raise RecordError(
            f"'{path}' is not unpickled: {what} not on the list of harmless things",
            "nothing was executed; get the record from a source you trust, or write it again",
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise RecordError(f"'{path}' is truncated, or not a file of torch: {_first_line(error)}") from error
    if not isinstance(loaded, dict):
        raise RecordError(f"'{path}' holds a {type(loaded).__name__}, not a mapping")
    return loaded


def _refuse_compression(path: Path) -> None:
    """Refuse archives with compressed parts: torch stores its parts as they are, and others may unpack to any size."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            packed = [part.filename for part in archive.infolist() if part.compress_type != zipfile.ZIP_STORED]
        if packed:
            raise RecordError(f"'{path}' is not a file of torch: {packed[0]} in it is compressed")


def read_weights(raw: object, path: Path) -> dict[str, Tensor]:
    """A state dictionary without the prefix that parallel training adds."""
    if not isinstance(raw, dict) or not raw or not all(isinstance(value, Tensor) for value in raw.values()):
        raise RecordError(f"'{path}': model is not a state dictionary")
    weights = {str(name).removeprefix("module."): tensor for name, tensor in raw.items()}
    if len(weights) != len(raw):
        raise RecordError(f"'{path}': model holds a tensor twice, with and without the prefix 'module.'")
    return weights


def _read_info(folder: Path) -> Mapping[str, Any]:
    path = folder / INFO
    if not path.is_file():
        return {}
    return load_checked(path)


def _read_part(raw: object, name: str, classes: int, path: Path) -> Part | None:
    """The samples of bd_train or bd_test; None if the attack has none."""
    if raw is None:
        return None
    where = f"'{path}': {name}"
    try:
        container = raw["bd_data_container"]  # type: ignore[index]
        entries, order = container["data_dict"], np.asarray(raw["original_index_array"])  # type: ignore[index]
        changed = np.asarray(raw["poison_indicator"])  # type: ignore[index]
        entries = {_exact(index): entry for index, entry in entries.items()}
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError) as error:
        raise RecordError(f"{where} is not a data set of BackdoorBench: {_first_line(error)}") from error
    if order.ndim != 1 or changed.ndim != 1 or order.dtype.kind not in "iu" or not np.isin(changed, (0, 1)).all():
        raise RecordError(f"{where}: original_index_array is not a list of indices, or poison_indicator not of 0 and 1")
    if len(order) and not 0 <= int(order.min()) <= int(order.max()) < len(changed):
        raise RecordError(f"{where}: an index is beyond the {len(changed)} images of the clean set")
    if len(np.unique(order)) != len(order):
        raise RecordError(f"{where}: an index occurs twice in original_index_array")
    indices = order[changed[order] == 1].astype(np.int64)
    if missing := [index for index in indices.tolist() if index not in entries]:
        raise RecordError(f"{where}: sample {missing[0]} is marked as poisoned, but has no image")
    chosen = [entries[index] for index in indices.tolist()]
    labels = np.array([_labels(entry, classes, where) for entry in chosen], dtype=np.int64).reshape(-1, 2)
    files = tuple(_confine([_place(entry, where) for entry in chosen], path.parent))
    return Part(len(changed), indices, labels[:, 0], labels[:, 1], files)


def _labels(entry: object, classes: int, where: str) -> tuple[int, int]:
    try:
        wanted, true = (_exact(value) for value in entry["other_info"])  # type: ignore[index]
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise RecordError(f"{where}: an image lacks its two labels: {_first_line(error)}") from error
    if not (0 <= wanted < classes and 0 <= true < classes):
        raise RecordError(f"{where}: label {max(wanted, true, key=abs)} is none of the {classes} classes")
    return wanted, true


def _place(entry: object, where: str) -> tuple[str, str]:
    """The last three parts of an image's path: the folders of the set and of the class, and the file."""
    try:
        text = str(entry["path"])  # type: ignore[index]
    except (KeyError, TypeError) as error:
        raise RecordError(f"{where}: an image has no path") from error
    parts = text.split("/")
    if parts[0] == "" or ".." in parts or "\\" in text or ":" in text:
        raise RecordError(f"{where}: the path {text!r} leaves the record")
    if len(parts) < 3 or "" in parts or not text.endswith(".png") or not text.isprintable():
        raise RecordError(f"{where}: the path {text!r} does not end as .../bd_train_dataset/<label>/<index>.png")
    return f"{parts[-3]}/{parts[-2]}", parts[-1]


def _confine(places: list[tuple[str, str]], folder: Path) -> Iterator[str]:
    """The files below `folder`, of which none may be behind a symbolic link; each folder is checked once."""
    root = folder.resolve()
    checked: dict[str, str] = {}
    for parent, name in places:
        if parent not in checked:
            checked[parent] = str(root / parent)
            if (root / parent).resolve() != root / parent:
                raise RecordError(f"'{root / parent}' is a symbolic link; a record holds its own images")
        path = f"{checked[parent]}/{name}"
        try:
            is_file = stat.S_ISREG(os.lstat(path).st_mode)
        except OSError as error:
            raise RecordError(f"'{path}' is missing; the record is not complete") from error
        if not is_file:
            raise RecordError(f"'{path}' is a symbolic link, or no file; a record holds its own images")
        yield path


def read_images(part: Part, shape: tuple[int, int, int]) -> Tensor:
    """The changed images (k, C, H, W) uint8 of `part`, each of `shape` (C, H, W)."""
    channels, height, width = shape
    pixels = np.empty((len(part.files), height, width, channels), np.uint8)

    def decode(start: int) -> None:
        for row in range(start, min(start + CHUNK, len(part.files))):
            pixels[row] = _decode(part.files[row], (height, width, channels))

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(decode, range(0, len(part.files), CHUNK)):
            pass
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _decode(path: str, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """One PNG (H, W, C), whose header is compared with `shape` before a pixel is unpacked.

    OpenCV takes two thirds of Pillow's time, and does not hold the interpreter's lock.
    """
    height, width, channels = shape
    content = _read_bytes(path)
    if not content.startswith(PNG) or content[12:16] != b"IHDR" or b"IEND" not in content[-16:]:
        raise RecordError(f"'{path}' cannot be read as PNG: it is not one, or is truncated")
    size = struct.unpack(">II", content[16:24])
    if size != (width, height):
        raise RecordError(f"'{path}' is {size[0]}x{size[1]}, the record says {width}x{height}")
    mode = cv2.IMREAD_COLOR if channels == 3 else cv2.IMREAD_GRAYSCALE
    # the orientation that a camera notes is ignored, as in the toolbox
    pixels = cv2.imdecode(np.frombuffer(content, np.uint8), mode | cv2.IMREAD_IGNORE_ORIENTATION)
    if pixels is None or pixels.shape[:2] != (height, width):
        raise RecordError(f"'{path}' cannot be read as PNG: its data are damaged")
    decoded: NDArray[Any] = pixels[..., ::-1] if channels == 3 else pixels[..., None]
    return decoded


def _read_bytes(path: str) -> bytes:
    """The content of a file; `RecordError` if it is a symbolic link or larger than any image."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
        try:
            size = os.fstat(descriptor).st_size
            if size > LARGEST_IMAGE:
                raise RecordError(f"'{path}' is larger than {LARGEST_IMAGE} bytes")
            return os.read(descriptor, size)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise RecordError(f"'{path}' cannot be read: {error.strerror}") from error


def hash_record(record: ToolboxRecord) -> str:
    """The sha256 over attack_result.pt, all images, and whether the changed samples are the poisoned ones."""
    digest = hashlib.sha256((record.folder / ATTACK_RESULT).read_bytes())
    if not record.has_truth:
        digest.update(b"without ground truth")
    for part in filter(None, (record.train, record.test)):
        for path in part.files:
            digest.update(hashlib.sha256(_read_bytes(path)).digest())
    return digest.hexdigest()


def _whole(value: object, path: Path, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 1 < int(value) <= 100_000:
        raise RecordError(f"'{path}': {name} is {value!r}, not a number of classes")
    return int(value)


def _exact(value: Any) -> int:  # noqa: ANN401
    """A whole number; `ValueError` for 0.5, which int() would round."""
    number = int(value)
    if number != value:
        raise ValueError(f"{value!r} is not a whole number")
    return number


def _text(value: object, path: Path, name: str) -> str:
    if not isinstance(value, str) or not value.isprintable():
        raise RecordError(f"'{path}': {name} is {value!r}, not a name")
    return value


def _image_size(value: object, path: Path) -> tuple[int, int, int]:
    try:
        height, width, channels = (_exact(extent) for extent in value)  # type: ignore[attr-defined]
    except (TypeError, ValueError, ArithmeticError) as error:
        raise RecordError(f"'{path}': img_size is {value!r}, not (H, W, C)") from error
    if not (0 < height == width <= 1024 and channels in (1, 3)):
        raise RecordError(f"'{path}': img_size is {value!r}; square images of 1 or 3 channels are read here")
    return height, width, channels


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
