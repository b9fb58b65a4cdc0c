"""The task that attackers who train and defenders share: data, a recipe, and the means to train."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch.nn as nn

from backdoor_bench_none.contracts.builder import ModelBuilder
from backdoor_bench_none.contracts.context import Context
from backdoor_bench_none.contracts.dataset import DatasetInfo, ImageSet
from backdoor_bench_none.contracts.network import predict_logits
from backdoor_bench_none.contracts.recipe import Recipe
from backdoor_bench_none.contracts.trainer import (
    FitTask,
    Gradients,
    History,
    Loss,
    Trainer,
    TrainingData,
    cross_entropy,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TrainingTask:
    """A training set on the device, and the means to train on it. Indices refer to `train` in its original order."""

    train: ImageSet
    info: DatasetInfo
    recipe: Recipe
    trainer: Trainer
    build: ModelBuilder
    #: the client (N,) int64 that holds each sample of `train`, -1 for none; None where all data are in one place
    clients: Tensor | None = None

    def new_model(self, draw: int = 0) -> nn.Module:
        """An initialised network of the cell's architecture and activation, on the device.

        Draw 0 gives the initial weights that the victim and every defense share; other draws give others.
        """
        return self.build(draw)

    def fit(
        self,
        model: nn.Module,
        context: Context,
        *,
        data: ImageSet | None = None,
        keep: Tensor | None = None,
        freeze_batchnorm: bool = False,
        loss: Loss = cross_entropy,
        gradients: Gradients | None = None,
        **recipe: Any,
    ) -> History:
        """Train `model` in place by the cell's trainer and recipe.

        `data` (default `train`) is the set to train on; `keep` (k,) int64 are the indices of its samples to use. `loss`
        is differentiated, unless `gradients` computes the gradients itself. Other keyword arguments change the recipe,
        as in `epochs=5`.
        """
        training_data, changed = self.training_data(data, context), self.changed(recipe)
        task = FitTask(model, training_data, changed, keep, freeze_batchnorm, loss, gradients)
        return self.trainer.fit(task, context)

    def changed(self, recipe: dict[str, Any]) -> Recipe:
        """The cell's recipe with these fields changed."""
        return Recipe(**{**self.recipe.model_dump(), **recipe})

    def training_data(self, data: ImageSet | None, context: Context) -> TrainingData:
        """`data` (default `train`) with the normalisation and augmentation of the data set."""
        if data is None:
            return TrainingData.of(self.train, self.info, context.device, self.clients)
        return TrainingData.of(data, self.info, context.device)

    def predict(self, model: nn.Module, context: Context, data: ImageSet | None = None) -> Tensor:
        """Logits (N, K) float32 of `data` (default `train`) in its order.

        The model runs in eval mode and in float32, without augmentation.
        """
        prepared = self.training_data(data, context)
        return predict_logits(model, prepared.images.images, prepared.pixels, replace(context, amp=None))
