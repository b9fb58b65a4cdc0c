"""Published data sets with one file per image: GTSRB and Imagenette."""

from __future__ import annotations

import csv
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np
import torch
from PIL import Image
from pydantic import Field, field_validator

from backdoor_bench_none.contracts.dataset import DatasetInfo, ImageSet
from backdoor_bench_none.data.torchvision_sets import TorchvisionSet
from backdoor_bench_none.errors import DatasetError

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: the classes of Imagenette, in the order of their WordNet ids
NAMES = (
    "tench", "English springer", "cassette player", "chain saw", "church", "French horn", "garbage truck", "gas pump",
    "golf ball", "parachute",
)  # fmt: skip
#: The path of an image file, and its label.
Sample = tuple[str, int]


class SmallerThanPublishedWarning(UserWarning):
    """There are fewer training images than the paper trained on."""


def read_square(path: str, size: int) -> NDArray[np.uint8]:
    """One image file in colour as uint8 (size, size, 3), resized bilinearly as a whole."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))
    except (OSError, SyntaxError, ValueError) as error:
        raise DatasetError(f"the image {path} cannot be read: {error}", "replace or remove it") from error


def read_images(samples: Sequence[Sample], size: int) -> ImageSet:
    """The colour images (N, 3, size, size) of `samples`, in their order."""
    return fill_images(samples, size, 3, lambda path: read_square(path, size))


def fill_images(
    samples: Sequence[Sample], size: int, channels: int, read: Callable[[str], NDArray[np.uint8]]
) -> ImageSet:
    """The images (N, C, size, size) of `samples`, in their order; `read` returns each as (size, size, C)."""
    images = torch.empty(len(samples), channels, size, size, dtype=torch.uint8)
    pixels = images.numpy().transpose(0, 2, 3, 1)

    def fill(index: int) -> None:
        pixels[index] = read(samples[index][0])

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(fill, range(len(samples))):
            pass
    return ImageSet(images, torch.tensor([label for _, label in samples], dtype=torch.int64))


def keep_classes(samples: Sequence[Sample], classes: Sequence[int]) -> list[Sample]:
    """The samples of these labels, which become 0, 1, ... in the order of `classes`."""
    new_labels = {label: new for new, label in enumerate(classes)}
    return [(path, new_labels[label]) for path, label in samples if label in new_labels]


def others(count: int, classes: Sequence[int]) -> list[int]:
    """The labels 0 to `count` - 1 that `classes` leaves out; all of them if it leaves out none."""
    return [label for label in range(count) if label not in classes] or list(range(count))


class _ImageFiles(TorchvisionSet):
    """Base of data sets with one file per image."""

    image_size: int = Field(default=32, ge=16, le=224, description="side in pixels that the images are resized to")

    published: ClassVar[int]

    def prepare(self) -> None:
        """Prepare the files, and warn if there are fewer training images than the paper trained on."""
        super().prepare()
        size = self._train_size()
        if size < self.published:
            message = f"{self.title}: {size:,} training images found, {self.published:,} in the paper{self._shortage()}"
            warnings.warn(message, SmallerThanPublishedWarning, stacklevel=2)

    def files(self) -> list[Path]:
        """The image files of both parts."""
        train, test = self._samples()
        return [Path(path) for path, _ in (*train, *test)]

    def _shortage(self) -> str:
        return ""

    def _list(self) -> tuple[list[Sample], list[Sample]]:
        raise NotImplementedError

    def _samples(self) -> tuple[list[Sample], list[Sample]]:
        """The training and the test files with their labels, in torchvision's order."""
        self._require()
        try:
            return self._list()
        except (OSError, ValueError, LookupError) as error:
            raise DatasetError(f"{self.title} in {self.folder()} is incomplete: {error}", self._hint()) from error

    def _train_size(self) -> int:
        if self._missing():
            return self.published
        return len(self._samples()[0])

    def _read(self) -> tuple[ImageSet, ImageSet]:
        train, test = self._samples()
        return read_images(train, self.image_size), read_images(test, self.image_size)


class GTSRB(_ImageFiles):
    """German traffic signs, 43 classes: 39,209 training and 12,630 test images, resized to squares.

    torchvision's training archive holds 26,640 images, not the paper's 39,209; `prepare` warns about it.
    """

    title: ClassVar[str] = "GTSRB"
    source: ClassVar[str] = "GTSRB"
    epochs: ClassVar[int] = 15
    published: ClassVar[int] = 39_209

    def info(self) -> DatasetInfo:
        """The metadata; mean and std are NONE's.

        The augmentation of the paper is unpublished; this one, crop 4 without flip, is that of BackdoorBench.
        """
        return DatasetInfo(
            name="gtsrb",
            shape=(3, self.image_size, self.image_size),
            num_classes=43,
            train_size=self._train_size(),
            mean=(0.3403, 0.3121, 0.3214),
            std=(0.2724, 0.2608, 0.2669),
            crop_padding=4,
            paper_target=1,
            paper_trigger="static",
        )

    def files(self) -> list[Path]:
        """The .ppm files of both parts, and the table of the test labels."""
        return [*super().files(), self._table()]

    def _base(self) -> Path:
        return self.folder() / "gtsrb"

    def _table(self) -> Path:
        return self._base() / "GT-final_test.csv"

    def _training(self) -> Path:
        return self._base() / "GTSRB" / "Training"

    def _tests(self) -> Path:
        return self._base() / "GTSRB" / "Final_Test" / "Images"

    def _needed(self) -> list[Path]:
        return [*(self._training() / f"{label:05d}" for label in range(43)), self._tests(), self._table()]

    def _advice(self) -> str:
        return (
            f"put the folders 00000 to 00042 of GTSRB_Final_Training_Images.zip (39,209 images) or of "
            f"GTSRB-Training_fixed.zip (26,640) into {self._training()}, the .ppm files of GTSRB_Final_Test_Images.zip "
            f"into {self._tests()} and GT-final_test.csv of GTSRB_Final_Test_GT.zip into {self._base()}"
        )

    def _shortage(self) -> str:
        return (
            " (26,640 are what torchvision downloads); for all of them put the folders 00000 to 00042 of "
            f"GTSRB_Final_Training_Images.zip into {self._training()}"
        )

    def _fetch(self, folder: str) -> None:
        for split in ("train", "test"):
            self._source()(folder, split=split, download=True)

    def _list(self) -> tuple[list[Sample], list[Sample]]:
        # The labels are the folders' numbers: torchvision's class would number whatever folders there are.
        from torchvision.datasets.folder import make_dataset

        labels = {f"{label:05d}": label for label in range(43)}
        train = list(make_dataset(str(self._training()), class_to_idx=labels, extensions=(".ppm",)))
        with self._table().open(newline="") as table:
            rows = csv.DictReader(table, delimiter=";", skipinitialspace=True)
            test = [(str(self._tests() / row["Filename"]), int(row["ClassId"])) for row in rows]
        lost = next((path for path, _ in test if not os.path.exists(path)), None)
        if lost is not None:
            raise FileNotFoundError(f"{lost}, listed in {self._table().name}, is missing")
        return train, test


class Imagenette(_ImageFiles):
    """Ten ImageNet classes, full-size pictures: 9,469 training and 3,925 test images, resized whole to squares.

    The paper calls it "ImageNet-10". Classes are in the order of their WordNet ids: 0 tench to 9 parachute.
    """

    image_size: int = Field(default=224, ge=16, le=224, description="side in pixels that the images are resized to")
    classes: tuple[Annotated[int, Field(ge=0, le=9)], ...] | None = Field(
        default=None, min_length=2, description="only these classes, which become 0, 1, ...; default: all ten"
    )

    title: ClassVar[str] = "Imagenette"
    source: ClassVar[str] = "Imagenette"
    published: ClassVar[int] = 9_469
    wnids: ClassVar[tuple[str, ...]] = (
        "n01440764",
        "n02102040",
        "n02979186",
        "n03000684",
        "n03028079",
        "n03394916",
        "n03417042",
        "n03425413",
        "n03445777",
        "n03888257",
    )

    def info(self) -> DatasetInfo:
        """The metadata; mean and std are NONE's.

        The augmentation of the paper is unpublished; this one crops by 4 and flips.
        """
        return DatasetInfo(
            name="imagenette",
            shape=(3, self.image_size, self.image_size),
            num_classes=len(self._kept),
            train_size=self._kept_size(),
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            crop_padding=4,
            flip=True,
            paper_target=1,
            paper_trigger="watermark",
            classes=tuple(NAMES[label] for label in self._kept),
        )

    @field_validator("classes")
    @classmethod
    def _distinct(cls, classes: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if classes is not None and len(set(classes)) < len(classes):
            raise ValueError("a class appears twice")
        return classes

    def load_for_pretraining(self) -> tuple[ImageSet, int]:
        """The training images of the classes that `classes` leaves out; all of them if it leaves out none."""
        left = others(10, self._kept)
        return read_images(keep_classes(self._samples()[0], left), self.image_size), len(left)

    @property
    def _kept(self) -> tuple[int, ...]:
        if self.classes is None:
            return tuple(range(10))
        return self.classes

    def _kept_size(self) -> int:
        """The number of training images of the chosen classes; a share of the published number if they are missing."""
        if self.classes is None:
            return self._train_size()
        if self._missing():
            return self.published * len(self._kept) // 10
        return len(keep_classes(self._samples()[0], self._kept))

    def _read(self) -> tuple[ImageSet, ImageSet]:
        train, test = (read_images(keep_classes(part, self._kept), self.image_size) for part in self._samples())
        return train, test

    def _part(self, name: str) -> Path:
        return self.folder() / "imagenette2" / name

    def _needed(self) -> list[Path]:
        return [self._part(part) / wnid for part, wnid in product(("train", "val"), self.wnids)]

    def _advice(self) -> str:
        return (
            f"unpack imagenette2.tgz in {self.folder()}, so that {self._part('train')} and {self._part('val')} "
            f"each hold the ten folders {self.wnids[0]} to {self.wnids[-1]} of .JPEG files"
        )

    def _shortage(self) -> str:
        return "; the rest of an interrupted download looks like this"

    def _fetch(self, folder: str) -> None:
        # Some versions of torchvision reject a folder that exists, some accept it as is: both end in a `DatasetError`.
        self._source()(folder, split="train", size="full", download=True)

    def _list(self) -> tuple[list[Sample], list[Sample]]:
        from torchvision.datasets.folder import make_dataset

        labels = {wnid: label for label, wnid in enumerate(self.wnids)}
        train, test = (
            list(make_dataset(str(self._part(part)), class_to_idx=labels, extensions=(".jpeg",)))
            for part in ("train", "val")
        )
        return train, test
