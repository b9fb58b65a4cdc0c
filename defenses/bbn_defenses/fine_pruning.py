"""Fine-pruning (Liu et al., 2018): channels that are inactive on clean images are removed, then comes fine-tuning."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn as nn
from pydantic import Field

from backdoor_bench_none.api import (
    Batch,
    Context,
    Defense,
    DefenseResult,
    DefenseTask,
    Stage,
    collect_features,
    cross_entropy,
    find_logits_layer,
)

if TYPE_CHECKING:
    from torch import Tensor


class FinePruning(Defense):
    """Removes the last layer's least active inputs while accuracy falls by at most `tolerance`, then fine-tunes.

    Activity and accuracy are those on the clean images. A removed channel stays removed: its outgoing weights are held
    at zero.
    """

    paper: ClassVar[str] = "arXiv:1805.12185"
    stage: ClassVar[Stage] = Stage.POST_TRAINING
    starts_from_victim: ClassVar[bool] = True

    clean_fraction: float = Field(
        0.05, gt=0, lt=1, description="share of the training set granted as trusted clean images"
    )
    tolerance: float = Field(0.04, ge=0, lt=1, description="highest loss of accuracy on the clean images by pruning")
    steps: int = Field(32, ge=1, description="pruning stops at one of this many equal steps")
    epochs: int = Field(20, ge=0, description="passes of the fine-tuning over the clean images")
    batch_size: int = Field(64, ge=1, description="images per step")
    lr: float | None = Field(None, gt=0, description="constant learning rate; default: a tenth of the recipe's highest")

    def run(self, task: DefenseTask, context: Context) -> DefenseResult:
        """The pruned and fine-tuned network; `pruned` channels of `channels` in extras."""
        assert task.clean is not None
        model, data = task.victim(), task.training_data(task.clean, context)
        features = collect_features(model, data.images.images, data.pixels, replace(context, amp=None))
        channels = features.shape[1]
        head = find_logits_layer(model, data.pixels.normalize(data.images.images[:1]))
        pruned = self._choose(model, head, features.mean(0).argsort(stable=True), task, context)
        prune_inputs(head, pruned, channels)

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            prune_inputs(head, pruned, channels)
            return cross_entropy(model, batch)

        if self.epochs:
            options: dict[str, Any] = {
                "epochs": self.epochs,
                "batch_size": self.batch_size,
                "lr": self.lr or task.recipe.lr / 10,
            }
            task.fit(model, context, data=task.clean, loss=loss, schedule="constant", **options)
        prune_inputs(head, pruned, channels)
        return DefenseResult(model, extras={"pruned": len(pruned), "channels": channels})

    def _choose(self, model: nn.Module, head: nn.Module, order: Tensor, task: DefenseTask, context: Context) -> Tensor:
        """As many channels of `order` as the tolerance allows; the weights are restored."""
        weight = head.weight
        assert isinstance(weight, torch.Tensor)
        before = weight.detach().clone()
        least = self._accuracy(model, task, context) - self.tolerance
        chosen = order[:0]
        for step in range(1, self.steps):
            tried = order[: round(step * len(order) / self.steps)]
            prune_inputs(head, tried, len(order))
            if self._accuracy(model, task, context) < least:
                break
            chosen = tried
        with torch.no_grad():
            weight.copy_(before)
        return chosen

    def _accuracy(self, model: nn.Module, task: DefenseTask, context: Context) -> float:
        assert task.clean is not None
        logits = task.predict(model, context, task.clean)
        return float((logits.argmax(1) == task.clean.labels).float().mean())


def prune_inputs(head: nn.Module, channels: Tensor, total: int) -> None:
    """Set the weights of `head` from `channels` (k,) of `total` to zero.

    A flattened map has a block of columns for each channel.
    """
    weight = head.weight
    assert isinstance(weight, torch.Tensor)
    with torch.no_grad():
        weight.view(len(weight), total, -1)[:, channels] = 0
