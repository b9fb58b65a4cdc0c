"""Base classes and data structures of attacks.

An attack replaces training samples, and names the test samples whose label it would change. It may also craft samples
with a network, train the victim itself, or search every finished network for a trigger.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import numpy as np
import torch
import torch.nn as nn
from pydantic import Field, field_validator

from backdoor_bench_none.contracts.architecture import Architecture
from backdoor_bench_none.contracts.component import Combination, Component
from backdoor_bench_none.contracts.context import Context
from backdoor_bench_none.contracts.dataset import DatasetInfo, ImageSet
from backdoor_bench_none.contracts.network import Pixels, predict_logits
from backdoor_bench_none.contracts.task import TrainingTask
from backdoor_bench_none.contracts.trainer import History, Trainer, check_learned
from backdoor_bench_none.contracts.trigger import PlacedTiles, Trigger
from backdoor_bench_none.errors import ConfigError
from backdoor_bench_none.seeds import derive_seed

if TYPE_CHECKING:
    from torch import Tensor

LabelMode = Literal["all_to_one", "all_to_all", "clean_label"]
#: images stamped at once: few enough to stay in the cache
STAMP_CHUNK = 256


@dataclass(frozen=True)
class AttackTask:
    """The input of an attack: clean data on the CPU, in the original order. Attacks draw from `context.seed`."""

    data: ImageSet
    info: DatasetInfo
    #: the network requested by `crafted_with` or `needs_backbone`, in eval mode, on the device of `context`
    network: nn.Module | None = None
    #: the client (N,) int64 that holds each sample, for attacks with `needs_clients`
    clients: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class VictimTask(TrainingTask):
    """The input of an attacker who controls training: `train` as the defender will get it, and the clean set."""

    #: the training set before it was poisoned, on the device
    original: ImageSet
    #: indices (k,) of the poisoned samples
    poisoned: Tensor
    #: None unless the attack declares `starts_from_benign`
    benign_weights: Mapping[str, Tensor] | None = field(default=None, repr=False)

    def benign(self) -> nn.Module:
        """The victim of the attack `clean`: trained on the clean set by the cell's recipe, in eval mode."""
        if self.benign_weights is None:
            raise ConfigError("this attack uses the benign network without declaring it", "set starts_from_benign")
        return self.build.load(self.benign_weights)


@dataclass(frozen=True)
class SearchTask:
    """The input of an attack that searches a finished network, which is in eval mode: clean images, on the device."""

    model: nn.Module
    train: ImageSet
    info: DatasetInfo

    def predict(self, images: Tensor, context: Context) -> Tensor:
        """Logits (N, K) float32 of `images` (N, C, H, W) uint8, in float32."""
        pixels = Pixels.of(self.info, context.device)
        return predict_logits(self.model, images, pixels, replace(context, amp=None))


@dataclass(frozen=True)
class FoundTriggers:
    """Triggers found in a network, and the label that each gives to images of other classes.

    `masks` (A, 1, H, W) and `patterns` (A, C, H, W) are in [0, 1]; `labels` (A,) int64 are -1 where the search found no
    trigger. `facts` go into the record.
    """

    masks: Tensor
    patterns: Tensor
    labels: Tensor
    facts: tuple[Mapping[str, Any], ...]

    def stamp(self, index: int, test: ImageSet) -> PoisonedSamples:
        """The test images of other classes with trigger `index`; all of them, unchanged, if there is none."""
        label = int(self.labels[index])
        indices = torch.nonzero(test.labels != label).flatten()
        images = Trigger(self.masks[index], self.patterns[index]).apply(test.images[indices])
        return PoisonedSamples(indices, images, torch.full_like(indices, label))


class Crafter(Component):
    """A network for crafting samples, trained once on the clean training set for all attacks that share it."""

    def architecture(self) -> Architecture:
        """The architecture of the network; its activation function is ReLU."""
        raise NotImplementedError

    def train(self, task: TrainingTask, context: Context) -> nn.Module:
        """The trained network, from `task.new_model`; the recipe is that of the data set and the architecture."""
        raise NotImplementedError


@dataclass(frozen=True)
class PoisonedSamples:
    """Replacements for the samples `indices` (k,) int64: `images` (k, C, H, W) uint8 and `labels` (k,) int64."""

    indices: Tensor
    images: Tensor
    labels: Tensor
    #: (k,) bool: samples changed to mislead a defender, which teach no trigger and count as neither poisoned nor
    #: benign; None if there are none
    decoys: Tensor | None = None

    def __len__(self) -> int:
        return len(self.indices)

    @classmethod
    def nothing(cls, like: ImageSet) -> Self:
        """An empty set of samples."""
        empty = torch.empty(0, dtype=torch.int64)
        return cls(empty, like.images[:0].cpu(), empty)

    def replace(self, data: ImageSet) -> ImageSet:
        """A copy of `data` with these samples in place of the original ones."""
        images, labels = data.images.clone(), data.labels.clone()
        images[self.indices], labels[self.indices] = self.images, self.labels
        return ImageSet(images, labels)


class Attack(Component):
    """Base of all attacks; those that stamp a trigger derive from `TriggerAttack`, others override these methods."""

    #: whether training samples are replaced; if not, networks trained on the data are those of the attack `clean`
    poisons: ClassVar[bool] = True
    #: whether the attacker trains the victim: implement `train`
    controls_training: ClassVar[bool] = False
    #: whether `train` starts from the network of the attack `clean`
    starts_from_benign: ClassVar[bool] = False
    #: whether the trigger is found in each finished network: implement `find_triggers`
    searches: ClassVar[bool] = False
    #: whether it needs to know the frozen backbone of the victim
    needs_backbone: ClassVar[bool] = False
    #: whether it needs to know which client holds which sample
    needs_clients: ClassVar[bool] = False

    @classmethod
    def facts(cls) -> Mapping[str, str]:
        """The capabilities of the attacker."""
        powers = {
            "poisons the training set": cls.poisons,
            "trains the victim": cls.controls_training,
            "searches every finished network": cls.searches,
            "knows the frozen backbone": cls.needs_backbone,
            "controls clients": cls.needs_clients,
        }
        return {"attacker": ", ".join(power for power, has in powers.items() if has) or "does nothing"}

    def resolve(self, info: DatasetInfo) -> Self:
        """This attack with the data set's defaults filled in, so that records and keys hold the values used."""
        return self

    def check(self, info: DatasetInfo) -> None:
        """Raise `ConfigError` if this resolved attack cannot be carried out on that data set."""

    def check_trainer(self, trainer: Trainer) -> None:
        """Raise `ConfigError` if this attack cannot be carried out with the parameters of that trainer."""

    def skip(self, cell: Combination) -> str | None:
        """The reason to skip the cell if its trainer lacks what the attack needs; None otherwise."""
        trainer: Trainer = cell.trainer.component
        if self.needs_backbone and not trainer.has_backbone:
            return f"{cell.attack.name} needs a trainer with a frozen backbone, such as transfer"
        if self.needs_clients and not trainer.has_clients:
            return f"{cell.attack.name} needs a trainer with clients, such as federated"
        return None

    def crafted_with(self) -> Crafter | None:
        """The crafter of the network that `poison` receives; None if it needs none."""
        return None

    def poison(self, task: AttackTask, context: Context) -> PoisonedSamples:
        """The replacements for training samples."""
        if self.poisons:
            raise NotImplementedError
        return PoisonedSamples.nothing(task.data)

    def train(self, task: VictimTask, context: Context) -> tuple[nn.Module, History]:
        """The victim and its history; an attack that returns another structure also overrides `adapt`."""
        model = task.new_model()
        history = task.fit(model, context)
        check_learned(history, task.info.num_classes)
        return model, history

    def adapt(self, model: nn.Module, info: DatasetInfo) -> nn.Module:
        """The structure of the victim, built from one of the cell's networks; `model` itself by default."""
        return model

    def attack_test(self, task: AttackTask, context: Context) -> PoisonedSamples:
        """The test samples whose label the attack would change, triggered and relabelled: the denominator of ASR."""
        if not self.searches:
            raise NotImplementedError
        return PoisonedSamples.nothing(task.data)

    def find_triggers(self, task: SearchTask, context: Context) -> FoundTriggers:
        """The triggers of a finished network, defended or not; ASR is taken over all of them together."""
        raise NotImplementedError

    def preview(self, task: AttackTask, context: Context) -> Tensor:
        """All images of `task.data` (N, C, H, W) uint8, whatever their label, as the attack changes them in testing."""
        return task.data.images


class StampAttack(Attack):
    """Base of attacks that stamp test images with a trigger known in advance.

    Implement `trigger`; or `trigger_each` if every sample has its own trigger; or `stamp` for a change that is not a
    trigger of Eq. 1.
    """

    target: Annotated[int, Field(ge=0)] | str | None = Field(
        None, description="class of all triggered images, as its label or its name; default: the paper's"
    )
    label_mode: LabelMode = Field(
        "all_to_one", description="all_to_one: every label becomes target; all_to_all: y becomes (y + 1) mod K"
    )

    @field_validator("label_mode")
    @classmethod
    def _check_mode(cls, mode: LabelMode) -> LabelMode:
        if mode == "clean_label":
            raise ValueError("this attack changes labels: all_to_one or all_to_all")
        return mode

    @property
    def target_label(self) -> int:
        """The label of the target, 0 where there is none; `ValueError` if it is a name that `resolve` has not seen."""
        if isinstance(self.target, str):
            raise ValueError(f"the class '{self.target}' has no label before `resolve`")
        return self.target or 0

    def trigger(self, info: DatasetInfo) -> Trigger:
        """The trigger for images of `info.shape`."""
        raise NotImplementedError

    def trigger_each(self, info: DatasetInfo, indices: Tensor, seed: int) -> Trigger | PlacedTiles:
        """The triggers of the samples `indices` (N,), batched or one for all; each depends on (seed, index) alone."""
        return self.trigger(info)

    def fixed_trigger(self, info: DatasetInfo) -> Trigger | None:
        """The trigger of all images; None if each has its own, or a change that is no trigger of Eq. 1."""
        if type(self).stamp is not StampAttack.stamp:
            return None
        trigger = self.trigger_each(info, torch.arange(2), seed=0)
        if not isinstance(trigger, Trigger) or max(trigger.mask.dim(), trigger.pattern.dim()) > len(info.shape):
            return None
        return trigger

    def resolve(self, info: DatasetInfo) -> Self:
        """Fill in the label of the target, by default the paper's; `all_to_all` has none."""
        target = self.target
        if self.label_mode == "all_to_all":
            target = None
        else:
            target = info.label_of(info.paper_target if target is None else target, "target")
        return self.model_copy(update={"target": target})

    def check(self, info: DatasetInfo) -> None:
        """Check that the target is a class and that the trigger fits the images."""
        if self.target is not None:
            info.label_of(self.target, "target")
        self.check_trigger(info)

    def check_trigger(self, info: DatasetInfo) -> None:
        """Raise `ConfigError` if the trigger does not fit the images.

        It stamps one, which is right for every attack. An attack that can tell from its parameters overrides it, and
        is planned faster.
        """
        black = torch.zeros(1, *info.shape, dtype=torch.uint8)
        self.stamp(black, torch.arange(1), info, seed=0)

    def relabel(self, labels: Tensor, num_classes: int) -> Tensor:
        """The labels the attacker wants: `target`, or (y + 1) mod K (section 8.6)."""
        if self.label_mode == "all_to_all":
            return (labels + 1) % num_classes
        return torch.full_like(labels, self.target_label)

    def stamp(self, images: Tensor, indices: Tensor, info: DatasetInfo, seed: int) -> Tensor:
        """`images` (N, C, H, W) uint8 of the samples `indices` (N,) with their triggers."""
        return stamp_in_chunks(images, lambda part: self.trigger_each(info, indices[part], seed))

    def attack_test(self, task: AttackTask, context: Context) -> PoisonedSamples:
        """All samples whose label would change: for all-to-one those of other classes, for all-to-all every one."""
        wanted = self.relabel(task.data.labels, task.info.num_classes)
        indices = torch.nonzero(wanted != task.data.labels).flatten()
        images = self.stamp(task.data.images[indices], indices, task.info, derive_seed(context.seed, "place"))
        return PoisonedSamples(indices, images, wanted[indices])

    def preview(self, task: AttackTask, context: Context) -> Tensor:
        """All images with their triggers."""
        return self.stamp(task.data.images, torch.arange(len(task.data)), task.info, derive_seed(context.seed, "place"))


class TriggerAttack(StampAttack):
    """Base of dirty-label attacks: training samples get the trigger and the label that the attacker wants."""

    poison_rate: float = Field(0.05, ge=0, le=1, description="share of the whole training set that is poisoned")
    exclude_target: bool = Field(False, description="all_to_one: draw no samples of the target class")

    def check(self, info: DatasetInfo) -> None:
        """Check also that the rate selects at least one sample."""
        super().check(info)
        check_rates(info, poison_rate=self.poison_rate)

    def select(self, labels: Tensor, seed: int) -> Tensor:
        """round(poison_rate * N) distinct indices in ascending order, drawn from the whole set."""
        count = round(self.poison_rate * len(labels))
        if not self.exclude_target or self.target is None:
            return draw_indices(torch.arange(len(labels)), count, seed)
        return draw_indices(torch.nonzero(labels != self.target_label).flatten(), count, seed)

    def poison(self, task: AttackTask, context: Context) -> PoisonedSamples:
        """Stamp and relabel the selected samples."""
        indices = self.select(task.data.labels, derive_seed(context.seed, "select"))
        chosen = task.data.take(indices)
        images = self.stamp(chosen.images, indices, task.info, derive_seed(context.seed, "place"))
        return PoisonedSamples(indices, images, self.relabel(chosen.labels, task.info.num_classes))


class CleanLabelAttack(StampAttack):
    """Base of clean-label attacks: samples of the target class get the trigger and keep their label.

    `class_rate` is a share of the target class, as in Turner et al.; other toolboxes use a share of the whole set. 5 %
    of one of ten classes is 0.5 % of the data.
    """

    label_mode: LabelMode = Field("clean_label", description="always clean_label: no label is changed")
    class_rate: float = Field(0.05, gt=0, le=1, description="share of the target class that is poisoned")

    @field_validator("label_mode")
    @classmethod
    def _check_mode(cls, mode: LabelMode) -> LabelMode:
        if mode != "clean_label":
            raise ValueError(f"a clean-label attack changes no label, so it cannot be {mode}")
        return mode

    def check(self, info: DatasetInfo) -> None:
        """Check also that the rate selects at least one sample of a class of average size."""
        super().check(info)
        size = info.train_size / info.num_classes
        if round(self.class_rate * size) == 0:
            raise ConfigError(
                f"class_rate {self.class_rate} selects none of the about {size:.0f} training images per class of "
                f"{info.name}",
                f"use at least {1 / size:.2g}",
            )

    def select(self, labels: Tensor, seed: int) -> Tensor:
        """round(class_rate * n) distinct indices of the n samples of the target class, in ascending order."""
        of_target = torch.nonzero(labels == self.target_label).flatten()
        count = round(self.class_rate * len(of_target))
        if count == 0:
            raise ConfigError(
                f"class_rate {self.class_rate} selects none of the {len(of_target)} samples of class {self.target}",
                "raise class_rate",
            )
        return draw_indices(of_target, count, seed)

    def craft(self, chosen: ImageSet, indices: Tensor, task: AttackTask, context: Context) -> Tensor:
        """The images that replace `chosen`, the samples `indices` (k,), in the training set; stamped by default."""
        return self.stamp(chosen.images, indices, task.info, derive_seed(context.seed, "place"))

    def poison(self, task: AttackTask, context: Context) -> PoisonedSamples:
        """Craft the selected samples."""
        indices = self.select(task.data.labels, derive_seed(context.seed, "select"))
        chosen = task.data.take(indices)
        return PoisonedSamples(indices, self.craft(chosen, indices, task, context), chosen.labels)


def check_rates(info: DatasetInfo, **rates: float) -> None:
    """Raise `ConfigError` if a share of the training set, unless 0, selects nothing, or all together too much."""
    counts = {name: round(rate * info.train_size) for name, rate in rates.items()}
    for name, count in counts.items():
        if rates[name] > 0 and count == 0:
            raise ConfigError(
                f"{name} {rates[name]} selects none of the {info.train_size} training images of {info.name}",
                f"use at least {1 / info.train_size:.2g}, or 0",
            )
    if sum(counts.values()) > info.train_size:
        raise ConfigError(
            f"{' and '.join(counts)} select {sum(counts.values())} of the {info.train_size} training images of "
            f"{info.name}",
            "lower them",
        )


def draw_indices(eligible: Tensor, count: int, seed: int) -> Tensor:
    """`count` distinct elements of `eligible` (n,) int64, in ascending order; `ConfigError` if there are too few."""
    if count > len(eligible):
        raise ConfigError(
            f"{count} samples are to be poisoned, but only {len(eligible)} are eligible", "lower the poisoning rate"
        )
    drawn = np.random.default_rng(seed).choice(len(eligible), count, replace=False)
    return eligible[torch.from_numpy(np.sort(drawn))]


def stamp_in_chunks(images: Tensor, trigger_of: Callable[[slice], Trigger | PlacedTiles]) -> Tensor:
    """`images` (N, C, H, W) uint8, each slice stamped with the trigger that `trigger_of` returns for it."""
    stamped = torch.empty_like(images)
    for start in range(0, len(images), STAMP_CHUNK):
        part = slice(start, start + STAMP_CHUNK)
        stamped[part] = trigger_of(part).apply(images[part])
    return stamped
