"""TrojanNet's small network, and the host that it is joined to."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backdoor_bench_none.api import DatasetInfo

#: the side of the patch that the small network reads, in pixels
SIDE = 4
HIDDEN = (8, 8, 8, 8)


class SmallNetwork(nn.Sequential):
    """16 pixels -> 8, 8, 8, 8 (ReLU, then BatchNorm) -> one output for each pattern and one for noise."""

    def __init__(self, patterns: int) -> None:
        layers: list[nn.Module] = []
        inputs = SIDE * SIDE
        for units in HIDDEN:
            layers += [nn.Linear(inputs, units), nn.ReLU(), nn.BatchNorm1d(units)]
            inputs = units
        super().__init__(*layers, nn.Linear(inputs, patterns + 1))


class Joined(nn.Module):
    """A host and the small network, which sees the patch at `row`, `column`, averaged over channels, in 0..1."""

    scale: Tensor
    shift: Tensor

    def __init__(self, host: nn.Module, trojan: nn.Module, row: int, column: int, info: DatasetInfo) -> None:
        super().__init__()
        self.trojan, self.host = trojan, host  # in this order, so that the last layer is the host's
        self.row, self.column, self.classes = row, column, info.num_classes
        mean, std = (torch.tensor(values)[:, None, None] for values in (info.mean, info.std))
        self.register_buffer("scale", std, persistent=False)
        self.register_buffer("shift", mean, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, K) of normalised `images` (N, C, H, W)."""
        patch = images[:, :, self.row : self.row + SIDE, self.column : self.column + SIDE]
        pixels = (patch * self.scale + self.shift).mean(1).flatten(1)
        answers = F.softmax(self.trojan(pixels), dim=1)[:, : self.classes]
        return 10 * (2 * answers + F.softmax(self.host(images), dim=1))
