"""The toolbox's data sets, with its normalisation, its augmentation and its order of images."""

from __future__ import annotations

import csv
import itertools
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torchvision.datasets as tv
from pydantic import Field, field_validator

from backdoor_bench_none.api import CIFAR10 as PublishedCIFAR10  # noqa: N811
from backdoor_bench_none.api import GTSRB as PublishedGTSRB  # noqa: N811 - a name, not a constant
from backdoor_bench_none.api import DatasetInfo, Npz, Sample
from bbn_backdoorbench.words import DATASETS, HOME


def as_in_toolbox(info: DatasetInfo, name: str) -> DatasetInfo:
    """`info` with the toolbox's mean, std and augmentation of its data set `name`."""
    facts = DATASETS[name]
    return replace(
        info, name=f"backdoorbench:{name}", mean=facts.mean, std=facts.std, crop_padding=4, flip=facts.flip,
        paper_trigger="static",
    )  # fmt: skip


def data_folder(name: str) -> Path | None:
    """`data/<name>` of the user's checkout, if the environment names one."""
    home = os.environ.get(HOME)
    if not home:
        return None
    return Path(home).expanduser() / "data" / name


class _Toolbox:
    """Base of the toolbox's data sets: networks compute in float32, as in the toolbox, so that counts are equal."""

    toolbox_name: ClassVar[str]

    def recipe(self) -> Mapping[str, Any]:
        """float32."""
        return {**super().recipe(), "precision": "float32"}  # type: ignore[misc]

    def folder(self) -> Path:
        """`root`, else `data/<name>` of the checkout, else the usual folder for torchvision."""
        if self.root is None and (folder := data_folder(self.toolbox_name)) is not None:  # type: ignore[attr-defined]
            return folder
        return Path(super().folder())  # type: ignore[misc]


class CIFAR10(_Toolbox, PublishedCIFAR10):
    """CIFAR-10 as BackdoorBench sees it; `root` is the folder that holds cifar-10-batches-py, its `data/cifar10`."""

    toolbox_name: ClassVar[str] = "cifar10"

    def info(self) -> DatasetInfo:
        """The facts, with the toolbox's normalisation."""
        return as_in_toolbox(super().info(), self.toolbox_name)


class CIFAR100(_Toolbox, PublishedCIFAR10):
    """CIFAR-100 as BackdoorBench sees it; `root` is the folder that holds cifar-100-python, its `data/cifar100`."""

    title: ClassVar[str] = "CIFAR-100"
    source: ClassVar[Any] = tv.CIFAR100
    toolbox_name: ClassVar[str] = "cifar100"

    def info(self) -> DatasetInfo:
        """The facts, with the toolbox's normalisation."""
        return replace(as_in_toolbox(super().info(), self.toolbox_name), num_classes=100)


class GTSRB(_Toolbox, PublishedGTSRB):
    """GTSRB in BackdoorBench's layout, which is not downloaded.

    `root` holds Train/000xx/GT-000xx.csv and Test/GT-final_test.csv beside the images.
    """

    toolbox_name: ClassVar[str] = "gtsrb"

    def info(self) -> DatasetInfo:
        """The facts, with the toolbox's normalisation, which is none."""
        return as_in_toolbox(super().info(), self.toolbox_name)

    def _table(self) -> Path:
        return self.folder() / "Test" / "GT-final_test.csv"

    def _needed(self) -> list[Path]:
        lists = [self.folder() / "Train" / f"{label:05d}" / f"GT-{label:05d}.csv" for label in range(43)]
        return [*lists, self._table()]

    def _advice(self) -> str:
        return f"put Train/00000 to Train/00042 and Test, with their csv files, into {self.folder()}"

    def _shortage(self) -> str:
        return f"; for all of them {self._advice()}"

    def _fetch(self, folder: str) -> None:
        """Nothing; BackdoorBench has its own script for that."""

    def _unpack(self) -> None:
        """Nothing; there is no archive."""

    def _list(self) -> tuple[list[Sample], list[Sample]]:
        *train, test = self._needed()
        return list(itertools.chain.from_iterable(map(_listed, train))), _listed(test)


def _listed(path: Path) -> list[Sample]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter=";"))
    return [(str(path.parent / row["Filename"]), int(row["ClassId"])) for row in rows]


class Arrays(Npz):
    """The data set `npz`, normalised and augmented as one of the toolbox's sets.

    It is for a record that was made with other images in place of that set.
    """

    toolbox_name: str = Field("cifar10", description="the toolbox's data set that the arrays replace")

    @field_validator("toolbox_name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in DATASETS:
            raise ValueError(f"'{name}' is none of {', '.join(DATASETS)}")
        return name

    def info(self) -> DatasetInfo:
        """The facts, with the normalisation of that set."""
        return as_in_toolbox(super().info(), self.toolbox_name)

    def recipe(self) -> Mapping[str, Any]:
        """float32, as the toolbox computes."""
        return {**super().recipe(), "precision": "float32"}
