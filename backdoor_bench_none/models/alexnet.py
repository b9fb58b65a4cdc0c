"""AlexNet as in torchvision, with a stem for small images."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
import torch.nn as nn

from backdoor_bench_none.contracts.architecture import Architecture, ModelSpec
from backdoor_bench_none.contracts.recipe import PAPER, NamedRecipe
from backdoor_bench_none.models.initial_weights import draw_calibrated_weights
from backdoor_bench_none.models.paper_recipe import recipe_without_norms

LARGEST_SMALL_IMAGE = 64
POOLED_SIZE = 6


class AlexNet(Architecture):
    """torchvision's AlexNet, 57 044 810 parameters for 224 px, three channels and ten classes.

    Up to 64 px the first convolution is 3x3 of stride 2 instead of 11x11 of stride 4, and pooling is 2x2 rounding up
    instead of 3x3 of stride 2. The first linear layer takes what the convolutions leave, at most 6x6 positions. Every
    activation is a separate module.
    """

    paper = "NONE, section 5.1; arXiv:1404.5997"

    def build(self, spec: ModelSpec) -> nn.Module:
        """Children as in torchvision, and `flatten`; initial weights are calibrated to the activation."""
        features = self.build_features(spec)
        channels, size = measure_output(features, spec)
        # Average pooling of equal size does nothing, but its backward pass on a GPU is not deterministic.
        avgpool: nn.Module = nn.Identity()
        if size > POOLED_SIZE:
            avgpool = nn.AdaptiveAvgPool2d(POOLED_SIZE)
        hidden = self.scale(4096)
        classifier = nn.Sequential(
            nn.Dropout(0.5),
            nn.Linear(channels * min(size, POOLED_SIZE) ** 2, hidden),
            spec.activation(),
            nn.Dropout(0.5),
            nn.Linear(hidden, hidden),
            spec.activation(),
            nn.Linear(hidden, spec.num_classes),
        )
        network = nn.Sequential(
            OrderedDict[str, nn.Module](features=features, avgpool=avgpool, flatten=nn.Flatten(), classifier=classifier)
        )
        draw_calibrated_weights(network, spec.activation)
        return network

    def build_features(self, spec: ModelSpec) -> nn.Sequential:
        """Five convolutions and three max poolings."""
        small = spec.image_size <= LARGEST_SMALL_IMAGE
        widths = [self.scale(channels) for channels in (64, 192, 384, 256, 256)]
        if small:
            stem = nn.Conv2d(spec.channels, widths[0], 3, stride=2, padding=1)
        else:
            stem = nn.Conv2d(spec.channels, widths[0], 11, stride=4, padding=2)
        layers: list[nn.Module] = [stem, spec.activation(), make_pool(small)]
        layers += [nn.Conv2d(widths[0], widths[1], 5, padding=2), spec.activation(), make_pool(small)]
        for inputs, outputs in pairwise(widths[1:]):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), spec.activation()]
        return nn.Sequential(*layers, make_pool(small))

    def recipe(self, dataset: str) -> Mapping[str, Any]:
        """A smaller learning rate and clipped gradients, since nothing normalises the layers."""
        return {"lr": 0.05, "clip_norm": 1.0}

    def named_recipe(self, name: str, activation: str) -> NamedRecipe:
        """See the base class; the paper's recipe is clipped, as its learning rate needs with calibrated weights."""
        if name != "paper":
            return NamedRecipe({})
        return recipe_without_norms(PAPER, activation, "calibrated")


def make_pool(small: bool) -> nn.Module:
    """Max pooling that halves the side: 2x2 rounding up for small images, else torchvision's 3x3."""
    if small:
        return nn.MaxPool2d(2, ceil_mode=True)
    return nn.MaxPool2d(3, stride=2)


def measure_output(features: nn.Module, spec: ModelSpec) -> tuple[int, int]:
    """The number of channels and the side of the output of `features`."""
    with torch.no_grad():
        output = features(torch.zeros(1, spec.channels, spec.image_size, spec.image_size))
    return output.shape[1], output.shape[2]
