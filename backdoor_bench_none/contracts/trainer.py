"""What a trainer is, and what it is given to fit a network to data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backdoor_bench_none.contracts.builder import ModelBuilder
from backdoor_bench_none.contracts.component import Component
from backdoor_bench_none.contracts.context import Context
from backdoor_bench_none.contracts.dataset import DatasetInfo, ImageSet
from backdoor_bench_none.contracts.network import Pixels
from backdoor_bench_none.contracts.recipe import Recipe
from backdoor_bench_none.errors import TrainingError


@dataclass(frozen=True)
class Batch:
    """One step's data on the device: normalised `images` (B, C, H, W), `labels` (B,), and their `indices` (B,) in the
    training set.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor


#: computes the loss of a batch, a scalar that the loop differentiates
Loss = Callable[[nn.Module, Batch], Tensor]
#: computes the loss of a batch, and leaves the gradients to step along in the parameters
Gradients = Callable[[nn.Module, Batch, Context], Tensor]


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """The mean cross entropy of the batch."""
    return F.cross_entropy(model(batch.images), batch.labels)


@dataclass(frozen=True)
class TrainingData:
    """A training set on the device, and how its pixels are prepared."""

    images: ImageSet
    info: DatasetInfo
    pixels: Pixels
    #: the client (N,) int64 that holds each sample, on the CPU; None where all data are in one place
    clients: Tensor | None = None

    @classmethod
    def of(
        cls, images: ImageSet, info: DatasetInfo, device: torch.device, clients: Tensor | None = None
    ) -> TrainingData:
        """`images` moved to `device`."""
        return cls(images.to(device), info, Pixels.of(info, device), clients)

    def example(self) -> Tensor:
        """A normalised black image (1, C, H, W) on the device, to run a network on."""
        black = torch.zeros(1, *self.info.shape, dtype=torch.uint8, device=self.pixels.scale.device)
        return self.pixels.normalize(black)


@dataclass
class History:
    """The mean training loss of every epoch."""

    losses: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class FitTask:
    """A network to be trained in place, the data and the recipe; the defaults are plain training on all samples."""

    model: nn.Module
    data: TrainingData
    recipe: Recipe
    #: indices (k,) of the samples to train on; all of them by default
    keep: Tensor | None = None
    #: leave BatchNorm's running statistics as they are (its affine parameters still train)
    freeze_batchnorm: bool = False
    loss: Loss = cross_entropy
    #: in place of differentiating `loss`
    gradients: Gradients | None = None
    #: how single clients train, by client: fields of the recipe that differ; for trainers with clients only
    local: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)

    def indices(self) -> Tensor:
        """The indices (k,) int64 of the samples to train on, on the CPU."""
        return torch.arange(len(self.data.images)) if self.keep is None else self.keep.cpu()


class Fitting(Protocol):
    """The part of a `TrainingTask` that `Trainer.pretrain` uses."""

    @property
    def recipe(self) -> Recipe:
        """The recipe."""

    def new_model(self, draw: int = 0) -> nn.Module:
        """An initialised network."""

    def fit(self, model: nn.Module, context: Context, **recipe: Any) -> History:
        """Train `model` in place."""


@dataclass(frozen=True)
class PretrainingTask:
    """What a trainer with a backbone is given to make it."""

    #: makes networks for the cell's data set
    build: ModelBuilder
    #: reads the images to pretrain on, of separate classes where the data set has them, and returns the training task
    open: Callable[[], Fitting]


class Trainer(Component):
    """Base of all trainers: they fit a model to data; a defense trains through one and nothing else.

    One that `has_clients` divides the training set among them. One that `has_backbone` gives every network the weights
    of `pretrain`, except for the layer that makes the logits, and trains that alone.
    """

    has_clients: ClassVar[bool] = False
    has_backbone: ClassVar[bool] = False

    def recipe(self) -> Mapping[str, Any]:
        """The fields of the training recipe that this trainer needs changed."""
        return {}

    def check(self, info: DatasetInfo) -> None:
        """Raise `ConfigError` if this trainer cannot train on that data set."""

    def split(self, labels: Tensor, num_classes: int, seed: int) -> Tensor:
        """The client (N,) int64 of every sample with these clean labels (N,), -1 for none; if it has clients."""
        raise NotImplementedError

    def pretrain(self, task: PretrainingTask, context: Context) -> nn.Module:
        """The network whose weights, except for the layer that makes the logits, are the frozen backbone; if it has
        one.
        """
        raise NotImplementedError

    def fit(self, task: FitTask, context: Context) -> History:
        """Train `task.model` in place."""
        raise NotImplementedError


def check_learned(history: History, num_classes: int) -> None:
    """Raise `TrainingError` if the last epoch's loss is no better than guessing, ln K."""
    chance, last = math.log(num_classes), history.losses[-1]
    if last > 0.98 * chance:
        raise TrainingError(
            f"failed to train: the loss stayed at chance level ({last:.3f}, ln {num_classes} is {chance:.3f})",
            "change recipe.lr, recipe.clip_norm or recipe.epochs",
        )
