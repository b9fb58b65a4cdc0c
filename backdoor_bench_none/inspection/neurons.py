"""The neurons of any network: reads their values, and sets or renews the weights that make and use them.

A neuron is an output channel of a convolution or of a hidden linear layer; its value on an image is the largest over
the positions of its map (released code).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.nn as nn

from backdoor_bench_none.contracts.context import Context
from backdoor_bench_none.contracts.network import Pixels, iterate_normalized
from backdoor_bench_none.inspection.hooks import record_outputs
from backdoor_bench_none.inspection.layers import Layer, Tap

if TYPE_CHECKING:
    from torch import Tensor


def find_layers(model: nn.Module, example: Tensor) -> list[Layer]:
    """All layers in order of execution, without the ones that make the logits.

    `model` is in eval mode; `example` (1, C, H, W) is what it takes. Raises `TrainingError` if it has no
    layer at all.
    """
    from backdoor_bench_none.inspection import tracing  # derives from torch's classes, which most commands do not need

    return tracing.find_layers(model, example)


def collect_activations(
    model: nn.Module, layers: list[Layer], tap: Tap, images: Tensor, pixels: Pixels, context: Context
) -> tuple[dict[str, Tensor], Tensor]:
    """The neurons' values and the network's probabilities, in one float32 pass over `images` (N, C, H, W) uint8.

    The pass is in order and in eval mode. Returns per layer name the values (neurons, N) float32, the largest over each
    map, and the probabilities (N, K).
    """
    model.eval()
    images = images.to(context.device)
    values: dict[str, Tensor] = {}
    probabilities = []
    taps = {layer.name: layer.tap(tap) for layer in layers}
    with torch.no_grad(), record_outputs(model, taps, _largest_over_map) as seen:
        start = 0
        for batch in iterate_normalized(images, pixels):
            probabilities.append(model(batch).softmax(1))
            for name, maxima in seen.items():
                if name not in values:
                    values[name] = maxima.new_empty(maxima.shape[1], len(images))
                values[name][:, start : start + len(batch)] = maxima.T
            start += len(batch)
    return {layer.name: values[layer.name] for layer in layers}, torch.cat(probabilities)


def _largest_over_map(module: nn.Module, output: Tensor) -> Tensor:
    """(B, C, ...) -> (B, C), as a new tensor; for a linear layer over tokens, (B, T, C) -> (B, C)."""
    if output.ndim == 2:
        return output.clone()
    positions = range(2, output.ndim)
    if isinstance(module, nn.Linear | nn.LayerNorm):  # channels last
        positions = range(1, output.ndim - 1)
    return output.amax(dim=tuple(positions))


def prune_neurons(model: nn.Module, layer: Layer, neurons: Tensor) -> None:
    """Set the weights that make and read `neurons` (k,), and their norm's scale and shift, to zero.

    The neurons are silent from then on. With an activation that is zero at zero their gradients are exactly zero too,
    except in a residual stream, where the norm's shift can return.
    """
    modules = dict(model.named_modules())
    with torch.no_grad():
        for parameter in _rows(modules, layer):
            parameter[neurons] = 0
        for consumer in layer.consumers or ():
            columns = (
                neurons[:, None] * consumer.columns + torch.arange(consumer.columns, device=neurons.device)
            ).flatten()
            weight = modules[consumer.name].weight
            assert isinstance(weight, torch.Tensor)
            weight[:, columns] = 0


def reinitialize_neurons(model: nn.Module, layer: Layer, neurons: Tensor, fresh: nn.Module) -> None:
    """Give `neurons` (k,) their weights in `fresh`, a newly built network of the same kind (Algorithm 1, line 20)."""
    rows = (_rows(dict(network.named_modules()), layer) for network in (model, fresh))
    with torch.no_grad():
        for old, new in zip(*rows, strict=True):
            old[neurons] = new[neurons]


def reestimate_norms(
    model: nn.Module, resets: Mapping[str, Tensor], images: Tensor, pixels: Pixels, context: Context
) -> None:
    """Measure BatchNorm's running statistics of re-initialised channels on `images`; those of all others stay.

    `resets` holds the channels (k,) by the name of the norm.
    """
    modules = dict(model.named_modules())
    norms = {name: module for name in resets if isinstance(module := modules[name], nn.modules.batchnorm._BatchNorm)}
    before = {name: {key: value.clone() for key, value in norm.named_buffers()} for name, norm in norms.items()}
    momenta = {name: norm.momentum for name, norm in norms.items()}
    model.eval()
    for norm in norms.values():
        norm.train()
        norm.reset_running_stats()
    with torch.no_grad(), _plain_averages(norms.values()):
        for batch in iterate_normalized(images.to(context.device), pixels):
            if len(batch) > 1:  # BatchNorm refuses a single value
                model(batch)
    for name, norm in norms.items():
        for key, value in norm.named_buffers():
            if value.ndim:
                before[name][key][resets[name]] = value[resets[name]]
            value.copy_(before[name][key])
        norm.momentum = momenta[name]
        norm.eval()


@contextmanager
def _plain_averages(norms: Iterable[nn.modules.batchnorm._BatchNorm]) -> Iterator[None]:
    """The k-th batch counts 1 / k in the running statistics of each norm, so that they are means over the batches.

    That is what a momentum of None means too, but with that each norm reads k from the device, and waits for it.
    """
    batches: Counter[nn.Module] = Counter()

    def set_momentum(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        batches[norm] += 1
        norm.momentum = 1 / batches[norm]  # type: ignore[assignment]

    handles = [norm.register_forward_pre_hook(set_momentum) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rows(modules: Mapping[str, nn.Module], layer: Layer) -> list[Tensor]:
    """The parameters with one row per neuron of `layer`: weight, bias, and its norm's scale and shift."""
    parameters = [modules[layer.name].weight, modules[layer.name].bias]
    if layer.norm:
        parameters += [modules[layer.norm].weight, modules[layer.norm].bias]
    return [parameter for parameter in parameters if isinstance(parameter, torch.Tensor)]
