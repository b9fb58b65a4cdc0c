"""Where the values of neurons can be read in a network, and which layers use them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import nn

Tap = Literal["pre_activation", "convolution"]


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
