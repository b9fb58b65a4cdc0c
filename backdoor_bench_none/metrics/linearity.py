"""How linear neurons are between an image and its triggered copy (section 3.2; Figs. 2, 4 and 5)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from pydantic import Field

from backdoor_bench_none.contracts.attack import Attack, AttackTask, StampAttack
from backdoor_bench_none.contracts.context import Context
from backdoor_bench_none.contracts.dataset import DatasetInfo
from backdoor_bench_none.contracts.metric import Evaluation, Metric
from backdoor_bench_none.contracts.network import Pixels
from backdoor_bench_none.inspection.layers import Tap
from backdoor_bench_none.inspection.neurons import collect_activations, find_layers
from backdoor_bench_none.metrics.trojan_region import open_case

if TYPE_CHECKING:
    from torch import Tensor


class Linearity(Metric):
    """The fit of a line to each neuron's values along the way from an image to its triggered copy, and where they are.

    Neurons whose value does not change along the way are left out of the fit. Attacks without a trigger that is known
    in advance, `clean` among them, have no values.
    """

    paper = "NONE, section 3.2"

    images: int = Field(50, ge=1, description="the first so many test images")
    points: int = Field(11, ge=3, description="images along each way, its ends among them")
    tap: Tap = Field(
        "pre_activation", description="value of a neuron: behind its norm (pre_activation), or before it (convolution)"
    )

    def absent_for(self, attack: Attack, info: DatasetInfo) -> str:
        """An attack that does not stamp images."""
        if isinstance(attack, StampAttack):
            return ""
        return f"the attack {type(attack).__name__} has no trigger that is known in advance"

    def compute(self, evaluation: Evaluation, context: Context) -> Mapping[str, float]:
        """`r2`: coefficient of determination, mean over layers; `r2_last`: of the last hidden layer; `positive_benign`,
        `positive_triggered`: the share of values above 0, the linear piece of ReLU and its kin, at the two ends.
        """
        case = open_case(evaluation, self.images)
        if case is None:
            return {}
        pixels = Pixels.of(case.info, context.device)
        stamped = case.attack.preview(AttackTask(case.data, case.info), context)
        start, end = case.data.images.float(), stamped.float()
        ways = [torch.lerp(start, end, place / (self.points - 1)).round() for place in range(self.points)]
        images = torch.cat(ways).to(torch.uint8)
        layers = find_layers(evaluation.model, pixels.normalize(images[:1].to(context.device)))
        if not layers:
            warnings.warn("linearity: the network has no hidden layer", UserWarning, stacklevel=2)
            return {}
        values, _ = collect_activations(evaluation.model, layers, self.tap, images, pixels, context)
        by_place = [
            layer.view(len(layer), self.points, -1).double() for layer in values.values()
        ]  # (neurons, points, N)
        fits = [fit_of_lines(layer.transpose(1, 2)) for layer in by_place]
        positive = [(layer > 0).double().mean((0, 2)) for layer in by_place]
        benign, triggered = (mean_of([shares[place] for shares in positive]) for place in (0, -1))
        return {
            "r2": mean_of(fits),
            "r2_last": float(fits[-1]),
            "positive_benign": benign,
            "positive_triggered": triggered,
        }


def fit_of_lines(values: Tensor) -> Tensor:
    """The mean coefficient of determination of lines through rows (..., points); 1 if no row changes."""
    points = values.shape[-1]
    places = torch.linspace(-1, 1, points, dtype=values.dtype, device=values.device)
    centred = values - values.mean(-1, keepdim=True)
    total = centred.square().sum(-1)
    explained = (centred * places).sum(-1).square() / places.square().sum()
    changing = total > torch.finfo(torch.float32).eps * values.square().sum(-1)
    if not bool(changing.any()):
        return torch.ones((), dtype=values.dtype)
    return (explained[changing] / total[changing]).mean()


def mean_of(values: list[Tensor]) -> float:
    """The mean of scalars."""
    return float(torch.stack(values).mean())
