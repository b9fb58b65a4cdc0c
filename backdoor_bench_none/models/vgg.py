"""VGG-11 and VGG-16 without batch normalisation and with one linear layer, as in the released NONE code."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, ClassVar

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


class VGG(Architecture):
    """Base of the VGG networks: 3x3 convolutions in five stages, each followed by 2x2 max pooling.

    Pooling rounds up, so that 16 and 28 px work; for 32 px the network is exactly the published one. Larger images are
    averaged over what the last pooling leaves. Every activation is a separate module; the released code shares one. The
    released initialisation (He-normal by fan-out) stays at chance with softplus and tanhshrink.
    """

    paper = "NONE, section 5.1; arXiv:1409.1556"
    #: Number of convolutions of each stage.
    depths: ClassVar[tuple[int, ...]] = ()

    init: InitialWeights = Field("auto", description=INIT_DESCRIPTION)

    def build(self, spec: ModelSpec) -> nn.Module:
        """Children `features`, `avgpool`, `flatten` and `classifier`, initialised by `init`."""
        layers: list[nn.Module] = []
        inputs = spec.channels
        for depth, channels in zip(self.depths, (64, 128, 256, 512, 512), strict=True):
            outputs = self.scale(channels)
            for _ in range(depth):
                layers += [nn.Conv2d(inputs, outputs, 3, padding=1), spec.activation()]
                inputs = outputs
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        network = nn.Sequential(
            OrderedDict[str, nn.Module](
                features=nn.Sequential(*layers),
                avgpool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                classifier=nn.Linear(inputs, spec.num_classes),
            )
        )
        if self.init == "released":
            draw_released_weights(network)
        else:
            draw_calibrated_weights(network, spec.activation)
        return network

    def recipe(self, dataset: str) -> Mapping[str, Any]:
        """A smaller learning rate and clipped gradients, since nothing normalises the layers."""
        return {"lr": 0.05, "clip_norm": 1.0}

    def named_recipe(self, name: str, activation: str) -> NamedRecipe:
        """See the base class; the paper's recipe brings initial weights."""
        if name != "paper":
            return NamedRecipe({}, {"init": "calibrated"})
        return recipe_without_norms(PAPER, activation, "released, clipped")

    def check_recipe(self, name: str, recipe: Recipe) -> None:
        """See the base class."""
        refuse_divergence(name, self.init, recipe)


class VGG11(VGG):
    """VGG configuration A: eight convolutions, 9 225 610 parameters for three channels and ten classes."""

    depths = (1, 1, 2, 2, 2)


class VGG16(VGG):
    """VGG configuration D: thirteen convolutions, 14 719 818 parameters for three channels and ten classes."""

    depths = (2, 2, 3, 3, 3)


def draw_released_weights(network: nn.Module) -> None:
    """He-normal convolutions (fan-out), N(0, 0.01) linear layers, zero biases."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0.0, 0.01)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)
