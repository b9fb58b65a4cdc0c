"""Makes the networks of a cell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from backdoor_bench_none.models.architecture import Architecture, ModelSpec
from backdoor_bench_none.seeds import derive_seed
from backdoor_bench_none.training import move


@dataclass(frozen=True)
class ModelBuilder:
    """Builds an architecture for a spec, with initial weights that are a function of `key` and a draw."""

    architecture: Architecture
    spec: ModelSpec
    key: str
    device: torch.device

    def __call__(self, draw: int) -> nn.Module:
        """A freshly initialised network on the device, channels last; torch's global generator is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.key, draw))
            model = self.architecture.build(self.spec)
        return move(model, self.device)

    def load(self, weights: Mapping[str, Tensor]) -> nn.Module:
        """A network with these weights, in eval mode."""
        model = self(0)
        model.load_state_dict(dict(weights))
        return model.eval()
