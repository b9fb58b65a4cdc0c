"""The paper's recipe for networks without batch normalisation, which need fitting initial weights or clipping.

Measured on 10,000 images of CIFAR-10 with crop and flip, at the published learning rate of 0.1: with weights calibrated
to the activation and no clipping, NiN, VGG-11 and VGG-16 diverge within ten steps; warm-up does not help, clipping at
norm 1 does. See `docs/reproduction.md`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from backdoor_bench_none.contracts.recipe import NamedRecipe, Recipe
from backdoor_bench_none.errors import ConfigError

InitialWeights = Literal["auto", "calibrated", "released"]
INIT_DESCRIPTION = "initial weights: calibrated to the activation, or as released; auto: what goes with the recipe"


def recipe_without_norms(published: Mapping[str, Any], activation: str, clip_released: bool) -> NamedRecipe:
    """The published recipe with the initial weights that train with it.

    `clip_released` says whether the released weights need clipping, as those of VGG do. `ConfigError` for tanhshrink,
    with which no such network was seen to leave chance.
    """
    if activation == "tanhshrink":
        raise ConfigError(
            "recipe paper: networks without BatchNorm were not seen to train with tanhshrink at lr 0.1",
            "the paper has tanhshrink on ResNet18 only; use that, or leave out `recipe: paper`",
        )
    clipped = {**published, "clip_norm": 1.0}
    if activation == "softplus":
        deviation = "calibrated initial weights and clip_norm 1: released weights give constant logits with softplus"
        return NamedRecipe(clipped, {"init": "calibrated"}, deviation)
    if clip_released:
        deviation = "clip_norm 1: as published, VGG diverges with elu and may stay at chance with relu"
        return NamedRecipe(clipped, {"init": "released"}, deviation)
    return NamedRecipe(published, {"init": "released"})


def refuse_divergence(name: str, init: InitialWeights, recipe: Recipe) -> None:
    """Raise `ConfigError` for the paper's recipe with calibrated weights and without clipping."""
    if name == "paper" and init == "calibrated" and recipe.clip_norm is None:
        raise ConfigError(
            "recipe paper: calibrated initial weights diverge within ten steps without clipping",
            "leave out `init`, for the recipe brings the released weights, or set `clip_norm: 1`",
        )
