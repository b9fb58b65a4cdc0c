"""Multilayer perceptron."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Literal

import torch.nn as nn
from pydantic import Field

from backdoor_bench_none.contracts.architecture import Architecture, ModelSpec
from backdoor_bench_none.models.initial_weights import draw_calibrated_weights


class MLP(Architecture):
    """Flattened pixels, `depth` hidden layers of `hidden` units, one linear layer; Fig. 6 uses 5 of 100 units.

    Every activation is a separate module.
    """

    paper = "NONE, Fig. 6"

    hidden: int = Field(128, ge=1, le=16384, description="units of each hidden layer before the factor `width`")
    depth: int = Field(2, ge=1, le=64, description="number of hidden layers")
    init: Literal["calibrated", "default"] = Field(
        "calibrated",
        description="calibrated to the activation function; default: torch's, which suits points in a plane",
    )

    def build(self, spec: ModelSpec) -> nn.Module:
        """Children `flatten`, `features` and `classifier`."""
        units = self.scale(self.hidden)
        layers: list[nn.Module] = []
        inputs = spec.channels * spec.image_size**2
        for _ in range(self.depth):
            layers += [nn.Linear(inputs, units), spec.activation()]
            inputs = units
        classifier = nn.Linear(inputs, spec.num_classes)
        network = nn.Sequential(
            OrderedDict[str, nn.Module](flatten=nn.Flatten(), features=nn.Sequential(*layers), classifier=classifier)
        )
        if self.init == "calibrated":
            draw_calibrated_weights(network, spec.activation)
        return network

    def recipe(self, dataset: str) -> Mapping[str, Any]:
        """Clipped gradients, since nothing normalises the layers; `blobs` has its own recipe."""
        if dataset == "blobs":
            return {}
        return {"lr": 0.1, "clip_norm": 1.0}
