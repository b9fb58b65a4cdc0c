"""The neurons of any network: where their values can be read, and which weights make and use them.

A neuron is an output channel of a convolution or of a hidden linear layer; its value on an image is the largest over
the places of its map (released code).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from backdoor_bench_none.context import Context
from backdoor_bench_none.models.hooks import Hook, record_outputs
from backdoor_bench_none.training import Pixels, iterate_normalized

Tap = Literal["pre_activation", "convolution"]
WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)
ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.Softplus, nn.Tanhshrink, nn.GELU, nn.SiLU,
    nn.Mish, nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Softshrink, nn.Hardshrink, nn.LogSigmoid, nn.Softsign,
)  # fmt: skip
ADDITIONS = ("add", "iadd", "add_")
#: Functions and methods after which channel c still is channel c, or the block of columns a flattening makes of it.
CHANNELWISE = (
    "relu", "relu_", "relu6", "leaky_relu", "elu", "gelu", "silu", "softplus", "tanh", "sigmoid", "hardtanh", "dropout",
    "max_pool2d", "boolean_dispatch", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "mean", "amax",
    "flatten", "contiguous", "squeeze", "log_softmax", "softmax",
)  # fmt: skip


@dataclass(frozen=True)
class Consumer:
    """A layer that reads a neuron's map: channel c feeds its input columns c * `columns` to (c + 1) * `columns` - 1."""

    name: str
    columns: int


@dataclass(frozen=True)
class Layer:
    """A convolution or hidden linear layer by module name, the norm right behind it, and the layers that read its
    output and nobody else's.

    `consumers` is None where the network could not be traced. Channels that are added to others (a residual stream)
    have no consumers of their own.
    """

    name: str
    norm: str | None
    consumers: tuple[Consumer, ...] | None
    activation: str | None = None

    def tap(self, kind: Tap) -> str:
        """The module whose output is read: the norm behind the layer if there is one (`pre_activation`), or the layer
        itself.
        """
        return self.norm if kind == "pre_activation" and self.norm else self.name


def find_layers(model: nn.Module, example: Tensor) -> list[Layer]:
    """All layers in order of execution, without the ones that make the logits; `example` (1, C, H, W) is what the
    network takes.
    """
    try:
        traced = fx.symbolic_trace(model)
        with torch.no_grad():
            ShapeProp(traced).propagate(example)
    except Exception:  # fx refuses control flow that depends on data, and many other things
        return _find_by_execution(model, example)
    modules = dict(traced.named_modules())
    layers = []
    for node in traced.graph.nodes:
        if isinstance(_module_of(node, modules), WEIGHTED):
            consumers, makes_logits = _follow(node, modules)
            if not makes_logits:
                activation = _activation_behind(node, modules)
                layers.append(Layer(str(node.target), _norm_behind(node, modules), consumers, activation))
    return layers


def _module_of(node: fx.Node, modules: Mapping[str, nn.Module]) -> nn.Module | None:
    return modules.get(str(node.target)) if node.op == "call_module" else None


def _norm_behind(node: fx.Node, modules: Mapping[str, nn.Module]) -> str | None:
    users = list(node.users)
    return str(users[0].target) if len(users) == 1 and isinstance(_module_of(users[0], modules), NORMS) else None


def _activation_behind(node: fx.Node, modules: Mapping[str, nn.Module]) -> str | None:
    """The first activation module that the output of `node` passes, through norms and sums."""
    while len(node.users) == 1:
        node = next(iter(node.users))
        module = _module_of(node, modules)
        if isinstance(module, ACTIVATIONS):
            return str(node.target)
        if isinstance(module, WEIGHTED):
            return None
    return None


def _channels(node: fx.Node) -> int:
    return int(node.meta["tensor_meta"].shape[1])


def _follow(start: fx.Node, modules: Mapping[str, nn.Module]) -> tuple[tuple[Consumer, ...] | None, bool]:
    """The layers that read `start` alone, and whether it makes the network's output, with no other layer between."""
    width, consumers = _channels(start), []
    makes_logits, resolved = False, True
    waiting = list(start.users)
    while waiting:
        node = waiting.pop()
        module = _module_of(node, modules)
        if isinstance(module, WEIGHTED):
            inputs = module.in_features if isinstance(module, nn.Linear) else module.in_channels
            consumers.append(Consumer(str(node.target), inputs // width))
            resolved &= getattr(module, "groups", 1) == 1 and inputs % width == 0
        elif node.op == "output":
            makes_logits = True
        elif module is not None or _function(node) in CHANNELWISE:
            waiting += node.users
        elif _function(node) not in ADDITIONS:
            resolved = False
            waiting += node.users
    return (tuple(consumers) if resolved else None), makes_logits


def _function(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _find_by_execution(model: nn.Module, example: Tensor) -> list[Layer]:
    """Run the network and watch which norm takes a layer's very output; the layer run last makes the logits."""
    order: list[str] = []
    norms: dict[str, str] = {}
    made_by: dict[int, str] = {}
    kept: list[Tensor] = []  # keeps ids from being reused

    def watch(name: str) -> Hook:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if isinstance(module, WEIGHTED):
                order.append(name)
                made_by[id(output)] = name
                kept.append(output)
            elif id(inputs[0]) in made_by:
                norms[made_by[id(inputs[0])]] = name

        return hook

    watched = {name: module for name, module in model.named_modules() if isinstance(module, (*WEIGHTED, *NORMS))}
    handles = [module.register_forward_hook(watch(name)) for name, module in watched.items()]
    try:
        with torch.no_grad():
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    return [Layer(name, norms.get(name), None) for name in dict.fromkeys(order[:-1])]


@torch.inference_mode()
def collect_activations(
    model: nn.Module, layers: list[Layer], tap: Tap, images: Tensor, pixels: Pixels, context: Context
) -> tuple[dict[str, Tensor], Tensor]:
    """One float32 pass over `images` (N, C, H, W) uint8, in order, in eval mode.

    Returns per layer name the neurons' values (neurons, N) float32, the largest over each map, and the probabilities
    (N, K).
    """
    model.eval()
    images = images.to(context.device)
    values: dict[str, Tensor] = {}
    probabilities = []
    with record_outputs(model, {layer.name: layer.tap(tap) for layer in layers}, _largest_over_map) as seen:
        start = 0
        for batch in iterate_normalized(images, pixels):
            probabilities.append(model(batch).softmax(1))
            for name, maxima in seen.items():
                if name not in values:
                    values[name] = maxima.new_empty(maxima.shape[1], len(images))
                values[name][:, start : start + len(batch)] = maxima.T
            start += len(batch)
    return {layer.name: values[layer.name] for layer in layers}, torch.cat(probabilities)


def _largest_over_map(output: Tensor) -> Tensor:
    """(B, C, ...) -> (B, C), a tensor of its own."""
    return output.clone() if output.ndim == 2 else output.amax(dim=tuple(range(2, output.ndim)))


@torch.no_grad()
def prune_neurons(model: nn.Module, layer: Layer, neurons: Tensor) -> None:
    """Set the weights that make `neurons` (k,) and those that read them to zero, and the norm's scale and shift: they
    never answer again.

    With an activation that is zero at zero their gradients are exactly zero too, except in a residual stream, where the
    norm's shift can return.
    """
    modules = dict(model.named_modules())
    for parameter in _rows(modules, layer):
        parameter[neurons] = 0
    for consumer in layer.consumers or ():
        columns = (
            neurons[:, None] * consumer.columns + torch.arange(consumer.columns, device=neurons.device)
        ).flatten()
        weight = modules[consumer.name].weight
        assert isinstance(weight, Tensor)
        weight[:, columns] = 0


@torch.no_grad()
def reinitialize_neurons(model: nn.Module, layer: Layer, neurons: Tensor, fresh: nn.Module) -> None:
    """Give `neurons` (k,) the weights they have in `fresh`, a newly built network of the same kind (Algorithm 1, line
    20).
    """
    for old, new in zip(
        _rows(dict(model.named_modules()), layer), _rows(dict(fresh.named_modules()), layer), strict=True
    ):
        old[neurons] = new[neurons]


def reestimate_norms(
    model: nn.Module, resets: Mapping[str, Tensor], images: Tensor, pixels: Pixels, context: Context
) -> None:
    """Measure BatchNorm's running statistics of re-initialised channels on `images`; those of all others stay.

    `resets` has the channels (k,) by the name of the norm.
    """
    modules = dict(model.named_modules())
    norms = {name: module for name in resets if isinstance(module := modules[name], nn.modules.batchnorm._BatchNorm)}
    before = {name: {key: value.clone() for key, value in norm.named_buffers()} for name, norm in norms.items()}
    momenta = {name: norm.momentum for name, norm in norms.items()}
    model.eval()
    for norm in norms.values():
        norm.train()
        norm.momentum = None  # a plain average over the batches
        norm.reset_running_stats()
    with torch.inference_mode():
        for batch in iterate_normalized(images.to(context.device), pixels):
            model(batch)
    for name, norm in norms.items():
        for key, value in norm.named_buffers():
            if value.ndim:
                before[name][key][resets[name]] = value[resets[name]]
            value.copy_(before[name][key])
        norm.momentum = momenta[name]
        norm.eval()


def _rows(modules: Mapping[str, nn.Module], layer: Layer) -> list[Tensor]:
    """The parameters with one row per neuron of `layer`: weight, bias, and its norm's scale and shift."""
    owners = [modules[layer.name]] + ([modules[layer.norm]] if layer.norm else [])
    return [p for owner in owners for p in (owner.weight, owner.bias) if isinstance(p, Tensor)]
