"""NONE, the paper's defense, by the procedure of the authors' released code, generalised to any network and activation.

Train as usual; find the neurons whose value jumps on samples the network is sure of (section 8.7); drop the samples on
which those neurons are high; reset the neurons; fine-tune on the rest with frozen BatchNorm statistics; repeat for a
number of rounds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from backdoor_bench_none.api import Context, Defense, DefenseResult, DefenseTask, Stage
from backdoor_bench_none.models.neurons import (
    Layer,
    Tap,
    collect_activations,
    find_layers,
    prune_neurons,
    reinitialize_neurons,
)
from backdoor_bench_none.natural_break import find_breaks

#: The released code forgets to clear its list of neurons before these layers of a ResNet18, so that it resets those of
#: the layers before them too.
RELEASED_ACCUMULATES = ("layer4.0.conv1", "layer4.0.downsample.0", "layer4.0.conv2", "layer4.1.conv1", "layer4.1.conv2")
RELEASED_CLEARS = "layer4.0.downsample.0"


class NONE(Defense):
    """Non-linearity enforced by resetting compromised neurons and dropping the samples that make them (sections 3.3,
    8.4, 8.7).

    `released_quirks` restores what the released code does and the paper does not say, for comparison: the sample at the
    natural break itself is flagged, neurons without a single unsure sample rank first, and on a ResNet18 the reset of
    layer4 accumulates the neurons of earlier layers. To compare with the released code on a ResNet18, also set `tap:
    convolution` and `layers: ["layer2.*", "layer3.*", "layer4.*"]`.
    """

    paper: ClassVar[str] = "arXiv:2202.06382"
    stage: ClassVar[Stage] = Stage.IN_TRAINING
    starts_from_victim: ClassVar[bool] = True
    returns: ClassVar[tuple[Literal["flagged", "scores", "infected"], ...]] = ("flagged", "scores")

    procedure: Literal["released"] = Field(
        "released", description="released: the authors' code, by confidence gap and natural break"
    )
    r1: float = Field(0.03, gt=0, le=1, description="share of each layer's neurons that are reset")
    r2: float = Field(
        0.10,
        ge=0,
        le=1,
        description="share of each layer's neurons that are summed to score samples; 0 means one neuron",
    )
    lambda_l: float = Field(0.1, gt=0, lt=1, description="a sample is unsure of a class below this probability")
    lambda_h: float = Field(0.9, gt=0, lt=1, description="a sample is sure of a class above this probability")
    lr: float = Field(1e-3, gt=0, description="constant learning rate of the fine-tuning")
    epochs: int = Field(5, ge=0, description="epochs of fine-tuning in each round")
    rounds: int = Field(
        1, ge=1, description="how often to inspect, reset and fine-tune; each round scores the whole training set again"
    )
    tap: Tap = Field(
        "pre_activation", description="value of a neuron: behind its norm (pre_activation), or before it (convolution)"
    )
    layers: tuple[str, ...] = Field(
        (), description="patterns of layer names to inspect, as layer4.*; default: all but the logits' layer"
    )
    reset: Literal["prune", "reinitialize"] = Field(
        "prune", description="prune: to zero for good, as released; reinitialize: to fresh weights"
    )
    drop_samples: bool = Field(
        True, description="false keeps all samples, as the released code does for natural Trojans"
    )
    released_quirks: bool = Field(False, description="restore quirks of the released code, for comparison only")

    def run(self, task: DefenseTask, context: Context) -> DefenseResult:
        """Return the fine-tuned network, the flagged samples, and the samples' scores of the last round."""
        model = task.victim()
        layers = self._chosen_layers(model, task, context)
        for index in range(self.rounds):
            scores, resets = self._inspect(model, layers, task, context)
            flagged = self._flag(scores)
            self._reset(model, layers, resets, task.new_model(index + 1) if self.reset == "reinitialize" else None)
            self._fine_tune(model, ~flagged, task, context.derive("round", index))
        return DefenseResult(model, flagged, scores, extras=self._report(layers, resets, flagged))

    def _chosen_layers(self, model: nn.Module, task: DefenseTask, context: Context) -> list[Layer]:
        example = task.training_data(task.train.take(torch.arange(1)), context)
        found = find_layers(model.eval(), example.pixels.normalize(example.images.images))
        chosen = [x for x in found if not self.layers or any(fnmatchcase(x.name, pattern) for pattern in self.layers)]
        if not chosen:
            names = ", ".join(layer.name for layer in found) or "none"
            raise ValueError(f"no hidden layer matches {list(self.layers) or 'anything'}; there are: {names}")
        return chosen

    def _inspect(
        self, model: nn.Module, layers: list[Layer], task: DefenseTask, context: Context
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Scores (N,) float64 of all samples, and per layer the neurons to reset."""
        data = task.training_data(None, context)
        values, probabilities = collect_activations(model, layers, self.tap, data.images.images, data.pixels, context)
        scores = torch.zeros(len(data.images), dtype=torch.float64, device=context.device)
        resets = {}
        for name, activations in values.items():
            gaps = confidence_gaps(activations, probabilities, self.lambda_l, self.lambda_h, self.released_quirks)
            ranked = rank_neurons(gaps, self.released_quirks)
            resets[name] = ranked[: count_share(self.r1, len(ranked))]
            scores += activations[ranked[: count_share(self.r2, len(ranked))]].double().sum(0)
        return scores, accumulate_as_released(resets) if self.released_quirks else resets

    def _flag(self, scores: Tensor) -> Tensor:
        """The samples (N,) bool above the natural break of their scores."""
        if bool((scores == scores[0]).all()):
            return torch.zeros_like(scores, dtype=torch.bool)
        threshold = float(find_breaks(scores.cpu().numpy()).thresholds[0])
        return scores >= threshold if self.released_quirks else scores > threshold

    def _reset(
        self, model: nn.Module, layers: list[Layer], resets: Mapping[str, Tensor], fresh: nn.Module | None
    ) -> None:
        for layer in layers:
            if fresh is None:
                prune_neurons(model, layer, resets[layer.name])
            else:
                reinitialize_neurons(model, layer, resets[layer.name], fresh)

    def _fine_tune(self, model: nn.Module, kept: Tensor, task: DefenseTask, context: Context) -> None:
        if self.epochs:
            keep = torch.nonzero(kept).flatten() if self.drop_samples else None
            options: dict[str, Any] = {"lr": self.lr, "epochs": self.epochs, "schedule": "constant"}
            task.fit(model, context, keep=keep, freeze_batchnorm=True, **options)

    def _report(self, layers: list[Layer], resets: Mapping[str, Tensor], flagged: Tensor) -> dict[str, Any]:
        unresolved = [layer.name for layer in layers if layer.consumers is None]
        return {
            "layers_inspected": len(layers),
            "neurons_reset": sum(len(neurons) for neurons in resets.values()),
            "samples_flagged": int(flagged.sum()),
            **({"outgoing_weights_kept": unresolved} if unresolved else {}),
        }


def count_share(share: float, total: int) -> int:
    """ceil(share * total), at least 1, unharmed by floating point (0.07 * 100 is 7)."""
    return max(1, math.ceil(round(share * total, 9)))


def confidence_gaps(
    activations: Tensor, probabilities: Tensor, lambda_l: float, lambda_h: float, released_quirks: bool = False
) -> Tensor:
    """How far each neuron jumps on sure samples, (C,) float64: the largest over classes k of max(sure) - (mean + 3
    std)(unsure).

    `activations` (C, N); `probabilities` (N, K): sure of k above `lambda_h`, unsure below `lambda_l`; population std.
    Classes without a sure or without an unsure sample say nothing. With `released_quirks` a class without a sure sample
    counts as a gap of 0, and one without an unsure sample as NaN.
    """
    sure, unsure = probabilities > lambda_h, probabilities < lambda_l  # (N, K)
    values = activations.double()
    weights = unsure.double()
    counts = weights.sum(0)  # (K,)
    mean = values @ weights / counts  # (C, K)
    variance = (values.square() @ weights / counts - mean.square()).clamp(min=0)
    highest = torch.stack([_largest(values, sure[:, k]) for k in range(sure.shape[1])], dim=1)
    gaps = highest - (mean + 3 * variance.sqrt())  # (C, K)
    empty = ~sure.any(0)
    if released_quirks:
        return gaps.masked_fill(empty, 0.0).amax(1)  # amax passes NaN on
    return gaps.masked_fill(empty | (counts == 0), -math.inf).amax(1)


def _largest(values: Tensor, chosen: Tensor) -> Tensor:
    """The largest of the chosen columns of `values` (C, N), -inf if none is."""
    return values[:, chosen].amax(1) if bool(chosen.any()) else values.new_full((len(values),), -math.inf)


def rank_neurons(gaps: Tensor, released_quirks: bool = False) -> Tensor:
    """Indices of neurons by falling gap, equal ones in order; with `released_quirks` NaN comes first, else it cannot
    occur.
    """
    if released_quirks:
        gaps = gaps.nan_to_num(nan=math.inf)
    return gaps.argsort(descending=True, stable=True)


def accumulate_as_released(resets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The neurons the released code resets in a ResNet18: in most of layer4, also those listed for the layers
    before.
    """
    result = dict(resets)
    before = resets.get("layer3.1.conv2")
    for name in RELEASED_ACCUMULATES:
        if before is None or name not in resets:
            break
        listed = resets[name] if name == RELEASED_CLEARS else torch.cat([before, resets[name]])
        result[name], before = torch.unique(listed), listed
    return result
