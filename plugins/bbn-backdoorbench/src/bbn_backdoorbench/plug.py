"""The layer that BackdoorBench's NPD trains in front of one layer of a network."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from backdoor_bench_none.api import ConfigError

#: the toolbox's names of such layers -> their parts, in order
PLUGS = {
    "onlyconv": ("convolution",),
    "convbn": ("convolution", "norm"),
    "lightconv": ("convolution", "norm"),
    "twoconv": ("convolution", "norm", "convolution", "norm"),
}


class Plugged(nn.Module):
    """A layer with another in front of it: (N, C, H, W) through both."""

    def __init__(self, plug: nn.Module, layer: nn.Module) -> None:
        super().__init__()
        self.plug, self.layer = plug, layer

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output for the plug's output."""
        out: Tensor = self.layer(self.plug(x))
        return out


def insert_plug(model: nn.Module, target: str, kind: str) -> nn.Module:
    """Put an untrained plug of this kind in front of the convolution named `target`; returns `model`."""
    layer = dict(model.named_modules()).get(target)
    if not isinstance(layer, nn.Conv2d):
        raise ConfigError(f"the network has no convolution {target} for NPD to put a layer in front of")
    parent, _, name = target.rpartition(".")
    setattr(model.get_submodule(parent), name, Plugged(_new_plug(PLUGS[kind], layer.in_channels), layer))
    return model


def _new_plug(parts: Sequence[str], channels: int) -> nn.Sequential:
    plug = nn.Sequential()
    for part in parts:
        if part == "convolution":
            plug.append(nn.Conv2d(channels, channels, 1, bias=False))
        else:
            plug.append(nn.BatchNorm2d(channels))
    return plug
