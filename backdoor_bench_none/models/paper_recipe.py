"""The paper's recipe for networks without batch normalisation, which need fitting initial weights or clipping.

Measured on 10,000 images of CIFAR-10 with crop and flip, at the published learning rate of 0.1: with weights calibrated
to the activation and no clipping, NiN, VGG-11 and VGG-16 diverge within ten steps; warm-up does not help, clipping at
norm 1 does. `docs/benchmark-file.md` lists what is not as published.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from backdoor_bench_none.contracts.recipe import NamedRecipe, Recipe
from backdoor_bench_none.errors import ConfigError

InitialWeights = Literal["auto", "calibrated", "released"]
AT_CHANCE = "clip_norm 1: calibrated initial weights diverge without it; AlexNet stays at chance for 300 steps with it"
INIT_DESCRIPTION = "initial weights: calibrated to the activation, or as released; auto: what goes with the recipe"


def recipe_without_norms(
    published: Mapping[str, Any], activation: str, weights: Literal["released", "released, clipped", "calibrated"]
) -> NamedRecipe:
    """The published recipe with the initial weights that train with it.

    `weights` are those of the architecture with ReLU: the released ones, which VGG needs to clip, or calibrated ones,
    where none were released. `ConfigError` for tanhshrink, with which no such network was seen to leave chance.
    """
    if activation == "tanhshrink":
        raise ConfigError(
            "recipe paper: networks without BatchNorm were not seen to train with tanhshrink at lr 0.1",
            "the paper has tanhshrink on ResNet18 only; use that, or leave out `recipe: paper`",
        )
    clipped = {**published, "clip_norm": 1.0}
    if activation == "softplus":
        deviation = "calibrated initial weights and clip_norm 1: released weights give constant logits with softplus"
        params = {} if weights == "calibrated" else {"init": "calibrated"}
        return NamedRecipe(clipped, params, deviation)
    if weights == "calibrated":
        return NamedRecipe(clipped, deviation=AT_CHANCE)
    if weights == "released, clipped":
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
