"""Base class of data sets, their metadata, and their images as uint8 tensors."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backdoor_bench_none.contracts.component import Component


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
            digest.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
        return digest.hexdigest()

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
