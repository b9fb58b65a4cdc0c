"""Published data sets, downloaded and laid out by `torchvision.datasets`.

The folder is `root`, else the environment variable BBN_DATA, else `~/.cache/backdoor-bench-none/data`. Without a
network the files must be put there by hand; every `DatasetError` says which files go where.
"""

from __future__ import annotations

import gzip
import importlib
import os
import shutil
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field

from backdoor_bench_none.contracts.component import Added, Incidental
from backdoor_bench_none.contracts.dataset import Dataset, DatasetInfo, ImageSet
from backdoor_bench_none.errors import DatasetError

_FETCH_FAULTS = (
    OSError,
    RuntimeError,
    ValueError,
    EOFError,
    HTTPException,
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
)
_READ_FAULTS = (OSError, RuntimeError, ValueError, TypeError, LookupError, AssertionError, EOFError)


class TorchvisionSet(Dataset):
    """Base of published data sets: finds, downloads and checks the files below one folder."""

    root: Annotated[Path | None, Incidental] = Field(
        default=None,
        description="folder of the data sets; default: the environment variable BBN_DATA, else a folder in ~/.cache",
    )
    download: Annotated[bool, Incidental] = Field(default=True, description="whether missing files are downloaded")

    title: ClassVar[str]
    #: the name of torchvision's class
    source: ClassVar[str]
    #: passes of the default recipe
    epochs: ClassVar[int] = 30

    def recipe(self) -> Mapping[str, Any]:
        """A short schedule that trains the built-in networks to their plateau."""
        return {"epochs": self.epochs}

    def folder(self) -> Path:
        """The folder that holds the data sets, below which each has its own."""
        if self.root is not None:
            return self.root.expanduser()
        named = os.environ.get("BBN_DATA")
        if named:
            return Path(named).expanduser()
        return Path.home() / ".cache" / "backdoor-bench-none" / "data"

    def prepare(self) -> None:
        """Unpack or download the files unless they are there; `DatasetError` says what to put where."""
        if self._missing():
            self._obtain()
        locked = next((path for path in self.files() if not os.access(path, os.R_OK)), None)
        if locked is not None:
            raise DatasetError(f"{self.title}: {locked} cannot be read", "give yourself permission to read it")
        if not self._intact():
            self._obtain()

    def load(self) -> tuple[ImageSet, ImageSet]:
        """The training set and the test set in torchvision's order."""
        self._require()
        try:
            parts = self._read()
        except _READ_FAULTS as error:
            raise DatasetError(f"{self.title} in {self.folder()} cannot be read: {error}", self._hint()) from error
        for part in parts:
            self._check(part)
        return self._select(*parts)

    def _source(self) -> Any:  # noqa: ANN401 - a class with files and sums of its own
        """torchvision's class, which takes seconds to import."""
        return getattr(importlib.import_module("torchvision.datasets"), self.source)

    def _select(self, train: ImageSet, test: ImageSet) -> tuple[ImageSet, ImageSet]:
        """The images to use, of all."""
        return train, test

    def _needed(self) -> list[Path]:
        """The files and folders that the data set consists of."""
        raise NotImplementedError

    def _advice(self) -> str:
        """Which files to put where."""
        raise NotImplementedError

    def _fetch(self, folder: str) -> None:
        raise NotImplementedError

    def _read(self) -> tuple[ImageSet, ImageSet]:
        raise NotImplementedError

    def _intact(self) -> bool:
        return True

    def _unpack(self) -> None:
        """Unpack the archives that are already there."""

    def _missing(self) -> list[Path]:
        # os.path returns False where pathlib raises: in a folder without permission to search it.
        return [path for path in self._needed() if not os.path.exists(path)]

    def _obtain(self) -> None:
        folder = self.folder()
        try:
            self._unpack()
            if self.download and (self._missing() or not self._intact()):
                folder.mkdir(parents=True, exist_ok=True)
                self._fetch(str(folder))
        except _FETCH_FAULTS as error:
            reason = str(error) or type(error).__name__
            raise DatasetError(f"{self.title} cannot be fetched into {folder}: {reason}", self._hint()) from error
        self._require()
        if not self._intact():
            raise DatasetError(f"{self.title} in {folder}: a file is not the published one", self._hint())

    def _require(self) -> None:
        missing = self._missing()
        if not missing:
            return
        folder = self.folder()
        if os.path.isdir(folder) and not os.access(folder, os.R_OK | os.X_OK):
            raise DatasetError(
                f"{self.title}: the folder {folder} cannot be read", "give yourself permission to read it"
            )
        if os.path.isfile(folder):
            raise DatasetError(f"{self.title}: {folder} is a file", "`root` or BBN_DATA must name a folder")
        raise DatasetError(f"{self.title} is not there: {missing[0]} is missing", self._hint())

    def _hint(self) -> str:
        hint = self._advice()
        if not self.download:
            hint += ", or set `download: true`"
        if len(self._missing()) < len(self._needed()):
            hint += "; remove the rest of an interrupted download first"
        return f"{hint}; `root` or BBN_DATA names another folder"

    def _check(self, part: ImageSet) -> None:
        info = self.info()
        good = (
            0 < len(part.images) == len(part.labels)
            and tuple(part.images.shape[1:]) == info.shape
            and 0 <= int(part.labels.min()) <= int(part.labels.max()) < info.num_classes
        )
        if not good:
            raise DatasetError(
                f"{self.title} in {self.folder()}: images {tuple(part.images.shape)} and {len(part.labels)} labels are "
                f"not N images {info.shape} with labels 0 to {info.num_classes - 1}",
                self._hint(),
            )


class MixedSet(TorchvisionSet):
    """Base of published data sets whose classes are mixed, so that the first images are a sample of all."""

    first: Annotated[int | None, Added] = Field(
        default=None, ge=1, description="only the first so many training images; default: all"
    )

    def _select(self, train: ImageSet, test: ImageSet) -> tuple[ImageSet, ImageSet]:
        return train.take(torch.arange(self._limited(len(train)))), test

    def _limited(self, size: int) -> int:
        """The number of training images, of `size`; `DatasetError` if `first` asks for more."""
        if self.first is None:
            return size
        if self.first > size:
            raise DatasetError(f"{self.title} has {size:,} training images, fewer than first = {self.first:,}")
        return self.first


class MNIST(MixedSet):
    """LeCun's handwritten digits: 60,000 training and 10,000 test images (1, 28, 28); neither cropped nor flipped."""

    title: ClassVar[str] = "MNIST"
    epochs: ClassVar[int] = 3
    source: ClassVar[str] = "MNIST"

    def info(self) -> DatasetInfo:
        """The metadata; `train_size` is read from the label file."""
        return DatasetInfo(
            name="mnist",
            shape=(1, 28, 28),
            num_classes=10,
            train_size=self._limited(self._train_size()),
            mean=(0.1307,),
            std=(0.3081,),
            paper_target=0,
            paper_trigger="pixel",
        )

    def files(self) -> list[Path]:
        """The four unpacked idx files."""
        self._require()
        return self._needed()

    def _raw(self) -> Path:
        return self.folder() / self.source / "raw"

    def _needed(self) -> list[Path]:
        return [self._raw() / name.removesuffix(".gz") for name, _ in self._source().resources]

    def _advice(self) -> str:
        names = ", ".join(path.name for path in self._needed())
        return f"put {names} (or each with .gz) into {self._raw()}"

    def _unpack(self) -> None:
        for path in self._missing():
            packed = path.with_name(f"{path.name}.gz")
            if os.path.isfile(packed):
                part = path.with_name(f"{path.name}.part")
                with gzip.open(packed) as source, part.open("wb") as target:
                    shutil.copyfileobj(source, target)
                part.replace(path)

    def _fetch(self, folder: str) -> None:
        self._source()(folder, download=True)

    def _train_size(self) -> int:
        path = self._raw() / "train-labels-idx1-ubyte"
        if not os.path.exists(path):
            return 60_000
        try:
            with path.open("rb") as file:
                magic, size = struct.unpack(">II", file.read(8))
        except (OSError, struct.error) as error:
            raise DatasetError(f"{path} cannot be read: {error}", self._hint()) from error
        if magic != 0x801:
            raise DatasetError(f"{path} is not a file of labels in idx format", self._hint())
        return int(size)

    def _read(self) -> tuple[ImageSet, ImageSet]:
        # Not through torchvision's class: it prefers a legacy `processed` folder, which the fingerprint does not cover.
        return self._part("train"), self._part("t10k")

    def _part(self, name: str) -> ImageSet:
        from torchvision.datasets.mnist import read_image_file, read_label_file

        images = read_image_file(str(self._raw() / f"{name}-images-idx3-ubyte"))
        labels = read_label_file(str(self._raw() / f"{name}-labels-idx1-ubyte"))
        return ImageSet(images[:, None], labels)


class FashionMNIST(MNIST):
    """Zalando's pieces of clothing: 60,000 training and 10,000 test images (1, 28, 28). Not in the paper."""

    title: ClassVar[str] = "FashionMNIST"
    epochs: ClassVar[int] = 8
    source: ClassVar[str] = "FashionMNIST"

    def info(self) -> DatasetInfo:
        """The metadata; the paper does not use this set, so target and trigger are those of MNIST."""
        return DatasetInfo(
            name="fashion_mnist",
            shape=(1, 28, 28),
            num_classes=10,
            train_size=self._limited(self._train_size()),
            mean=(0.2860,),
            std=(0.3530,),
            paper_target=0,
            paper_trigger="pixel",
            classes=(
                "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
                "Ankle boot",
            ),
        )  # fmt: skip


class CIFAR10(MixedSet):
    """Krizhevsky's CIFAR-10: 50,000 training and 10,000 test images (3, 32, 32).

    The batches are pickles. They are opened only after torchvision has verified the md5 sums of the published files, so
    that no other file is ever unpickled.
    """

    title: ClassVar[str] = "CIFAR-10"
    source: ClassVar[str] = "CIFAR10"

    def info(self) -> DatasetInfo:
        """The metadata; mean, std and augmentation are those of NONE's code."""
        return DatasetInfo(
            name="cifar10",
            shape=(3, 32, 32),
            num_classes=10,
            train_size=self._limited(50_000),
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2023, 0.1994, 0.2010),
            crop_padding=4,
            flip=True,
            paper_target=0,
            paper_trigger="dynamic",
            classes=(
                "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
            ),
        )  # fmt: skip

    def files(self) -> list[Path]:
        """The five training batches, the test batch and the file of class names."""
        self._require()
        return self._needed()

    def _sums(self) -> dict[Path, str]:
        source = self._source()
        base = self.folder() / str(source.base_folder)
        listed = [*source.train_list, *source.test_list, (source.meta["filename"], source.meta["md5"])]
        return {base / name: md5 for name, md5 in listed}

    def _needed(self) -> list[Path]:
        return list(self._sums())

    def _intact(self) -> bool:
        from torchvision.datasets.utils import check_integrity

        return all(check_integrity(path, md5) for path, md5 in self._sums().items())

    def _advice(self) -> str:
        names = ", ".join(path.name for path in self._needed())
        return f"unpack {self._source().filename} in {self.folder()}, so that {names} lie in {self._needed()[0].parent}"

    def _fetch(self, folder: str) -> None:
        self._source()(folder, download=True)

    def _read(self) -> tuple[ImageSet, ImageSet]:
        return self._part(train=True), self._part(train=False)

    def _part(self, *, train: bool) -> ImageSet:
        source = self._source()(str(self.folder()), train=train, download=False)
        images = torch.from_numpy(source.data).permute(0, 3, 1, 2).contiguous()
        return ImageSet(images, torch.tensor(source.targets, dtype=torch.int64))
