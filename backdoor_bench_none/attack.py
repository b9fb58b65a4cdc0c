"""What an attack is: it replaces training samples, and says which test samples it would turn into what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from backdoor_bench_none.component import Component
from backdoor_bench_none.data.dataset import DatasetInfo, ImageSet
from backdoor_bench_none.errors import ConfigError
from backdoor_bench_none.seeds import derive_seed
from backdoor_bench_none.trigger import Trigger

LabelMode = Literal["all_to_one", "all_to_all"]
#: images stamped at once, which bounds the memory of per-sample masks
STAMP_CHUNK = 4096


@dataclass(frozen=True)
class AttackTask:
    """What an attack is given: clean data, on the CPU, in original order, and a seed of its own."""

    data: ImageSet
    info: DatasetInfo
    seed: int


@dataclass(frozen=True)
class PoisonedSamples:
    """Samples that stand at `indices` (k,) int64 of the original set:
    `images` (k, C, H, W) uint8, `labels` (k,) int64.
    """

    indices: Tensor
    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    @classmethod
    def nothing(cls, like: ImageSet) -> Self:
        """No sample at all."""
        empty = torch.empty(0, dtype=torch.int64)
        return cls(empty, like.images[:0].cpu(), empty)

    def replace(self, data: ImageSet) -> ImageSet:
        """`data` with these samples in place of its own; `data` itself is left as it is."""
        images, labels = data.images.clone(), data.labels.clone()
        images[self.indices], labels[self.indices] = self.images, self.labels
        return ImageSet(images, labels)


class Attack(Component):
    """Base of all attacks. One that stamps a trigger is a `TriggerAttack`; other kinds override what is here."""

    def resolve(self, info: DatasetInfo) -> Self:
        """This attack with parameters left to the data set filled in, so that records and keys hold what was used."""
        return self

    def check(self, info: DatasetInfo) -> None:
        """Raise `ConfigError` if this resolved attack cannot be carried out on that data set."""

    def poison(self, task: AttackTask) -> PoisonedSamples:
        """The training samples that are replaced."""
        raise NotImplementedError

    def attack_test(self, task: AttackTask) -> PoisonedSamples:
        """The test samples whose label the attack would change,
        triggered, with the labels it wants: the denominator of ASR.
        """
        raise NotImplementedError

    def preview(self, task: AttackTask) -> Tensor:
        """Every image of `task.data` as the attack changes it at test time, whatever its label (N, C, H, W) uint8."""
        return task.data.images


class TriggerAttack(Attack):
    """An attack that stamps a trigger: write `trigger`, or `trigger_each` when every sample bears its own."""

    poison_rate: float = Field(0.05, ge=0, le=1, description="share of the whole training set that is poisoned")
    target: int | None = Field(
        None, ge=0, description="label all triggered images get; default: the paper's for the data set"
    )
    label_mode: LabelMode = Field(
        "all_to_one", description="all_to_one: every label becomes target; all_to_all: y becomes (y + 1) mod K"
    )

    def trigger(self, info: DatasetInfo) -> Trigger:
        """The trigger for images of `info.shape`."""
        raise NotImplementedError

    def trigger_each(self, info: DatasetInfo, indices: Tensor, seed: int) -> Trigger:
        """The triggers of the samples `indices` (N,): batched, or one for all. A function of (seed, index) alone."""
        return self.trigger(info)

    def resolve(self, info: DatasetInfo) -> Self:
        """Fill in the paper's target label; `all_to_all` has none."""
        target = None if self.label_mode == "all_to_all" else info.paper_target if self.target is None else self.target
        return self.model_copy(update={"target": target})

    def check(self, info: DatasetInfo) -> None:
        """The target is a class, the rate selects something, the trigger fits."""
        if self.target is not None and self.target >= info.num_classes:
            raise ConfigError(
                f"target {self.target} is not a class of {info.name}", f"its classes are 0 to {info.num_classes - 1}"
            )
        if self.poison_rate > 0 and round(self.poison_rate * info.train_size) == 0:
            raise ConfigError(
                f"poison_rate {self.poison_rate} selects none of the {info.train_size} training images of {info.name}",
                f"use at least {1 / info.train_size:.2g}, or the attack 'clean'",
            )
        self.trigger_each(info, torch.arange(1), seed=0)

    def select(self, labels: Tensor, seed: int) -> Tensor:
        """round(poison_rate * N) distinct indices in ascending order, drawn from the whole set."""
        count = round(self.poison_rate * len(labels))
        return torch.from_numpy(np.sort(np.random.default_rng(seed).choice(len(labels), count, replace=False)))

    def relabel(self, labels: Tensor, num_classes: int) -> Tensor:
        """The labels the attacker wants: `target`, or (y + 1) mod K (section 8.6)."""
        if self.label_mode == "all_to_all":
            return (labels + 1) % num_classes
        return torch.full_like(labels, self.target or 0)

    def stamp(self, images: Tensor, indices: Tensor, info: DatasetInfo, seed: int) -> Tensor:
        """`images` (N, C, H, W) uint8 of the samples `indices` (N,) with their triggers."""
        stamped = [
            self.trigger_each(info, chunk, seed).apply(images[start : start + len(chunk)])
            for start, chunk in _chunks(indices)
        ]
        return torch.cat(stamped) if stamped else images.clone()

    def poison(self, task: AttackTask) -> PoisonedSamples:
        """Stamp and relabel the selected samples."""
        indices = self.select(task.data.labels, derive_seed(task.seed, "select"))
        chosen = task.data.take(indices)
        images = self.stamp(chosen.images, indices, task.info, derive_seed(task.seed, "place"))
        return PoisonedSamples(indices, images, self.relabel(chosen.labels, task.info.num_classes))

    def attack_test(self, task: AttackTask) -> PoisonedSamples:
        """All samples whose label would change: for all-to-one those of other classes, for all-to-all every one."""
        wanted = self.relabel(task.data.labels, task.info.num_classes)
        indices = torch.nonzero(wanted != task.data.labels).flatten()
        images = self.stamp(task.data.images[indices], indices, task.info, derive_seed(task.seed, "place"))
        return PoisonedSamples(indices, images, wanted[indices])

    def preview(self, task: AttackTask) -> Tensor:
        """All images with their triggers."""
        return self.stamp(task.data.images, torch.arange(len(task.data)), task.info, derive_seed(task.seed, "place"))


def _chunks(indices: Tensor) -> list[tuple[int, Tensor]]:
    return [(start, indices[start : start + STAMP_CHUNK]) for start in range(0, len(indices), STAMP_CHUNK)]
