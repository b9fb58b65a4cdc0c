"""Anti-backdoor learning (Li et al., 2021): the samples that are learned first are isolated and unlearned."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from pydantic import Field

from backdoor_bench_none.api import Batch, Context, Defense, DefenseResult, DefenseTask, Stage

if TYPE_CHECKING:
    from torch import Tensor


class ABL(Defense):
    """Isolates the samples of lowest loss early in training, trains on the others, and unlearns the isolated ones.

    The first stage keeps the loss from falling below `gamma`: `lga` is local gradient ascent, sign(l - gamma) * l;
    `flooding` is |l - gamma| + gamma, the default of the authors' code. On the mean of a batch both take the same
    steps; `reduction: sample` is the paper's expectation over samples. Unlearning ascends on the isolated samples
    alone, as the code does, and stops once the network gives fewer than 1 / K of them their label: the loss it ascends
    has no bound.
    """

    paper: ClassVar[str] = "arXiv:2110.11571"
    stage: ClassVar[Stage] = Stage.IN_TRAINING
    returns: ClassVar[tuple[Literal["flagged", "scores", "infected"], ...]] = ("flagged", "scores")

    isolation: Literal["lga", "flooding"] = Field("lga", description="loss of the first stage")
    reduction: Literal["batch", "sample"] = Field(
        "batch", description="what is compared with gamma: the batch's mean loss, or each sample's"
    )
    gamma: float = Field(0.5, ge=0, description="loss below which the first stage ascends")
    isolation_epochs: int | None = Field(
        None, ge=1, description="epochs of the first stage; default: a fifth of the recipe's, as 20 of 100"
    )
    isolation_fraction: float = Field(0.01, gt=0, lt=1, description="share of the training set that is isolated")
    tuning_epochs: int | None = Field(None, ge=0, description="epochs on the other samples; default: the recipe's")
    unlearning_epochs: int = Field(5, ge=0, description="highest number of ascent passes over the isolated samples")
    unlearning_lr: float = Field(5e-4, gt=0, description="constant learning rate of the ascent")

    def run(self, task: DefenseTask, context: Context) -> DefenseResult:
        """The network; `flagged` are the isolated samples, `scores` are minus the losses after the first stage."""
        count = int(self.isolation_fraction * len(task.train))
        if count == 0:
            hint = f"raise isolation_fraction above {1 / len(task.train):.2g}"
            raise ValueError(
                f"abl: isolation_fraction {self.isolation_fraction} selects none of {len(task.train)} samples; {hint}"
            )
        model = task.new_model()
        epochs = self.isolation_epochs or max(1, round(task.recipe.epochs / 5))
        task.fit(
            model,
            context.derive("isolate"),
            loss=self.isolation_loss,
            epochs=epochs,
            schedule="constant",
            augment=False,
        )
        losses = self.sample_losses(model, task, context)
        isolated = losses.argsort(stable=True)[:count]
        flagged = torch.zeros(len(losses), dtype=torch.bool, device=losses.device)
        flagged[isolated] = True
        self._tune(model, torch.nonzero(~flagged).flatten(), task, context.derive("tune"))
        passes = self._unlearn(model, isolated, task, context)
        extras = {"isolated": count, "unlearning_passes": passes, "highest_isolated_loss": float(losses[isolated[-1]])}
        return DefenseResult(model, flagged, -losses, extras=extras)

    def isolation_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The first stage's loss, on the batch's mean or on every sample."""
        losses = F.cross_entropy(model(batch.images), batch.labels, reduction="none")
        compared = losses.mean() if self.reduction == "batch" else losses
        if self.isolation == "flooding":
            return ((compared - self.gamma).abs() + self.gamma).mean()
        return (torch.sign(compared - self.gamma).detach() * compared).mean()

    def sample_losses(self, model: nn.Module, task: DefenseTask, context: Context) -> Tensor:
        """Cross entropy (N,) float64 of every training sample, in eval mode and in order.

        Raises `ValueError` if one is not finite.
        """
        logits = task.predict(model, context)
        # in float32 all losses below 1e-7 are 0, which would tie the samples that are learned best
        losses = F.cross_entropy(logits.double(), task.train.labels.to(logits.device), reduction="none")
        if not bool(torch.isfinite(losses).all()):
            raise ValueError("abl: the losses after the first stage are not finite; lower the recipe's lr")
        return losses

    def _tune(self, model: nn.Module, keep: Tensor, task: DefenseTask, context: Context) -> None:
        epochs = self.tuning_epochs
        if epochs is None:
            epochs = task.recipe.epochs
        if epochs:
            task.fit(model, context, keep=keep, epochs=epochs)

    def _unlearn(self, model: nn.Module, isolated: Tensor, task: DefenseTask, context: Context) -> int:
        """Ascend on the isolated samples, pass by pass; returns the number of passes."""
        some = task.train.take(isolated)
        for index in range(self.unlearning_epochs):
            accuracy = (task.predict(model, context, some).argmax(1) == some.labels).float().mean()
            if accuracy < 1 / task.info.num_classes:
                return index
            task.fit(
                model, context.derive("unlearn", index), data=some, loss=ascent, epochs=1, lr=self.unlearning_lr,
                schedule="constant", augment=False, drop_last=False, freeze_batchnorm=len(some) == 1,
            )  # fmt: skip
        return self.unlearning_epochs


def ascent(model: nn.Module, batch: Batch) -> Tensor:
    """Minus the mean cross entropy."""
    return -F.cross_entropy(model(batch.images), batch.labels)
