"""Base class of trainers, and the task of fitting a network to data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias

import torch
import torch.nn as nn
import torch.nn.functional as F

from backdoor_bench_none.contracts.builder import ModelBuilder
from backdoor_bench_none.contracts.component import Component
from backdoor_bench_none.contracts.context import Context
from backdoor_bench_none.contracts.dataset import DatasetInfo, ImageSet
from backdoor_bench_none.contracts.network import Pixels
from backdoor_bench_none.contracts.recipe import Recipe
from backdoor_bench_none.errors import TrainingError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """The data of one step on the device: normalised `images` (B, C, H, W), `labels` (B,) and `indices` (B,).

    `indices` refer to the training set.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor


#: computes the loss of a batch, a scalar that the loop differentiates
Loss: TypeAlias = "Callable[[nn.Module, Batch], Tensor]"
#: computes the loss of a batch, and leaves the gradients to step along in the parameters
Gradients: TypeAlias = "Callable[[nn.Module, Batch, Context], Tensor]"


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
    """A network to train in place, with its data and recipe; by default, plain training on all samples."""

    model: nn.Module
    data: TrainingData
    recipe: Recipe
    #: indices (k,) of the samples to train on; all of them by default
    keep: Tensor | None = None
    #: leave BatchNorm's running statistics as they are (its affine parameters still train)
    freeze_batchnorm: bool = False
    loss: Loss = cross_entropy
    #: used instead of differentiating `loss`
    gradients: Gradients | None = None
    #: the fields of the recipe that differ for single clients, by client; only for trainers with clients
    local: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)

    def indices(self) -> Tensor:
        """The indices (k,) int64 of the samples to train on, on the CPU."""
        if self.keep is None:
            return torch.arange(len(self.data.images))
        return self.keep.cpu()


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
    """The input of a trainer that pretrains a backbone."""

    #: builds networks for the cell's data set
    build: ModelBuilder
    #: reads the images to pretrain on, of separate classes where the data set has them, and returns the training task
    open: Callable[[], Fitting]


class Trainer(Component):
    """Base of all trainers, which fit a model to data; a defense trains only through its trainer.

    A trainer that `has_clients` divides the training set among clients. A trainer that `has_backbone` gives every
    network the weights of `pretrain`, except for the layer that makes the logits, and trains only that layer.
    """

    has_clients: ClassVar[bool] = False
    has_backbone: ClassVar[bool] = False

    def recipe(self) -> Mapping[str, Any]:
        """The fields of the training recipe that this trainer changes."""
        return {}

    def check(self, info: DatasetInfo) -> None:
        """Raise `ConfigError` if this trainer cannot train on that data set."""

    def split(self, labels: Tensor, num_classes: int, seed: int) -> Tensor:
        """The client (N,) int64 of every sample with these clean labels (N,), -1 for none; if there are clients."""
        raise NotImplementedError

    def pretrain(self, task: PretrainingTask, context: Context) -> nn.Module:
        """The network whose weights become the frozen backbone; if there is one.

        The layer that makes the logits is not part of the backbone.
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
