"""Network in Network as in the released NONE code."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch.nn as nn
from pydantic import Field

from backdoor_bench_none.contracts.architecture import Architecture, ModelSpec
from backdoor_bench_none.contracts.recipe import PAPER, NamedRecipe, Recipe
from backdoor_bench_none.models.initial_weights import draw_calibrated_weights
from backdoor_bench_none.models.paper_recipe import (
    INIT_DESCRIPTION,
    InitialWeights,
    recipe_without_norms,
    refuse_divergence,
)

#: what the released code changes in its recipe for NiN
PAPER_NIN = {"momentum": 0.95, "bias_lr_factor": 2.0, "head_lr_factor": 0.1}


class NiN(Architecture):
    """Three blocks of one spatial and two 1x1 convolutions, 966 986 parameters for three channels and ten classes.

    The activation follows the last convolution too, so that with ReLU no logit is negative. Global average pooling
    replaces the released 8x8 pooling (equal at 32 px). Every activation is a separate module; the released code shares
    one. The released initialisation, N(0, 0.05), stays at chance for several epochs.
    """

    revision = 2  # released weights of narrow networks
    paper = "NONE, section 5.1; arXiv:1312.4400"

    init: InitialWeights = Field("auto", description=INIT_DESCRIPTION)

    def build(self, spec: ModelSpec) -> nn.Module:
        """Children `features`, `avgpool` and `flatten`, initialised by `init`."""
        layers = [
            *self.build_block(spec, spec.channels, (self.scale(192), self.scale(160), self.scale(96)), kernel=5),
            nn.MaxPool2d(3, stride=2, padding=1),
            nn.Dropout(0.5),
            *self.build_block(spec, self.scale(96), (self.scale(192),) * 3, kernel=5),
            nn.AvgPool2d(3, stride=2, padding=1),
            nn.Dropout(0.5),
            *self.build_block(spec, self.scale(192), (self.scale(192), self.scale(192), spec.num_classes), kernel=3),
        ]
        network = nn.Sequential(
            OrderedDict[str, nn.Module](
                features=nn.Sequential(*layers), avgpool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten()
            )
        )
        if self.init == "released":
            draw_released_weights(network, self.width)
        else:
            # Logits start around 1, not 0: a ReLU logit that is 0 for all images gets no gradient and stays 0.
            draw_calibrated_weights(network, spec.activation, head_spread=1.0, head_bias=1.0)
        return network

    def build_block(self, spec: ModelSpec, inputs: int, outputs: tuple[int, int, int], kernel: int) -> list[nn.Module]:
        """One spatial convolution that keeps the size and two 1x1 convolutions, each with its activation."""
        first, second, third = outputs
        return [
            nn.Conv2d(inputs, first, kernel, padding=kernel // 2),
            spec.activation(),
            nn.Conv2d(first, second, 1),
            spec.activation(),
            nn.Conv2d(second, third, 1),
            spec.activation(),
        ]

    def recipe(self, dataset: str) -> Mapping[str, Any]:
        """Clipped gradients, since nothing normalises the layers."""
        return {"lr": 0.1, "clip_norm": 1.0}

    def named_recipe(self, name: str, activation: str) -> NamedRecipe:
        """See the base class; the paper's recipe brings initial weights."""
        if name != "paper":
            return NamedRecipe({}, {"init": "calibrated"})
        return recipe_without_norms({**PAPER, **PAPER_NIN}, activation, "released")

    def check_recipe(self, name: str, recipe: Recipe) -> None:
        """See the base class."""
        refuse_divergence(name, self.init, recipe)


def draw_released_weights(network: nn.Module, width: float = 1.0) -> None:
    """N(0, 0.05) weights and N(0, 0.001) biases.

    In networks of another width than 1 the weights of hidden inputs are divided by its root, so that pre-activations
    spread as in the released network.
    """
    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    for layer in layers:
        spread = 0.05
        if layer is not layers[0]:
            spread /= width**0.5
        nn.init.normal_(layer.weight, 0.0, spread)
        if layer.bias is not None:
            nn.init.normal_(layer.bias, 0.0, 0.001)
