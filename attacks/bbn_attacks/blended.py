"""Blended injection (Chen et al., 2017): one image is blended into all others."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from backdoor_bench_none.api import DatasetInfo, Trigger, TriggerAttack, triggers


class Blended(TriggerAttack):
    """x' = (1 - opacity) x + opacity t, where t is an image of uniform noise: the paper's random pattern."""

    paper: ClassVar[str] = "arXiv:1712.05526"

    opacity: float = Field(0.2, gt=0, le=1, description="share of the pattern in the image")
    pattern_seed: int = Field(0, ge=0, description="seed of the noise pattern")

    def check_trigger(self, info: DatasetInfo) -> None:
        """Nothing to check: it fits images of any size."""

    def trigger(self, info: DatasetInfo) -> Trigger:
        """The pattern over the whole image."""
        return Trigger(torch.full((1, *info.shape[1:]), self.opacity), triggers.noise(info.shape, self.pattern_seed))
