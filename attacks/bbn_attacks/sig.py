"""SIG (Barni et al., 2019): a faint sine wave over the images of the target class."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field

from backdoor_bench_none.api import STAMP_CHUNK, AttackTask, CleanLabelAttack, Context, DatasetInfo, ImageSet

if TYPE_CHECKING:
    from torch import Tensor


class SIG(CleanLabelAttack):
    """Adds delta * sin(2 pi j f / W) to column j of every image and clips to 0..255; no label is changed.

    By default the whole target class has the wave, at BackdoorBench's strength; Barni et al. use weaker waves, on 0.2
    to 0.4 of the class.
    """

    paper: ClassVar[str] = "arXiv:1902.11237"

    class_rate: float = Field(1.0, gt=0, le=1, description="share of the target class that is poisoned")
    delta: float = Field(40.0, gt=0, le=255, description="height of the wave in levels of 0..255, in training")
    test_delta: float | None = Field(None, gt=0, le=255, description="its height at test time; default: delta")
    frequency: float = Field(6.0, gt=0, description="waves over the width of the image")

    def check_trigger(self, info: DatasetInfo) -> None:
        """Nothing to check: it fits images of any size."""

    def stamp(self, images: Tensor, indices: Tensor, info: DatasetInfo, seed: int) -> Tensor:
        """`images` (N, C, H, W) uint8 with the wave used at test time."""
        return self.add_wave(images, self.test_delta or self.delta)

    def craft(self, chosen: ImageSet, indices: Tensor, task: AttackTask, context: Context) -> Tensor:
        """The chosen images with the wave used in training."""
        return self.add_wave(chosen.images, self.delta)

    def add_wave(self, images: Tensor, delta: float) -> Tensor:
        """`images` (N, C, H, W) uint8 with a wave of this height."""
        columns = torch.arange(images.shape[-1], dtype=torch.float64)
        wave = (delta * torch.sin(2 * math.pi * columns * self.frequency / images.shape[-1])).float()
        stamped = torch.empty_like(images)
        for start in range(0, len(images), STAMP_CHUNK):
            levels = images[start : start + STAMP_CHUNK].float().add_(wave)
            stamped[start : start + STAMP_CHUNK] = levels.round_().clamp_(0, 255)
        return stamped
