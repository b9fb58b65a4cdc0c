"""The attack `cross` and the defense `trim_losses`."""

from typing import ClassVar

import torch
from pydantic import Field

from backdoor_bench_none.api import (
    Context,
    DatasetInfo,
    Defense,
    DefenseResult,
    DefenseTask,
    Stage,
    Trigger,
    TriggerAttack,
)


class Cross(TriggerAttack):
    """Draws a cross one pixel wide over the whole image."""

    opacity: float = Field(0.5, gt=0, le=1, description="1 replaces the pixels, less blends with them")

    def trigger(self, info: DatasetInfo) -> Trigger:
        """White lines through the centre."""
        mask = torch.zeros(1, *info.shape[1:])
        mask[:, info.shape[1] // 2] = mask[:, :, info.shape[2] // 2] = self.opacity
        return Trigger(mask, torch.ones(info.shape))


class TrimLosses(Defense):
    """Trains for a few epochs, drops the samples with the smallest losses, and trains a new network on the others."""

    stage: ClassVar[Stage] = Stage.IN_TRAINING
    returns = ("flagged", "scores")
    fraction: float = Field(0.1, gt=0, lt=1, description="share of the training set that is dropped")
    warmup_epochs: int = Field(2, ge=1, description="epochs before the losses are compared")

    def run(self, task: DefenseTask, context: Context) -> DefenseResult:
        """The second network; `scores` are minus the losses, in the order of the training set."""
        scout = task.new_model()
        task.fit(scout, context.derive("scout"), epochs=self.warmup_epochs)
        losses = torch.nn.functional.cross_entropy(task.predict(scout, context), task.train.labels, reduction="none")
        flagged = torch.zeros_like(task.train.labels, dtype=torch.bool)
        flagged[losses.argsort()[: int(self.fraction * len(losses))]] = True
        model = task.new_model()
        task.fit(model, context, keep=torch.nonzero(~flagged).flatten())
        return DefenseResult(model, flagged, -losses)
