"""What the last layer of a network sees: the features that clustering, spectral and pruning defenses work on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from backdoor_bench_none.context import Context
from backdoor_bench_none.models.neurons import WEIGHTED
from backdoor_bench_none.training import Pixels, iterate_normalized


@torch.no_grad()
def find_head(model: nn.Module, example: Tensor) -> nn.Module:
    """The convolution or linear layer that runs last on `example` (1,
    C, H, W) in eval mode: the one that makes the logits.
    """
    model.eval()
    ran: list[nn.Module] = []
    layers = [module for module in model.modules() if isinstance(module, WEIGHTED)]
    handles = [layer.register_forward_hook(lambda module, inputs, output: ran.append(module)) for layer in layers]
    try:
        model(example)
    finally:
        for handle in handles:
            handle.remove()
    if not ran:
        raise ValueError("the network has no convolution and no linear layer")
    return ran[-1]


@torch.no_grad()
def collect_features(model: nn.Module, images: Tensor, pixels: Pixels, context: Context) -> Tensor:
    """The input of the layer that makes the logits (N, D) float32, averaged over places if it is a map.

    One float32 pass over `images` (N, C, H, W) uint8, in order, in eval mode.
    """
    images = images.to(context.device)
    features: list[Tensor] = []
    head = find_head(model, pixels.normalize(images[:1]))

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        features.append(inputs[0].flatten(2).mean(2) if inputs[0].ndim > 2 else inputs[0].clone())

    handle = head.register_forward_pre_hook(keep)
    try:
        for batch in iterate_normalized(images, pixels):
            model(batch)
    finally:
        handle.remove()
    found = torch.cat(features)
    if not bool(torch.isfinite(found).all()):
        raise ValueError("the network's last hidden activations are not finite: it did not train")
    return found
