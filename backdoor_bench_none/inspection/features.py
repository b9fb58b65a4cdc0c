"""The input of a network's last layer: the features that clustering, spectral and pruning defenses work on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import torch
import torch.nn as nn

from backdoor_bench_none.contracts.context import Context
from backdoor_bench_none.contracts.network import Pixels, find_logits_layer, iterate_normalized

if TYPE_CHECKING:
    from torch import Tensor


class FeatureTap:
    """Runs a network in eval mode, inside a `with` block, and returns the input of the layer that makes the logits.

    `example` (1, C, H, W) is normalised. Features (N, D) are differentiable, and averaged over positions if they are a
    map.
    """

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        self.model = model.eval()
        self._head = find_logits_layer(model, example)
        self._features: Tensor | None = None

    def __enter__(self) -> Self:
        self._handle = self._head.register_forward_pre_hook(self._keep)
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.remove()

    def __call__(self, images: Tensor) -> Tensor:
        """Features (N, D) of normalised `images` (N, C, H, W)."""
        self.model(images)
        assert self._features is not None
        return self._features

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        features = inputs[0]
        if features.ndim > 2:
            self._features = features.flatten(2).mean(2)
        else:
            self._features = features.clone()


def collect_features(model: nn.Module, images: Tensor, pixels: Pixels, context: Context) -> Tensor:
    """The input of the layer that makes the logits (N, D) float32, averaged over positions if it is a map.

    One float32 pass over `images` (N, C, H, W) uint8, in order, in eval mode.
    """
    images = images.to(context.device)
    with torch.no_grad(), FeatureTap(model, pixels.normalize(images[:1])) as tap:
        features = torch.cat([tap(batch) for batch in iterate_normalized(images, pixels)])
    if not bool(torch.isfinite(features).all()):
        raise ValueError("the network's last hidden activations are not finite: it did not train")
    return features
