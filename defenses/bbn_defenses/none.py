"""NONE, the paper's defense, by both of its procedures, on any network
of convolutions, linear layers, norms and activations.

Both train as usual, find compromised neurons, drop the samples that make them high, reset them, and train on.
`released` is the authors' code: neurons whose value jumps on samples the network is sure of (section 8.7), one natural
break over summed values. `algorithm1` is the paper's listing (section 8.4).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from backdoor_bench_none.api import (
    Context,
    Defense,
    DefenseResult,
    DefenseTask,
    Incidental,
    Layer,
    Split,
    Stage,
    Tap,
    collect_activations,
    find_breaks,
    find_layers,
    prune_neurons,
    reestimate_norms,
    reinitialize_neurons,
)

#: The released code forgets to clear its list of neurons before these layers of a ResNet18, so that it resets those of
#: the layers before them too.
RELEASED_ACCUMULATES = ("layer4.0.conv1", "layer4.0.downsample.0", "layer4.0.conv2", "layer4.1.conv1", "layer4.1.conv2")
RELEASED_CLEARS = "layer4.0.downsample.0"


LINEAR_ABOVE_ZERO = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU)
#: Activation functions whose linear piece is known.
KNOWN_PIECES = (*LINEAR_ABOVE_ZERO, nn.Softplus, nn.Tanhshrink, nn.SiLU, nn.GELU, nn.Mish)


@dataclass(frozen=True)
class Findings:
    """What one inspection says: samples to drop (N,) bool, their scores
    (N,), neurons (k,) to reset per layer, and a report.
    """

    flagged: Tensor
    scores: Tensor
    resets: Mapping[str, Tensor]
    report: Mapping[str, Any] = field(default_factory=dict)


class NONE(Defense):
    """Non-linearity enforced by resetting compromised neurons and
    dropping the samples that make them (sections 3.3, 8.4, 8.7).

    `released_quirks` restores what the released code does and the paper does not say, for comparison: the sample at the
    natural break itself is flagged, neurons without a single unsure sample rank first, and on a ResNet18 the reset of
    layer4 accumulates the neurons of earlier layers. To compare with the released code on a ResNet18, also set
    `tap: convolution` and `layers: ["layer2.*", "layer3.*", "layer4.*"]`.

    Values of different layers are summed as they are, as released, so that the layer with the largest values weighs
    most; `standardize` gives every neuron the same weight.

    `algorithm1` to the letter (`min_gvf: 0`) flags about 16 % of all samples for every ordinary neuron: of a normal
    distribution everything above 1.01 standard deviations. Only neurons whose two classes explain at least `min_gvf` of
    the variance are used by default.
    """

    paper: ClassVar[str] = "arXiv:2202.06382"
    stage: ClassVar[Stage] = Stage.IN_TRAINING
    starts_from_victim: ClassVar[bool] = True
    returns: ClassVar[tuple[Literal["flagged", "scores", "infected"], ...]] = ("flagged", "scores")

    procedure: Literal["released", "algorithm1"] = Field(
        "released", description="released: the authors' code; algorithm1: the paper's listing"
    )
    r1: float = Field(0.03, gt=0, le=1, description="share of each layer's neurons that are reset, at most")
    r2: float = Field(
        0.10, ge=0, le=1, description="share of each layer's neurons that find samples, at most; 0 means one neuron"
    )
    lambda_l: float = Field(
        0.1, gt=0, lt=1, description="released: a sample is unsure of a class below this probability"
    )
    lambda_h: float = Field(0.9, gt=0, lt=1, description="released: a sample is sure of a class above this probability")
    theta: float = Field(
        0.95,
        gt=0,
        le=1,
        description="algorithm1: a neuron is compromised if this share of its values is in the linear piece",
    )
    lambda_z: float = Field(
        3.0,
        gt=0,
        description="algorithm1: a sample is dropped this many standard deviations away; the paper's lambda",
    )
    min_gvf: float = Field(
        0.9,
        ge=0,
        le=1,
        description="algorithm1: least goodness of a neuron's natural break; 0 is the paper to the letter",
    )
    max_removed: float = Field(
        0.5,
        gt=0,
        le=1,
        description="algorithm1: a round that would drop a larger share of the samples drops none, and warns",
    )
    lr: float = Field(1e-3, gt=0, description="constant learning rate after the reset")
    epochs: int = Field(5, ge=0, description="epochs of training after each reset")
    rounds: int = Field(1, ge=1, description="how often to inspect, reset and train on")
    tap: Tap = Field(
        "pre_activation", description="value of a neuron: behind its norm (pre_activation), or before it (convolution)"
    )
    layers: tuple[str, ...] = Field(
        (), description="patterns of layer names to inspect, as layer4.*; default: all but the logits' layer"
    )
    reset: Literal["prune", "reinitialize"] | None = Field(
        None,
        description="prune: to zero for good (default of released); reinitialize: to fresh weights (of algorithm1)",
    )
    standardize: bool = Field(
        False,
        description="released: sum values in their neuron's standard deviations, so that no layer weighs more",
    )
    drop_samples: bool = Field(
        True, description="false keeps all samples, as the released code does for natural Trojans"
    )
    # Incidental: both find the same break, so that results and keys do not change with it
    split: Annotated[Split, Incidental] = Field(
        "exact", description="how natural breaks are found; jenkspy: by the library, as the released code, slow"
    )
    released_quirks: bool = Field(False, description="released: restore quirks of the code, for comparison only")

    def run(self, task: DefenseTask, context: Context) -> DefenseResult:
        """Return the network, the flagged samples and their scores: of the
        last round (`released`), or of all (`algorithm1`).
        """
        model = task.victim()
        layers = self._chosen_layers(model, task, context)
        flagged = torch.zeros(len(task.train), dtype=torch.bool, device=context.device)
        scores = torch.zeros(len(task.train), dtype=torch.float64, device=context.device)
        reports = []
        for index in range(self.rounds):
            here = context.derive("round", index)
            if self.procedure == "released":
                findings = self._inspect_released(model, layers, task, context)
                flagged, scores = findings.flagged, findings.scores
            else:
                findings = self._inspect_algorithm1(model, layers, ~flagged, task, context)
                flagged, scores = flagged | findings.flagged, torch.maximum(scores, findings.scores)
            reports.append({**findings.report, "samples_flagged": int(flagged.sum())})
            self._reset(model, layers, findings.resets, task, context, draw=index + 1)
            self._train_on(model, ~flagged, task, here)
            if self.procedure == "algorithm1" and not any(map(len, findings.resets.values())):
                break
        return DefenseResult(model, flagged, scores, extras={"rounds": reports, **_unresolved(layers)})

    def _chosen_layers(self, model: nn.Module, task: DefenseTask, context: Context) -> list[Layer]:
        example = task.training_data(task.train.take(torch.arange(1)), context)
        layers = find_layers(model.eval(), example.pixels.normalize(example.images.images))
        chosen = [layer for layer in layers if self._is_chosen(layer)]
        if not chosen:
            names = ", ".join(layer.name for layer in layers) or "none"
            raise ValueError(f"no hidden layer matches {list(self.layers) or 'anything'}; there are: {names}")
        return chosen

    def _is_chosen(self, layer: Layer) -> bool:
        return not self.layers or any(fnmatchcase(layer.name, pattern) for pattern in self.layers)

    def _inspect_released(self, model: nn.Module, layers: list[Layer], task: DefenseTask, context: Context) -> Findings:
        data = task.training_data(None, context)
        values, probabilities = collect_activations(model, layers, self.tap, data.images.images, data.pixels, context)
        scores = torch.zeros(len(data.images), dtype=torch.float64, device=context.device)
        resets = {}
        for name, activations in values.items():
            gaps = confidence_gaps(activations, probabilities, self.lambda_l, self.lambda_h, self.released_quirks)
            ranked = rank_neurons(gaps, self.released_quirks)
            resets[name] = ranked[: count_share(self.r1, len(ranked))]
            used = activations[ranked[: count_share(self.r2, len(ranked))]].double()
            scores += (standardize(used) if self.standardize else used).sum(0)
        resets = accumulate_as_released(resets) if self.released_quirks else resets
        report = {"neurons_reset": sum(map(len, resets.values())), "layers_inspected": len(layers)}
        flagged = flag_above_break(scores, self.released_quirks, self.split)
        return Findings(flagged, scores, resets, report)

    def _inspect_algorithm1(
        self, model: nn.Module, layers: list[Layer], kept: Tensor, task: DefenseTask, context: Context
    ) -> Findings:
        data, left = task.training_data(None, context), torch.nonzero(kept).flatten()
        values, _ = collect_activations(model, layers, self.tap, data.images.images[left], data.pixels, context)
        deviations = torch.zeros(len(left), dtype=torch.float64, device=context.device)
        resets: dict[str, Tensor] = {}
        compromised: dict[str, list[dict[str, float]]] = {}
        for layer in layers:
            neurons = examine_neurons(values[layer.name], layer.activation_module, self.theta, self.min_gvf, self.split)
            total = len(values[layer.name])
            resets[layer.name] = neurons.indices[: count_share(self.r1, total)]
            used = neurons.indices[: count_share(self.r2, total)]
            deviations = torch.maximum(deviations, neurons.deviations(values[layer.name], len(used)))
            compromised[layer.name] = neurons.describe(len(resets[layer.name]))
        flagged = self._within_limit(deviations >= self.lambda_z, len(kept))
        counts = {"neurons_reset": sum(map(len, resets.values())), "layers_inspected": len(layers)}
        whole, scores = torch.zeros_like(kept), torch.zeros(len(kept), dtype=torch.float64, device=context.device)
        whole[left], scores[left] = flagged, deviations
        by_break = [layer.name for layer in layers if not has_known_piece(layer.activation_module)]
        fallback = {"linear_piece_by_break": by_break} if by_break else {}
        return Findings(whole, scores, resets, {**counts, **fallback, "compromised": compromised})

    def _within_limit(self, flagged: Tensor, total: int) -> Tensor:
        if int(flagged.sum()) <= self.max_removed * total:
            return flagged
        excess = f"{int(flagged.sum())} of {total} samples would be dropped, more than max_removed = {self.max_removed}"
        warnings.warn(f"none: {excess}; none of them is", UserWarning, stacklevel=2)
        return torch.zeros_like(flagged)

    def _reset(
        self,
        model: nn.Module,
        layers: list[Layer],
        resets: Mapping[str, Tensor],
        task: DefenseTask,
        context: Context,
        draw: int,
    ) -> None:
        how = self.reset or ("prune" if self.procedure == "released" else "reinitialize")
        if how == "prune":
            for layer in layers:
                prune_neurons(model, layer, resets[layer.name])
            return
        fresh = task.new_model(draw)
        for layer in layers:
            reinitialize_neurons(model, layer, resets[layer.name], fresh)
        data = task.training_data(None, context)
        norms = {layer.norm: resets[layer.name] for layer in layers if layer.norm}
        reestimate_norms(model, norms, data.images.images, data.pixels, context)

    def _train_on(self, model: nn.Module, kept: Tensor, task: DefenseTask, context: Context) -> None:
        if self.epochs:
            keep = torch.nonzero(kept).flatten() if self.drop_samples else None
            options: dict[str, Any] = {"lr": self.lr, "epochs": self.epochs, "schedule": "constant"}
            task.fit(model, context, keep=keep, freeze_batchnorm=True, **options)


def _unresolved(layers: list[Layer]) -> dict[str, list[str]]:
    """The layers whose outgoing weights could not be found, so that a reset leaves them as they are."""
    names = [layer.name for layer in layers if layer.consumers is None]
    return {"outgoing_weights_kept": names} if names else {}


def count_share(share: float, total: int) -> int:
    """ceil(share * total), at least 1, unharmed by floating point (0.07 * 100 is 7)."""
    return max(1, math.ceil(round(share * total, 9)))


# The released procedure.


def confidence_gaps(
    activations: Tensor, probabilities: Tensor, lambda_l: float, lambda_h: float, released_quirks: bool = False
) -> Tensor:
    """How far each neuron jumps on sure samples, (C,) float64: the
    largest over classes k of max(sure) - (mean + 3 std)(unsure).

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


def standardize(values: Tensor) -> Tensor:
    """Rows (C, N) with mean 0 and population deviation 1; constant rows become 0."""
    centred = values - values.mean(1, keepdim=True)
    return centred / centred.square().mean(1, keepdim=True).sqrt().clamp(min=1e-12)


def _largest(values: Tensor, chosen: Tensor) -> Tensor:
    """The largest of the chosen columns of `values` (C, N), -inf if none is."""
    return values[:, chosen].amax(1) if bool(chosen.any()) else values.new_full((len(values),), -math.inf)


def rank_neurons(gaps: Tensor, released_quirks: bool = False) -> Tensor:
    """Indices of neurons by falling gap, equal ones in order; with
    `released_quirks` NaN comes first, else there is none.
    """
    if released_quirks:
        gaps = gaps.nan_to_num(nan=math.inf)
    return gaps.argsort(descending=True, stable=True)


def flag_above_break(scores: Tensor, released_quirks: bool = False, split: Split = "exact") -> Tensor:
    """The samples (N,) bool above the natural break of their scores; with `released_quirks`, those at the break too."""
    if bool((scores == scores[0]).all()):
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = float(find_breaks(scores.cpu().numpy(), split).thresholds[0])
    return scores >= threshold if released_quirks else scores > threshold


def accumulate_as_released(resets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The neurons the released code resets in a ResNet18: in most of
    layer4, also those listed for the layers before.
    """
    result = dict(resets)
    before = resets.get("layer3.1.conv2")
    for name in RELEASED_ACCUMULATES:
        if before is None or name not in resets:
            break
        listed = resets[name] if name == RELEASED_CLEARS else torch.cat([before, resets[name]])
        result[name], before = torch.unique(listed), listed
    return result


# Algorithm 1.


@dataclass(frozen=True)
class Neurons:
    """The compromised neurons of a layer, the most first: share of values
    in the linear piece, natural break, its goodness of fit.
    """

    indices: Tensor  # (k,) int64
    linear: Tensor  # (k,) float64
    thresholds: Tensor  # (k,) float64
    gvf: Tensor  # (k,) float64

    def deviations(self, activations: Tensor, count: int) -> Tensor:
        """Per sample (N,) the largest |z| over the first `count` neurons: its
        distance from the benign class, 0 inside it (lines 12 to 16).
        """
        values = activations[self.indices[:count]].double()  # (count, N)
        if len(values) == 0:
            return values.new_zeros(values.shape[1])
        benign = values <= self.thresholds[:count, None]
        size = benign.sum(1, keepdim=True)
        mean = (values * benign).sum(1, keepdim=True) / size
        std = (((values - mean) * benign).square().sum(1, keepdim=True) / size).sqrt().clamp(min=1e-12)
        return ((values - mean).abs() / std).masked_fill(benign, 0.0).amax(0)

    def describe(self, count: int) -> list[dict[str, float]]:
        """The first `count` neurons, as JSON values."""
        columns = (self.indices, self.linear, self.thresholds, self.gvf)
        names = ("neuron", "linear_share", "break", "gvf")
        return [dict(zip(names, row, strict=True)) for row in zip(*(c[:count].tolist() for c in columns), strict=True)]


def examine_neurons(
    activations: Tensor, activation: nn.Module | None, theta: float, min_gvf: float, split: Split = "exact"
) -> Neurons:
    """The neurons of `activations` (C, N) with P(A >= tau) >= theta and
    a natural break of at least `min_gvf` (lines 7 to 10).

    They are ranked by that probability, ties by the goodness of the break. Constant neurons have no break and do not
    count.
    """
    breaks = find_breaks(activations.cpu().numpy(), split)
    thresholds, gvf = (torch.from_numpy(x).to(activations.device) for x in (breaks.thresholds, breaks.gvf))
    linear = in_linear_piece(activations, activation, thresholds).double().mean(1)
    chosen = torch.nonzero((linear >= theta) & (gvf >= min_gvf) & (gvf > 0)).flatten()
    by_fit = chosen[gvf[chosen].argsort(descending=True, stable=True)]
    ranked = by_fit[linear[by_fit].argsort(descending=True, stable=True)]
    return Neurons(ranked, linear[ranked], thresholds[ranked], gvf[ranked])


def has_known_piece(activation: nn.Module | None) -> bool:
    """Whether the linear piece of an activation function is known; else a neuron's own break stands for its bound."""
    return isinstance(activation, KNOWN_PIECES)


def in_linear_piece(activations: Tensor, activation: nn.Module | None, breaks: Tensor) -> Tensor:
    """Whether each of `activations` (C, N) lies in the linear piece of the
    activation function: where its slope is 1, or within 5 % of it.

    The paper gives 0 for ReLU. Tanhshrink is odd and flat at 0, so its linear pieces are two. For other functions a
    neuron's own natural break serves.
    """
    if isinstance(activation, LINEAR_ABOVE_ZERO):
        return activations >= 0
    match activation:
        case nn.Softplus():
            return activations >= math.log(19) / activation.beta  # the slope 1 / (1 + exp(-beta x)) is .95
        case nn.Tanhshrink():
            return activations.abs() >= math.atanh(math.sqrt(0.95))  # the slope is tanh(x) ** 2
        case nn.SiLU():
            return activations >= 1.08
        case nn.GELU() | nn.Mish():
            return activations >= 0.65
    return activations >= breaks[:, None]
