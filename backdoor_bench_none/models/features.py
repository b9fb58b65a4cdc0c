"""What the last layer of a network sees: the features that clustering and spectral defenses work on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from backdoor_bench_none.context import Context
from backdoor_bench_none.training import Pixels, iterate_normalized, last_layer


@torch.no_grad()
def collect_features(model: nn.Module, images: Tensor, pixels: Pixels, context: Context) -> Tensor:
    """The input of the layer that makes the logits (N, D) float32, averaged over places if it is a map.

    One float32 pass over `images` (N, C, H, W) uint8, in order, in eval mode.
    """
    model.eval()
    features: list[Tensor] = []
    head = last_layer(model)

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        features.append(inputs[0].flatten(2).mean(2) if inputs[0].ndim > 2 else inputs[0].clone())

    handle = head.register_forward_pre_hook(keep)
    try:
        for batch in iterate_normalized(images.to(context.device), pixels):
            model(batch)
    finally:
        handle.remove()
    return torch.cat(features)
