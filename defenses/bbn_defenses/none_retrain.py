"""NONE's filter with another repair: a fresh network is trained on what is kept."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn as nn
from pydantic import Field

from backdoor_bench_none.api import (
    Context,
    Defense,
    DefenseResult,
    DefenseTask,
    Stage,
    Tap,
    TrainingError,
    check_learned,
    collect_activations,
    find_layers,
)
from bbn_defenses.compromised_neurons import (
    MAD_TO_DEVIATION,
    confidence_gaps,
    count_share,
    flag_above_break,
    rank_neurons,
    standardize_robustly,
)

if TYPE_CHECKING:
    from torch import Tensor

#: the highest robust deviation of a value: one neuron that is silent on nearly all samples does not decide alone
LIMIT = 10.0


class NONERetrain(Defense):
    """NONE's filter on robust, two-sided scores; instead of resetting neurons, a fresh network is trained on the rest.

    NONE finds the poisoned samples also in networks without batch normalisation, but its reset does not unlearn them
    there. A score sums how far a sample's neurons are from their medians, in either direction: NONE asks for high
    values, and blended poison has low ones. Values of a neuron count in its median absolute deviations, so that no
    layer weighs more. `cut` says which scores are too high. The natural break finds nearly all poison, and flags a
    tenth to a third of the benign samples too; so a network is trained for a short time on the others, and flagged
    samples whose label it predicts come back, since a network without the backdoor does not give poisoned samples their
    label. Then a fresh network is trained on what is kept, by the cell's recipe.

    With `screening` a quarter it costs about one training more than no defense.
    """

    paper: ClassVar[str] = "the filter: arXiv:2202.06382; scores and repair are this project's"
    stage: ClassVar[Stage] = Stage.IN_TRAINING
    starts_from_victim: ClassVar[bool] = True
    returns: ClassVar[tuple[Literal["flagged", "scores", "infected"], ...]] = ("flagged", "scores")

    sides: Literal["both", "high"] = Field(
        "both", description="both: values far from the median on either side; high: above it only, as NONE"
    )
    r2: float = Field(
        0.1, gt=0, le=1, description="share of each layer's neurons, ranked as by NONE, that find samples; 1: all"
    )
    cut: Literal["break", "outliers"] = Field(
        "break", description="break: scores above the natural break; outliers: `deviations` above the median"
    )
    deviations: float = Field(3.0, gt=0, description="outliers: robust deviations above the median; NONE's lambda")
    screening: float = Field(
        0.25,
        ge=0,
        le=1,
        description="share of the recipe's epochs for the network that says which flagged samples come back; 0: none",
    )
    lambda_l: float = Field(0.1, gt=0, lt=1, description="ranking: unsure of a class below this probability")
    lambda_h: float = Field(0.9, gt=0, lt=1, description="ranking: sure of a class above this probability")
    tap: Tap = Field(
        "pre_activation", description="value of a neuron: behind its norm (pre_activation), or before it (convolution)"
    )

    def run(self, task: DefenseTask, context: Context) -> DefenseResult:
        """The network trained on the samples that are kept in the end, and the others with their scores."""
        scores = self.score(task.victim(), task, context)
        flagged_first = self.choose(scores)
        flagged = flagged_first
        if self.screening and bool(flagged.any()):
            flagged = flagged & ~self._agreed(flagged, task, context)
        _warn_of_losses(flagged, task)
        model = task.new_model(1)
        task.fit(model, context.derive("retrain", 1), keep=torch.nonzero(~flagged).flatten())
        counts = {"flagged_first": int(flagged_first.sum()), "flagged": int(flagged.sum())}
        return DefenseResult(model.eval(), flagged, scores, extras=counts)

    def score(self, model: nn.Module, task: DefenseTask, context: Context) -> Tensor:
        """How far the neurons of each sample are from their medians, (N,) float64: the sum over layers of the means."""
        data = task.training_data(None, context)
        images = data.images.images
        layers = find_layers(model.eval(), data.pixels.normalize(images[:1]))
        values, probabilities = collect_activations(model, layers, self.tap, images, data.pixels, context)
        scores = torch.zeros(len(images), dtype=torch.float64, device=context.device)
        for activations in values.values():
            used = activations
            if self.r2 < 1:
                ranked = rank_neurons(confidence_gaps(activations, probabilities, self.lambda_l, self.lambda_h))
                used = activations[ranked[: count_share(self.r2, len(ranked))]]
            deviations = standardize_robustly(used).clamp(-LIMIT, LIMIT)
            if self.sides == "both":
                deviations = deviations.abs()
            scores += deviations.double().mean(0)
        return scores

    def choose(self, scores: Tensor) -> Tensor:
        """The samples (N,) bool whose scores (N,) are too high."""
        if self.cut == "break":
            return flag_above_break(scores)
        median = scores.median()
        spread = MAD_TO_DEVIATION * (scores - median).abs().median()
        return scores > median + self.deviations * spread

    def _agreed(self, flagged: Tensor, task: DefenseTask, context: Context) -> Tensor:
        """The samples (N,) bool whose label a network predicts that is trained for a short time on the others."""
        epochs, *milestones = (
            max(1, round(self.screening * each)) for each in (task.recipe.epochs, *task.recipe.milestones)
        )
        model, kept = task.new_model(2), torch.nonzero(~flagged).flatten()
        try:
            history = task.fit(
                model, context.derive("retrain", 2), keep=kept, epochs=epochs, milestones=tuple(milestones)
            )
            check_learned(history, task.info.num_classes)
        except TrainingError as error:
            warnings.warn(
                f"none_retrain: no sample comes back: the network for it {error.message}", UserWarning, stacklevel=2
            )
            return torch.zeros_like(flagged)
        return task.predict(model, context).argmax(1) == task.train.labels


def _warn_of_losses(flagged: Tensor, task: DefenseTask) -> None:
    """Warn if half of the samples, or a whole class, would be dropped."""
    dropped = int(flagged.sum())
    if 2 * dropped > len(flagged):
        warnings.warn(f"none_retrain: {dropped} of {len(flagged)} samples are dropped", UserWarning, stacklevel=3)
    left = torch.bincount(task.train.labels[~flagged], minlength=task.info.num_classes)
    empty = torch.nonzero(left == 0).flatten().tolist()
    if empty:
        names = ", ".join(map(str, empty))
        warnings.warn(f"none_retrain: no sample of class {names} is kept", UserWarning, stacklevel=3)
