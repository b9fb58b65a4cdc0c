"""Network in Network as in the released NONE code."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field
from torch import nn

from backdoor_bench_none.contracts.architecture import Architecture, ModelSpec
from backdoor_bench_none.models.initial_weights import draw_calibrated_weights


class NiN(Architecture):
    """Three blocks of one spatial and two 1x1 convolutions, 966 986 parameters for three channels and ten classes.

    The activation follows the last convolution too, so that with ReLU no logit is negative. Global average pooling
    replaces the released 8x8 pooling (equal at 32 px). Every activation is a separate module; the released code shares
    one. The released initialisation, N(0, 0.05), stays at chance for several epochs.
    """

    paper = "NONE, section 5.1; arXiv:1312.4400"

    init: Literal["calibrated", "released"] = Field(
        "calibrated", description="initial weights: calibrated to the activation, or as in the released code"
    )

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
            draw_released_weights(network)
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


def draw_released_weights(network: nn.Module) -> None:
    """N(0, 0.05) weights and N(0, 0.001) biases."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.normal_(module.weight, 0.0, 0.05)
            nn.init.normal_(module.bias, 0.0, 0.001)
