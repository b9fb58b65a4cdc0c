"""How NONE finds compromised neurons: the released procedure and Algorithm 1.

Both rank the neurons of a layer by their values on the training set.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn as nn

from backdoor_bench_none.api import Split, find_breaks
from bbn_defenses.breaks_on_device import find_breaks_on_device

if TYPE_CHECKING:
    from torch import Tensor

#: The released code does not clear its list of neurons before these layers of a ResNet18, so that it also resets those
#: of the layers before them.
RELEASED_ACCUMULATES = ("layer4.0.conv1", "layer4.0.downsample.0", "layer4.0.conv2", "layer4.1.conv1", "layer4.1.conv2")
RELEASED_CLEARS = "layer4.0.downsample.0"

#: a normal distribution's standard deviation, divided by its median absolute deviation
MAD_TO_DEVIATION = 1.4826


def count_share(share: float, total: int) -> int:
    """ceil(share * total), at least 1, without errors of floating point (0.07 * 100 is 7)."""
    return max(1, math.ceil(round(share * total, 9)))


# The released procedure.


def confidence_gaps(
    activations: Tensor, probabilities: Tensor, lambda_l: float, lambda_h: float, released_quirks: bool = False
) -> Tensor:
    """The gap of each neuron between samples the network is sure and unsure of, (C,) float64.

    It is the largest over classes k of max(sure) - (mean + 3 std)(unsure). `activations` (C, N); `probabilities` (N,
    K): sure of k above `lambda_h`, unsure below `lambda_l`; population std. Classes without a sure or without an unsure
    sample do not count. With `released_quirks` a class without a sure sample counts as a gap of 0, and one without an
    unsure sample as NaN.
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


def standardize_robustly(values: Tensor) -> Tensor:
    """Rows (C, N) in robust deviations from their median: (x - median) / (1.4826 MAD); rows whose MAD is 0 become 0.

    Unlike mean and deviation, median and MAD hardly move with a few per cent of poisoned samples, which so stand out.
    """
    centred = values - values.median(1, keepdim=True).values
    spread = MAD_TO_DEVIATION * centred.abs().median(1, keepdim=True).values
    return torch.where(spread > 0, centred / spread.clamp(min=torch.finfo(values.dtype).tiny), 0.0)


def _largest(values: Tensor, chosen: Tensor) -> Tensor:
    """The largest of the chosen columns of `values` (C, N), -inf if none is chosen."""
    if values.is_cuda:  # without waiting for the device, at the price of looking at all columns
        return values.masked_fill(~chosen, -math.inf).amax(1)
    if not bool(chosen.any()):
        return values.new_full((len(values),), -math.inf)
    return values[:, chosen].amax(1)


def rank_neurons(gaps: Tensor, released_quirks: bool = False) -> Tensor:
    """Indices of neurons by falling gap, equal ones in order.

    NaN, which occurs only with `released_quirks`, comes first.
    """
    if released_quirks:
        gaps = gaps.nan_to_num(nan=math.inf)
    return gaps.argsort(descending=True, stable=True)


def flag_above_break(scores: Tensor, released_quirks: bool = False, split: Split = "exact") -> Tensor:
    """The samples (N,) bool above the natural break of their scores; with `released_quirks`, those at the break too."""
    if bool((scores == scores[0]).all()):
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = float(find_breaks(scores.cpu().numpy(), split).thresholds[0])
    if released_quirks:
        return scores >= threshold
    return scores > threshold


def accumulate_as_released(resets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The neurons that the released code resets in a ResNet18.

    In most of layer4 it also resets those listed for the layers before.
    """
    result = dict(resets)
    before = resets.get("layer3.1.conv2")
    for name in RELEASED_ACCUMULATES:
        if before is None or name not in resets:
            break
        listed = resets[name]
        if name != RELEASED_CLEARS:
            listed = torch.cat([before, listed])
        result[name], before = torch.unique(listed), listed
    return result


# Algorithm 1.


@dataclass(frozen=True)
class Neurons:
    """The compromised neurons of a layer, in falling order.

    Each has its share of values in the linear piece, its natural break, and the break's goodness of fit.
    """

    indices: Tensor  # (k,) int64
    linear: Tensor  # (k,) float64
    thresholds: Tensor  # (k,) float64
    gvf: Tensor  # (k,) float64

    def deviations(self, activations: Tensor, count: int) -> Tensor:
        """The largest |z| of each sample over the first `count` neurons, (N,) float64 (lines 12 to 16).

        |z| is the distance from the benign class in its standard deviations, 0 inside it.
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
    """The neurons of `activations` (C, N) that Algorithm 1 finds compromised (lines 7 to 10).

    They have P(A >= tau) >= theta and a natural break of at least `min_gvf`, and are ranked by that probability, ties
    by the goodness of the break. Constant neurons have no break and do not count.
    """
    thresholds, gvf = _breaks_of_rows(activations, split)
    linear = in_linear_piece(activations, activation, thresholds).double().mean(1)
    chosen = torch.nonzero((linear >= theta) & (gvf >= min_gvf) & (gvf > 0)).flatten()
    by_fit = chosen[gvf[chosen].argsort(descending=True, stable=True)]
    ranked = by_fit[linear[by_fit].argsort(descending=True, stable=True)]
    return Neurons(ranked, linear[ranked], thresholds[ranked], gvf[ranked])


def _breaks_of_rows(values: Tensor, split: Split) -> tuple[Tensor, Tensor]:
    """The natural breaks of `values` (C, N) and their goodness of fit, (C,) float64 each, on their device."""
    if values.is_cuda and split == "exact":
        return find_breaks_on_device(values)
    breaks = find_breaks(values.cpu().numpy(), split)
    thresholds, gvf = (torch.from_numpy(column).to(values.device) for column in (breaks.thresholds, breaks.gvf))
    return thresholds, gvf


def has_known_piece(activation: nn.Module | None) -> bool:
    """Whether the linear piece of an activation function is known; if not, a neuron's break stands for its bound."""
    others = nn.Softplus | nn.Tanhshrink | nn.SiLU | nn.GELU | nn.Mish
    return is_linear_above_zero(activation) or isinstance(activation, others)


def is_linear_above_zero(activation: nn.Module | None) -> bool:
    """Whether the slope of an activation function is 1 above zero and nowhere else."""
    return isinstance(activation, nn.ReLU | nn.ReLU6 | nn.LeakyReLU | nn.PReLU | nn.ELU | nn.SELU | nn.CELU)


def in_linear_piece(activations: Tensor, activation: nn.Module | None, breaks: Tensor) -> Tensor:
    """Whether each of `activations` (C, N) lies in the linear piece of the activation function.

    That is where its slope is 1, or within 5 % of it. The paper gives 0 for ReLU. Tanhshrink is odd and flat at 0, so
    its linear pieces are two. For other functions a neuron's natural break serves as the bound.
    """
    if is_linear_above_zero(activation):
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
