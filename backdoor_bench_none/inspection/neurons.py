"""The neurons of any network: where their values can be read, and which weights make and use them.

A neuron is an output channel of a convolution or of a hidden linear layer; its value on an image is the largest over
the positions of its map (released code).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from backdoor_bench_none.contracts.context import Context
from backdoor_bench_none.contracts.network import WEIGHTED, Pixels, find_logits_layers, iterate_normalized
from backdoor_bench_none.inspection.hooks import Hook, record_outputs

Tap = Literal["pre_activation", "convolution"]
NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)
ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.Softplus, nn.Tanhshrink, nn.GELU, nn.SiLU,
    nn.Mish, nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Softshrink, nn.Hardshrink, nn.LogSigmoid, nn.Softsign,
)  # fmt: skip
#: Activations called as functions, and the modules that do the same.
FUNCTIONAL: Mapping[str, Callable[..., nn.Module]] = {
    "relu": nn.ReLU, "relu_": nn.ReLU, "relu6": nn.ReLU6, "leaky_relu": nn.LeakyReLU, "elu": nn.ELU, "selu": nn.SELU,
    "celu": nn.CELU, "softplus": nn.Softplus, "tanhshrink": nn.Tanhshrink, "gelu": nn.GELU, "silu": nn.SiLU,
    "mish": nn.Mish,
}  # fmt: skip
ADDITIONS = ("add", "iadd", "add_")
POOLS = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
)  # fmt: skip
#: Modules, functions and methods that treat every channel separately; the shapes show what a reduction or reshape does.
CHANNELWISE_MODULES = (
    *NORMS, *ACTIVATIONS, *POOLS, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Flatten,
    nn.Softmax, nn.LogSoftmax, nn.Threshold, nn.Hardsigmoid, nn.LocalResponseNorm, nn.Upsample,
)  # fmt: skip
CHANNELWISE = (
    *FUNCTIONAL, "tanh", "sigmoid", "hardtanh", "dropout",
    "max_pool2d", "boolean_dispatch", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "mean", "amax",
    "flatten", "view", "reshape", "contiguous", "squeeze", "log_softmax", "softmax",
)  # fmt: skip


@dataclass(frozen=True)
class Consumer:
    """A layer that reads a neuron's map: channel c feeds its input columns c * `columns` to (c + 1) * `columns` - 1."""

    name: str
    columns: int


@dataclass(frozen=True)
class Layer:
    """A convolution or hidden linear layer, the norm right behind it, and the layers that read its output alone.

    All are given by module name. `consumers` is None where the network could not be traced. Channels that are added to
    others (a residual stream) have no consumers.
    """

    name: str
    norm: str | None
    consumers: tuple[Consumer, ...] | None
    activation: str | None = None
    #: the activation itself, also where it is called as a function and has no name
    activation_module: nn.Module | None = field(default=None, compare=False, repr=False)

    def tap(self, kind: Tap) -> str:
        """The module whose output is read: the norm behind the layer, if any, for `pre_activation`, else the layer."""
        if kind == "pre_activation" and self.norm:
            return self.norm
        return self.name


class _Tracer(fx.Tracer):
    """Keeps layers, norms and activations whole, including the user's subclasses of them."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (*WEIGHTED, *NORMS, *ACTIVATIONS)) or super().is_leaf_module(m, module_qualified_name)


def find_layers(model: nn.Module, example: Tensor) -> list[Layer]:
    """All layers in order of execution, without the ones that make the logits.

    `model` is in eval mode; `example` (1, C, H, W) is what it takes. Raises `TrainingError` if it has no
    layer at all.
    """
    last = find_logits_layers(model, example)
    try:
        traced = fx.GraphModule(model, _Tracer().trace(model))
        with torch.no_grad():
            ShapeProp(traced).propagate(example)
    except Exception:  # fx rejects control flow that depends on data, and much else
        return _find_by_execution(model, example, last)
    return _Graph(traced).layers(last)


class _Graph:
    """A traced network with the shape of every value."""

    def __init__(self, traced: fx.GraphModule) -> None:
        self.modules = dict(traced.named_modules())
        self.calls: dict[str, list[fx.Node]] = {}
        for node in traced.graph.nodes:
            if isinstance(self.module(node), WEIGHTED):
                self.calls.setdefault(str(node.target), []).append(node)

    def module(self, node: fx.Node) -> nn.Module | None:
        if node.op != "call_module":
            return None
        return self.modules.get(str(node.target))

    def layers(self, without: Collection[str]) -> list[Layer]:
        return [self.layer(name, nodes) for name, nodes in self.calls.items() if name not in without]

    def layer(self, name: str, nodes: list[fx.Node]) -> Layer:
        if len(nodes) > 1:  # its outputs go different ways
            return Layer(name, None, None)
        return Layer(name, self.norm_behind(nodes[0]), self.consumers(nodes[0]), *self.activation_behind(nodes[0]))

    def norm_behind(self, node: fx.Node) -> str | None:
        users = _users(node)
        if len(users) == 1 and isinstance(self.module(users[0]), NORMS):
            return str(users[0].target)
        return None

    def activation_behind(self, node: fx.Node) -> tuple[str | None, nn.Module | None]:
        """The first activation that the output of `node` passes, through norms and sums: its name and its module.

        An activation called as a function has no name; its module is a stand-in with the same arguments.
        """
        while len(users := _users(node)) == 1:
            node = users[0]
            module = self.module(node)
            if isinstance(module, ACTIVATIONS):
                return str(node.target), module
            if _function(node) in FUNCTIONAL:
                return None, _stand_in(node)
            if isinstance(module, WEIGHTED):
                return None, None
        return None, None

    def consumers(self, start: fx.Node) -> tuple[Consumer, ...] | None:
        """The layers that read `start` alone; None where this cannot be determined."""
        module = self.module(start)
        neurons, consumers = _neurons_of(module), []
        # with the number of columns: how many values of a consumer's input a channel fills
        waiting = [(user, 1) for user in _users(start)]
        if _shape(start)[1] != neurons:
            return None
        while waiting:
            node, columns = waiting.pop()
            module = self.module(node)
            if isinstance(module, WEIGHTED):
                if len(self.calls[str(node.target)]) > 1 or getattr(module, "groups", 1) != 1:
                    return None
                consumers.append(Consumer(str(node.target), columns))
            elif isinstance(module, CHANNELWISE_MODULES) or _function(node) in CHANNELWISE:
                if (columns_after := _columns_after(node, neurons, columns)) is None:
                    return None
                waiting += [(user, columns_after) for user in _users(node)]
            elif _function(node) not in ADDITIONS:
                return None
        return tuple(consumers)


def _stand_in(node: fx.Node) -> nn.Module | None:
    """The module equivalent to a call of an activation function; None for arguments that it does not take."""
    try:
        options = {name: value for name, value in node.kwargs.items() if name not in ("input", "inplace")}
        return FUNCTIONAL[_function(node)](*node.args[1:], **options)
    except TypeError:
        return None


def _users(node: fx.Node) -> list[fx.Node]:
    """The nodes that use the value of `node`, not only its shape, or that return it."""
    return [user for user in node.users if user.op == "output" or "tensor_meta" in user.meta]


def _shape(node: fx.Node) -> torch.Size:
    shape: torch.Size = node.meta["tensor_meta"].shape
    return shape


def _columns_after(node: fx.Node, neurons: int, columns: int) -> int | None:
    """The columns of a channel behind a channelwise node; None if the channels are no longer separate."""
    before, after = _shape(node.all_input_nodes[0]), _shape(node)
    if len(after) < 2 or after[0] != before[0]:
        return None
    if after[1] == before[1] and len(after) in (2, len(before)):
        return columns
    if len(after) == 2 and after[1] == before[1:].numel():  # flattened
        return after[1] // neurons
    return None


def _neurons_of(module: nn.Module | None) -> int:
    if isinstance(module, nn.Linear):
        return module.out_features
    return int(getattr(module, "out_channels", 0))


def _function(node: fx.Node) -> str:
    if isinstance(node.target, str):
        return node.target
    return getattr(node.target, "__name__", "")


def _find_by_execution(model: nn.Module, example: Tensor, without: Collection[str]) -> list[Layer]:
    """The layers in the order in which they run, and the norms that take their unchanged output."""
    order: list[str] = []
    norms: dict[str, str] = {}
    made_by: dict[tuple[int, int], str] = {}
    kept: list[Tensor] = []  # keeps the outputs alive, so that their ids are not reused

    def watch(name: str) -> Hook:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if isinstance(module, WEIGHTED):
                order.append(name)
                made_by[id(output), output._version] = name  # an activation in place raises the version
                kept.append(output)
            elif (maker := made_by.get((id(inputs[0]), inputs[0]._version))) is not None:
                norms[maker] = name

        return hook

    watched = {name: module for name, module in model.named_modules() if isinstance(module, (*WEIGHTED, *NORMS))}
    handles = [module.register_forward_hook(watch(name)) for name, module in watched.items()]
    try:
        with torch.no_grad():
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    return [Layer(name, norms.get(name), None) for name in dict.fromkeys(order) if name not in without]


@torch.no_grad()
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


def _largest_over_map(module: nn.Module, output: Tensor) -> Tensor:
    """(B, C, ...) -> (B, C), as a new tensor; for a linear layer over tokens, (B, T, C) -> (B, C)."""
    if output.ndim == 2:
        return output.clone()
    positions = range(2, output.ndim)
    if isinstance(module, nn.Linear | nn.LayerNorm):  # channels last
        positions = range(1, output.ndim - 1)
    return output.amax(dim=tuple(positions))


@torch.no_grad()
def prune_neurons(model: nn.Module, layer: Layer, neurons: Tensor) -> None:
    """Set the weights that make and read `neurons` (k,), and their norm's scale and shift, to zero.

    The neurons are silent from then on. With an activation that is zero at zero their gradients are exactly zero too,
    except in a residual stream, where the norm's shift can return.
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
    """Give `neurons` (k,) their weights in `fresh`, a newly built network of the same kind (Algorithm 1, line 20)."""
    for old, new in zip(
        _rows(dict(model.named_modules()), layer), _rows(dict(fresh.named_modules()), layer), strict=True
    ):
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
        norm.momentum = None  # a plain average over the batches
        norm.reset_running_stats()
    with torch.no_grad():
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


def _rows(modules: Mapping[str, nn.Module], layer: Layer) -> list[Tensor]:
    """The parameters with one row per neuron of `layer`: weight, bias, and its norm's scale and shift."""
    parameters = [modules[layer.name].weight, modules[layer.name].bias]
    if layer.norm:
        parameters += [modules[layer.norm].weight, modules[layer.norm].bias]
    return [parameter for parameter in parameters if isinstance(parameter, Tensor)]
