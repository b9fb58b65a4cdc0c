"""Finds the layers of a network whose outputs are neurons, by tracing it, else by running it once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from backdoor_bench_none.contracts.network import find_logits_layers, is_weighted
from backdoor_bench_none.inspection.hooks import Hook
from backdoor_bench_none.inspection.layers import Consumer, Layer

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


class _Tracer(fx.Tracer):
    """Keeps layers, norms and activations whole, including the user's subclasses of them."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            is_weighted(m) or isinstance(m, (*NORMS, *ACTIVATIONS)) or super().is_leaf_module(m, module_qualified_name)
        )


def find_layers(model: nn.Module, example: Tensor) -> list[Layer]:
    """All layers in order of execution, without the ones that make the logits; see `neurons.find_layers`."""
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
            if is_weighted(self.module(node)):
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
            if is_weighted(module):
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
            if is_weighted(module):
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
            if is_weighted(module):
                order.append(name)
                made_by[id(output), output._version] = name  # an activation in place raises the version
                kept.append(output)
            elif (maker := made_by.get((id(inputs[0]), inputs[0]._version))) is not None:
                norms[maker] = name

        return hook

    modules = model.named_modules()
    watched = {name: module for name, module in modules if is_weighted(module) or isinstance(module, NORMS)}
    handles = [module.register_forward_hook(watch(name)) for name, module in watched.items()]
    try:
        with torch.no_grad():
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    return [Layer(name, norms.get(name), None) for name in dict.fromkeys(order) if name not in without]
