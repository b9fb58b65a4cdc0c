"""Base classes of architectures and activation functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn as nn
from pydantic import Field

from backdoor_bench_none.contracts.component import Component
from backdoor_bench_none.contracts.recipe import PAPER, NamedRecipe, Recipe


@dataclass(frozen=True)
class ModelSpec:
    """What a network is built for: its input and output sizes and its activation function.

    The input is (N, channels, image_size, image_size), the output logits (N, num_classes). `activation()` returns a new
    module on every call, so that PReLU learns one slope per layer.
    """

    num_classes: int
    channels: int
    image_size: int
    activation: Callable[[], nn.Module]


class Architecture(Component):
    """Base of all architectures; subclasses implement `build`."""

    width: float = Field(1.0, gt=0, le=4, description="factor on the number of channels of every hidden layer")

    def build(self, spec: ModelSpec) -> nn.Module:
        """A freshly initialised network for `spec`, drawing from torch's global generator."""
        raise NotImplementedError

    def recipe(self, dataset: str) -> Mapping[str, Any]:
        """The fields of the training recipe that this architecture changes on `dataset`."""
        return {}

    def named_recipe(self, name: str, activation: str) -> NamedRecipe:
        """The recipe `name` ("paper" or "default") for networks with the activation function of this registered name.

        It raises `ConfigError` for a combination that is known not to train.
        """
        if name == "paper":
            return NamedRecipe(PAPER)
        return NamedRecipe({})

    def check_recipe(self, name: str, recipe: Recipe) -> None:
        """Raise `ConfigError` if networks of these parameters are known not to train with `recipe`.

        `name` is the named recipe that it started from.
        """

    def scale(self, channels: int) -> int:
        """`channels` times `width`, at least 1."""
        return max(1, round(channels * self.width))


class Activation(Component):
    """Base of all activation functions; subclasses implement `build`."""

    def build(self) -> nn.Module:
        """A new module of this activation function, not in place."""
        raise NotImplementedError
