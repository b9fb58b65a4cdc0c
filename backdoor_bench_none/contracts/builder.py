"""Builds the networks of a cell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn as nn

from backdoor_bench_none.contracts.architecture import Architecture, ModelSpec
from backdoor_bench_none.contracts.network import check_network, find_logits_layers, move, unwrap
from backdoor_bench_none.errors import ConfigError, TrainingError
from backdoor_bench_none.seeds import derive_seed

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ModelBuilder:
    """Builds an architecture for a spec; the initial weights depend on `key` and a draw alone."""

    architecture: Architecture
    spec: ModelSpec
    key: str
    device: torch.device
    #: weights that every network starts from, except for its last layer
    backbone: Mapping[str, Tensor] | None = field(default=None, repr=False)

    def __call__(self, draw: int) -> nn.Module:
        """A freshly initialised network on the device, channels last; torch's global generators are left unchanged."""
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would seed CUDA's generators too, which a defense may be drawing from
            torch.default_generator.manual_seed(derive_seed(self.key, draw))
            model = self._build()
        if self.backbone is not None:
            self.load_backbone(model, self.backbone)
        return move(model, self.device)

    def _build(self) -> nn.Module:
        """A network of the architecture, without wrappers; `TrainingError` if it cannot be trained here."""
        built = self.architecture.build(self.spec)
        name = type(self.architecture).__name__
        if not isinstance(built, nn.Module):
            raise TrainingError(f"{name}.build returned {type(built).__name__}, not a torch.nn.Module")
        model = unwrap(built)
        spec = self.spec
        try:
            check_network(model, (spec.channels, spec.image_size, spec.image_size), spec.num_classes)
        except TrainingError as error:
            raise TrainingError(f"the network of {name}.build: {error.message}") from error
        return model

    def load(self, weights: Mapping[str, Tensor]) -> nn.Module:
        """A network with these weights, in eval mode."""
        model = self(0)
        model.load_state_dict(dict(weights))
        return model.eval()

    def load_backbone(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        """Load `weights` into `model`, except for the layers that make the logits; `ConfigError` if they do not fit."""
        own = model.state_dict()
        heads = find_logits_layers(
            model, torch.zeros(1, self.spec.channels, self.spec.image_size, self.spec.image_size)
        )
        # by address and not by name: a tied weight has several names
        kept: set[int] = set()
        for head in heads.values():
            kept.update(tensor.data_ptr() for tensor in head.state_dict().values())
        wanted = {name: tensor for name, tensor in own.items() if tensor.data_ptr() not in kept}
        wrong = sorted(name for name in wanted if name not in weights or weights[name].shape != wanted[name].shape)
        if wrong:
            raise ConfigError(
                f"the pretrained weights do not fit: {len(wrong)} of {len(wanted)} tensors are missing or have another "
                f"shape, the first is {wrong[0]}",
                "pretrain the same architecture, with the same width and image size",
            )
        model.load_state_dict({**own, **{name: weights[name] for name in wanted}})
