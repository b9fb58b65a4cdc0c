"""The user's own images: one folder per class, or four arrays in one .npz file."""

from __future__ import annotations

import math
import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import numpy as np
import torch
from numpy.lib import format as npy
from pydantic import Field

from backdoor_bench_none.contracts.component import Incidental
from backdoor_bench_none.contracts.dataset import Dataset, DatasetInfo, ImageSet
from backdoor_bench_none.data.digits import stratified_split
from backdoor_bench_none.data.folders import Layout, count_endings, find_parts, list_images
from backdoor_bench_none.data.image_files import Sample, fill_images, keep_classes, others
from backdoor_bench_none.data.pixels import ImageReader
from backdoor_bench_none.errors import DatasetError
from backdoor_bench_none.words import visible

if TYPE_CHECKING:
    from numpy.typing import NDArray

_KEYS = ("x_train", "y_train", "x_test", "y_test")
_NPZ_FAULTS = (
    OSError, RuntimeError, ValueError, LookupError, EOFError, MemoryError, NotImplementedError, zipfile.BadZipFile,
    zlib.error,
)  # fmt: skip


class ImageFolder(Dataset):
    """Image files in one folder per class, resized to squares; the sorted names are the labels 0 to K - 1.

    Names that are whole numbers are sorted as numbers. `root` holds the class folders, of which a fixed, stratified
    share `test_fraction` is the test set, or the folders of a split by any of their usual names (train, training; test,
    val, valid, validation, eval) in any case. Pictures are turned as their EXIF tag says, what is transparent becomes
    white, 16 bits a channel are scaled to 8. Files that are no images are left out and counted.
    """

    revision: ClassVar[int] = 2

    root: Annotated[Path, Incidental] = Field(description="folder of class folders, or of train and test (or val)")
    image_size: int = Field(default=64, ge=8, le=512, description="side in pixels that the images are resized to")
    channels: Literal[1, 3] = Field(default=3, description="1 for grey, 3 for colour")
    mean: float = Field(default=0.5, ge=0, le=1, description="subtracted from every channel, on the 0..1 scale")
    std: float = Field(default=0.5, gt=0, description="every channel is divided by it, on the 0..1 scale")
    classes: tuple[str, ...] | None = Field(
        default=None, min_length=2, description="only these folders, which become 0, 1, ...; default: all, sorted"
    )
    test_fraction: float = Field(
        default=0.2, gt=0, lt=1, description="share of test images, where `root` has no test or val folder"
    )
    flip: bool = Field(default=False, description="whether images are mirrored at random in training")
    crop_padding: int = Field(default=0, ge=0, description="pixels by which images are shifted at random in training")
    layout: Layout = Field(
        default="auto", description="split: `root` has a training and a test part; classes: it has class folders only"
    )
    white: int | None = Field(
        default=None, ge=255, le=2**31 - 1, description="white in images of more than 8 bits; default: 65535"
    )

    def info(self) -> DatasetInfo:
        """The metadata, from the names of the files."""
        files = self._files()
        return DatasetInfo(
            name="image_folder",
            shape=(self.channels, self.image_size, self.image_size),
            num_classes=len(files.classes),
            train_size=len(files.train),
            mean=(self.mean,) * self.channels,
            std=(self.std,) * self.channels,
            crop_padding=self.crop_padding,
            flip=self.flip,
            classes=tuple(map(visible, files.classes)),
        )

    def prepare(self) -> None:
        """Check that the folders are there and agree; nothing is downloaded."""
        self._files()

    def reading(self) -> list[str]:
        """The number of images, their endings, the split, the classes, and what is left out."""
        files = self._files()
        endings = Counter(os.path.splitext(path)[1].lower() for path, _ in (*files.train, *files.test))
        lines = [
            f"{len(files.train):,} training and {len(files.test):,} test images, {files.split}",
            f"files   {count_endings(endings)}",
            f"classes {_shown([f'{label} {visible(name)}' for label, name in enumerate(files.classes)])}",
        ]
        if files.left_out:
            lines.append(f"left out, since they are no images here: {count_endings(files.left_out)}")
        return lines

    def files(self) -> list[Path]:
        """The image files of both parts, of all classes."""
        every = self._every_file()
        return [Path(path) for path, _ in (*every.train, *every.test)]

    def load(self) -> tuple[ImageSet, ImageSet]:
        """Images (N, C, S, S) of the training and the test part, in the order of their paths."""
        files = self._files()
        reader = ImageReader(self.image_size, self.channels, self.white)
        train, test = (self._read(part, reader) for part in (files.train, files.test))
        reader.check()
        return train, test

    def load_for_pretraining(self) -> tuple[ImageSet, int]:
        """The training images of the folders that `classes` leaves out; all of them if it leaves out none."""
        every = self._every_file()
        left = others(len(every.classes), [every.classes.index(name) for name in self.classes or ()])
        reader = ImageReader(self.image_size, self.channels, self.white)
        return self._read(keep_classes(every.train, left), reader), len(left)

    def _read(self, samples: Sequence[Sample], reader: ImageReader) -> ImageSet:
        return fill_images(samples, self.image_size, self.channels, reader.read)

    def _files(self) -> _Files:
        """The files of the chosen classes."""
        every = self._every_file()
        if self.classes is None:
            return every
        unknown = [name for name in self.classes if name not in every.classes]
        fault = None
        if unknown:
            fault = f"there is no class {unknown[0]!r}"
        elif len(set(self.classes)) < len(self.classes):
            fault = "a class appears twice in `classes`"
        if fault is not None:
            raise DatasetError(f"image_folder: {fault}", f"the classes of {self.root} are {_shown(every.classes)}")
        kept = [every.classes.index(name) for name in self.classes]
        train, test = (keep_classes(part, kept) for part in (every.train, every.test))
        return replace(every, classes=list(self.classes), train=train, test=test)

    def _every_file(self) -> _Files:
        root = self.root.expanduser()
        if not os.path.isdir(root):
            raise DatasetError(f"image_folder: {root} is not a folder", "`root` must name a folder of class folders")
        parts = find_parts(root, self.layout)
        if len(parts.train) < 2:
            raise DatasetError(
                f"image_folder: {root} has {_count_classes(list(parts.train))}",
                "two or more class folders are needed; a train folder needs a test or val folder beside it",
            )
        train = list_images(parts.train)
        if parts.test is None:
            kept, held_out = self._divided(train.samples)
            share = f"{parts.reading}, {self.test_fraction:.0%} of each class for testing"
            return _Files(list(parts.train), kept, held_out, share, train.left_out)
        _require_agreement(list(parts.train), list(parts.test), parts.reading)
        # in the order of the training part: the test part alone might be sorted otherwise
        test = list_images({name: parts.test[name] for name in parts.train})
        return _Files(list(parts.train), train.samples, test.samples, parts.reading, train.left_out + test.left_out)

    def _divided(self, samples: list[Sample]) -> tuple[list[Sample], list[Sample]]:
        labels = np.array([label for _, label in samples], dtype=np.int64)
        try:
            train, test = stratified_split(labels, self.test_fraction)
        except ValueError as error:
            raise DatasetError(
                f"image_folder: test_fraction {self.test_fraction} cannot divide {len(samples)} images: {error}",
                "add images, change `test_fraction`, or create the folders train and test yourself",
            ) from error
        return [samples[i] for i in train], [samples[i] for i in test]


@dataclass(frozen=True)
class _Files:
    """The classes of a folder, the files of both parts, how it was split, and the files that are no images."""

    classes: list[str]
    train: list[Sample]
    test: list[Sample]
    split: str
    left_out: Counter[str]


def _count_classes(names: list[str]) -> str:
    if not names:
        return "no class folders"
    return f"one class only, {visible(names[0])!r}"


def _shown(names: list[str]) -> str:
    shown = ", ".join(names[:10])
    if len(names) > 10:
        shown += f" and {len(names) - 10} more"
    return shown


def _require_agreement(train: list[str], test: list[str], reading: str) -> None:
    odd = sorted(set(train) ^ set(test))
    if odd:
        raise DatasetError(
            f"image_folder: {reading}: the two do not have the same classes: {', '.join(map(visible, odd))}",
            "give both parts a folder for every class",
        )


class Npz(Dataset):
    """Arrays `x_train`, `y_train`, `x_test` and `y_test` in one .npz file, which is never unpickled.

    Images are uint8 and square: (N, H, W), (N, H, W, C) or (N, C, H, W) with C of 1 or 3; a last axis of 1 or 3 is
    taken to be the channels. Labels are integers (N,) from 0 to K - 1, each of which occurs in `y_train`.
    """

    path: Annotated[Path, Incidental] = Field(description="the .npz file")
    mean: float = Field(default=0.5, ge=0, le=1, description="subtracted from every channel, on the 0..1 scale")
    std: float = Field(default=0.5, gt=0, description="every channel is divided by it, on the 0..1 scale")
    flip: bool = Field(default=False, description="whether images are mirrored at random in training")
    crop_padding: int = Field(default=0, ge=0, description="pixels by which images are shifted at random in training")

    def info(self) -> DatasetInfo:
        """The metadata, from the headers of the arrays and from the labels."""
        shape, train, _ = self._inspected()
        return DatasetInfo(
            name="npz",
            shape=shape,
            num_classes=int(train.max()) + 1,
            train_size=len(train),
            mean=(self.mean,) * shape[0],
            std=(self.std,) * shape[0],
            crop_padding=self.crop_padding,
            flip=self.flip,
        )

    def prepare(self) -> None:
        """Check everything but the pixels; nothing is downloaded."""
        self._inspected()

    def reading(self) -> list[str]:
        """The number of images, their shape (C, H, W), and the number of classes."""
        shape, train, test = self._inspected()
        return [f"{len(train):,} training and {len(test):,} test images {shape}, {train.max() + 1} classes"]

    def files(self) -> list[Path]:
        """The .npz file."""
        path = self.path.expanduser()
        if not os.path.isfile(path):
            raise DatasetError(f"npz: there is no file {path}", "`path` must name a file written by numpy.savez")
        return [path]

    def load(self) -> tuple[ImageSet, ImageSet]:
        """Images (N, C, H, W) and labels of both parts, in the order of the file."""
        shape, train, test = self._inspected()
        return self._part("x_train", shape, train), self._part("x_test", shape, test)

    def _part(self, key: str, shape: tuple[int, int, int], labels: NDArray[np.int64]) -> ImageSet:
        images = self._array(key)
        if images.ndim == 4 and images.shape[-1] in (1, 3):
            images = images.transpose(0, 3, 1, 2)
        images = np.ascontiguousarray(images.reshape(-1, *shape))
        return ImageSet(torch.from_numpy(images), torch.from_numpy(labels))

    def _array(self, key: str) -> NDArray[np.generic]:
        path = self.files()[0]
        try:
            with np.load(path, allow_pickle=False) as archive:
                array: NDArray[np.generic] = archive[key]
                return array
        except _NPZ_FAULTS as error:
            raise DatasetError(f"npz: {key} in {path} cannot be read: {error}", "write the file again") from error

    def _inspected(self) -> tuple[tuple[int, int, int], NDArray[np.int64], NDArray[np.int64]]:
        """The shape (C, H, W) of the images and the labels of both parts, after all checks."""
        headers = self._headers()
        for key in _KEYS:
            _require_dtype(key, headers[key][1])
        shapes = {key: header[0] for key, header in headers.items()}
        shape = _image_shape("x_train", shapes["x_train"])
        _image_shape("x_test", shapes["x_test"])
        if shapes["x_train"][1:] != shapes["x_test"][1:]:
            raise DatasetError(
                f"npz: x_train holds images {shapes['x_train'][1:]} and x_test {shapes['x_test'][1:]}",
                "give both the same shape",
            )
        for part in ("train", "test"):
            _require_lengths(part, shapes[f"x_{part}"], shapes[f"y_{part}"])
        train, test = self._array("y_train"), self._array("y_test")
        _require_classes(train, test)
        return shape, train.astype(np.int64), test.astype(np.int64)

    def _headers(self) -> dict[str, tuple[tuple[int, ...], np.dtype[np.generic]]]:
        path = self.files()[0]
        try:
            with zipfile.ZipFile(path) as archive:
                absent = [key for key in _KEYS if f"{key}.npy" not in archive.namelist()]
                if absent:
                    raise DatasetError(
                        f"npz: {path} lacks {', '.join(absent)}", f"it must hold the arrays {', '.join(_KEYS)}"
                    )
                return {key: _header(archive, f"{key}.npy") for key in _KEYS}
        except zipfile.BadZipFile as error:
            raise DatasetError(f"npz: {path} is not an npz file: {error}", "write it with numpy.savez") from error
        except _NPZ_FAULTS as error:
            raise DatasetError(f"npz: {path} cannot be read: {error}", "write it again with numpy.savez") from error


def _header(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype[np.generic]]:
    with archive.open(name) as member:
        version = npy.read_magic(member)
        # Version 3.0 is for structured arrays only, which cannot be images.
        if version == (1, 0):
            shape, _, dtype = npy.read_array_header_1_0(member)
        elif version == (2, 0):
            shape, _, dtype = npy.read_array_header_2_0(member)
        else:
            raise ValueError(f"{name} has the unknown format version {version}")
    promised = math.prod(shape) * dtype.itemsize
    if not dtype.hasobject and archive.getinfo(name).file_size < promised:
        raise ValueError(f"{name} is cut off: it says {shape} of {dtype}")
    return tuple(shape), dtype


def _require_dtype(key: str, dtype: np.dtype[np.generic]) -> None:
    if dtype.hasobject:
        raise DatasetError(
            f"npz: {key} is an array of Python objects, which are never unpickled",
            "give all images one size, and save plain uint8 images and integer labels",
        )
    if key.startswith("y") and dtype.kind not in "iu":
        raise DatasetError(
            f"npz: {key} is {dtype}, not integers", f"save {key}.astype('int64'), with labels 0 to K - 1"
        )
    if key.startswith("x") and dtype != np.uint8:
        cure = "cast to uint8"
        if dtype.kind == "f":
            cure = "multiply by 255 and cast to uint8 (if the values are 0 to 1)"
        raise DatasetError(f"npz: {key} is {dtype}, not uint8", f"{cure}; the values must be 0 to 255")


def _image_shape(key: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(C, H, W) of an array of images."""
    if len(shape) == 3:
        channels, height, width = 1, *shape[1:]
    elif len(shape) == 4 and shape[3] in (1, 3):
        height, width, channels = shape[1:]
    elif len(shape) == 4 and shape[1] in (1, 3):
        channels, height, width = shape[1:]
    else:
        raise DatasetError(
            f"npz: {key} has the shape {shape}", "images are (N, H, W), (N, H, W, C) or (N, C, H, W) with C of 1 or 3"
        )
    if height != width or height == 0:
        raise DatasetError(f"npz: {key} holds images of {height}x{width} pixels", "crop or resize them to squares")
    return channels, height, width


def _require_lengths(part: str, images: tuple[int, ...], labels: tuple[int, ...]) -> None:
    if len(labels) != 1:
        raise DatasetError(f"npz: y_{part} has the shape {labels}", "labels are (N,): one integer per image")
    if images[0] != labels[0]:
        raise DatasetError(
            f"npz: {images[0]} images in x_{part} and {labels[0]} labels in y_{part}", "give every image one label"
        )
    if images[0] == 0:
        raise DatasetError(f"npz: x_{part} is empty", "both parts need images")


def _require_classes(train: NDArray[np.generic], test: NDArray[np.generic]) -> None:
    classes = np.unique(train)
    hint = "number the classes 0 to K - 1, each with training images"
    if not np.array_equal(classes, np.arange(len(classes))):
        raise DatasetError(f"npz: the labels in y_train are {_some(classes)}", hint)
    if len(classes) < 2:
        raise DatasetError("npz: y_train has one class only", "two or more are needed")
    unknown = np.setdiff1d(test, classes)
    if len(unknown):
        raise DatasetError(f"npz: y_test has labels that y_train lacks: {_some(unknown)}", hint)


def _some(values: NDArray[np.generic]) -> str:
    shown = ", ".join(str(value) for value in values[:8])
    if len(values) > 8:
        shown += ", …"
    return shown
