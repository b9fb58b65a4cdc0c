"""Base class of data sets, their metadata, and their images as uint8 tensors."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from backdoor_bench_none.contracts.component import Component
from backdoor_bench_none.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ImageSet:
    """Images (N, C, H, W) uint8 in 0..255 and their labels (N,) int64, on one device, in their original order."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> ImageSet:
        """The same set on `device`."""
        return ImageSet(self.images.to(device), self.labels.to(device))

    def take(self, indices: Tensor) -> ImageSet:
        """The samples at `indices` (k,), in that order."""
        indices = indices.to(self.labels.device)
        return ImageSet(self.images[indices], self.labels[indices])


@dataclass(frozen=True)
class DatasetInfo:
    """Metadata of a data set, known before its pixels are read.

    `shape` is (C, H, W). `mean` and `std` have C values on the 0..1 scale. `crop_padding` (pixels) and `flip` are the
    augmentation that the data set allows. `paper_target` and `paper_trigger` are those of the paper (Table 8, section
    8.6).
    """

    name: str
    shape: tuple[int, int, int]
    num_classes: int
    train_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_padding: int = 0
    flip: bool = False
    paper_target: int = 0
    paper_trigger: str = "dynamic"
    #: the names of the classes, by label, where they have any
    classes: tuple[str, ...] = ()

    def label_of(self, name: int | str, what: str) -> int:
        """The label of a class given by its name, or by the label itself; `ConfigError` if there is no such class.

        `what` is the parameter that names it.
        """
        if isinstance(name, str) and name not in self.classes:
            known = did_you_mean(name, self.classes) if self.classes else "its classes have labels only"
            raise ConfigError(f"{what} '{name}' is not a class of {self.name}", known)
        label = self.classes.index(name) if isinstance(name, str) else name
        if label >= self.num_classes:
            hint = f"its classes are 0 to {self.num_classes - 1}"
            raise ConfigError(f"{what} {label} is not a class of {self.name}", hint)
        return label

    def describe_class(self, label: int) -> str:
        """A class by its label and, where it has one, its name: "2 ('cat')"."""
        return f"{label} ('{self.classes[label]}')" if self.classes else str(label)


def check_info(info: DatasetInfo) -> None:
    """Raise `ConfigError` if no network can be made for a data set with this metadata."""
    channels, height, width = info.shape
    if height != width:
        hint = "resize or pad them in `load`, and say so in `info`"
        raise ConfigError(f"{info.name} has images of {height}x{width} pixels, and networks take squares", hint)
    if min(info.shape) < 1 or info.num_classes < 2 or info.train_size < 1:
        raise ConfigError(
            f"{info.name} has images {info.shape}, {info.num_classes} classes and {info.train_size} training images",
            "there must be pixels, two classes and an image",
        )
    if len(info.mean) != channels or len(info.std) != channels:
        raise ConfigError(f"{info.name} has {channels} channels, {len(info.mean)} means and {len(info.std)} deviations")
    if info.classes and len(info.classes) != info.num_classes:
        raise ConfigError(f"{info.name} has {info.num_classes} classes and {len(info.classes)} names of classes")


class Dataset(Component):
    """Base of all data sets; subclasses implement `info`, `files` and `load`, and `prepare` if files may be missing."""

    def info(self) -> DatasetInfo:
        """The metadata, without reading pixels; nominal values while the files are still to be downloaded."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Make sure that the files are there, downloading them if that is allowed.

        Otherwise raise `DatasetError`, saying what to put where.
        """

    def files(self) -> list[Path]:
        """All files that hold the data; `DatasetError` if any is missing."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """The sha256 of the contents of all files and of their paths below their common folder; content keys use it."""
        files = sorted(self.files())
        folder = os.path.commonpath(files)
        digest = hashlib.sha256()
        for path in files:
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            # as bytes: a name that is no UTF-8 has no other form
            digest.update(os.fsencode(path.relative_to(folder).as_posix()) + f" {content}\n".encode())
        return digest.hexdigest()

    def reading(self) -> list[str]:
        """Lines that `bbn plan` and `bbn run` show of how the data are read; none where there is but one way."""
        return []

    def recipe(self) -> Mapping[str, Any]:
        """The fields of the default training recipe that this data set changes."""
        return {}

    def load(self) -> tuple[ImageSet, ImageSet]:
        """The training set and the test set, in a fixed order."""
        raise NotImplementedError

    def load_for_pretraining(self) -> tuple[ImageSet, int]:
        """The images that a backbone is trained on before the attack, and their number of classes.

        They are those of the classes that a choice of classes leaves out, or else the clean training set.
        """
        return self.load()[0], self.info().num_classes
