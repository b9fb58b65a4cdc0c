"""The adaptive attack on NONE (Eq. 9): training keeps the activations of triggered and benign images close."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from pydantic import Field

from backdoor_bench_none.api import (
    Batch,
    Combination,
    Context,
    DatasetInfo,
    History,
    Pixels,
    Trigger,
    TriggerAttack,
    VictimTask,
    find_layers,
    record_outputs,
    triggers,
)

if TYPE_CHECKING:
    from torch import Tensor


class Adaptive(TriggerAttack):
    """Fine-tunes a benign network with CE(F(x), y) + CE(F(x~), y_t) + alpha sum_i |I_i(x) - I_i(x~)|^2.

    Every batch has each of its images x also as triggered image x~, whatever its label: samples of the target class
    too. I_i are the pre-activations of every hidden convolution and linear layer. The paper does not say which layers,
    nor whether the squares are summed or averaged; the mean over a layer is the default, since with it the whole grid
    of Table 12 (1e-4 ... 1e-1) trains, and with sums it does not. The defender gets this network, and a training set
    with the trigger on a share of `poison_rate`.
    """

    paper: ClassVar[str] = "NONE, section 8.9"
    controls_training: ClassVar[bool] = True
    starts_from_benign: ClassVar[bool] = True

    alpha: float = Field(1e-3, ge=0, description="weight of the distance between activations")
    reduction: Literal["mean", "sum"] = Field("mean", description="how the squares of a layer are reduced")
    epochs: int | None = Field(None, ge=1, description="epochs of fine-tuning; default: half of the recipe's")
    lr: float | None = Field(None, gt=0, description="highest learning rate; default: a tenth of the recipe's")
    opacity: float = Field(1.0, gt=0, le=1, description="value of the mask of the watermark")

    def skip(self, cell: Combination) -> str | None:
        """Not with clients: each trains on its own data, and no party could fine-tune on all of them."""
        if cell.trainer.component.has_clients:
            return "its attacker trains on all data in one place"
        return super().skip(cell)

    def trigger(self, info: DatasetInfo) -> Trigger:
        """The watermark, as in section 8.9."""
        return triggers.watermark(info.shape, self.opacity)

    def train(self, task: VictimTask, context: Context) -> tuple[nn.Module, History]:
        """The benign network, fine-tuned on clean images and their triggered copies."""
        model, pixels = task.benign(), Pixels.of(task.info, context.device)
        first = pixels.normalize(task.original.images[:1])
        trigger = self.trigger(task.info)
        # once, and not in every step, where the device would wait for the host
        trigger = Trigger(trigger.mask.to(context.device), trigger.pattern.to(context.device))
        taps = {layer.name: layer.tap("pre_activation") for layer in find_layers(model, first)}

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            triggered = stamp_normalised(batch.images, trigger, pixels)
            wanted = self.relabel(batch.labels, task.info.num_classes)
            return adaptive_loss(model, batch.images, triggered, batch.labels, wanted, self.alpha, self.reduction, taps)

        epochs = self.epochs or max(1, task.recipe.epochs // 2)
        lr = self.lr or task.recipe.lr / 10
        history = task.fit(model, context, data=task.original, loss=loss, epochs=epochs, lr=lr)
        return model, history


def stamp_normalised(images: Tensor, trigger: Trigger, pixels: Pixels) -> Tensor:
    """Eq. 1 on normalised `images` (N, C, H, W)."""
    pattern = torch.addcmul(pixels.shift, trigger.pattern * 255, pixels.scale)
    return ((1 - trigger.mask) * images + trigger.mask * pattern).contiguous(memory_format=torch.channels_last)


def adaptive_loss(
    model: nn.Module,
    images: Tensor,
    triggered: Tensor,
    labels: Tensor,
    wanted: Tensor,
    alpha: float,
    reduction: str,
    taps: dict[str, str],
) -> Tensor:
    """Eq. 9 on a batch of normalised `images` and their `triggered` copies (N, C, H, W); one forward pass for both.

    `taps` are the modules whose outputs are I_i; their squared differences are averaged over the batch.
    """
    with record_outputs(model, taps, lambda module, output: output.clone()) as seen:
        clean_logits, triggered_logits = model(torch.cat([images, triggered])).chunk(2)
    loss = F.cross_entropy(clean_logits, labels) + F.cross_entropy(triggered_logits, wanted)
    if alpha:
        loss = loss + alpha * activation_distance(seen, reduction)
    return loss


def activation_distance(seen: dict[str, Tensor], reduction: str) -> Tensor:
    """The sum over layers of the squared differences between the two halves of each (2N, ...), averaged over images."""
    total = torch.zeros((), device=next(iter(seen.values())).device)
    for output in seen.values():
        clean, triggered = output.float().chunk(2)
        squares = (clean - triggered).square().flatten(1)
        reduced = squares.mean(1) if reduction == "mean" else squares.sum(1)
        total = total + reduced.mean()
    return total
