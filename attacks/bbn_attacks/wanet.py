"""WaNet (Nguyen and Tran, 2021): the trigger is a smooth warp of the image."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field

from backdoor_bench_none.api import (
    STAMP_CHUNK,
    AttackTask,
    ConfigError,
    Context,
    DatasetInfo,
    PoisonedSamples,
    TriggerAttack,
    check_rates,
    derive_seed,
    draw_indices,
)

if TYPE_CHECKING:
    from torch import Tensor


class WaNet(TriggerAttack):
    """Warps every triggered image by one fixed, random, smooth field of shifts.

    `cross_rate` is the noise mode of the paper: training images warped by the field plus separate noise, which keep
    their labels, so that only the exact field is the trigger. They count as neither poisoned nor benign. The paper
    draws the poisoned samples anew in every batch; here they are drawn once, as in every poisoning attack.
    """

    paper: ClassVar[str] = "arXiv:2102.10369"

    poison_rate: float = Field(0.1, ge=0, le=1, description="share of the whole training set that is poisoned")
    cross_rate: float = Field(0.2, ge=0, le=1, description="share of the training set that is warped with noise")
    grid: int = Field(4, ge=2, le=64, description="the field is drawn at grid x grid points and enlarged")
    strength: float = Field(0.5, gt=0, description="mean shift along each axis, in half pixels")
    field_seed: int = Field(0, ge=0, description="seed of the field")

    def check(self, info: DatasetInfo) -> None:
        """Check also that poisoned and cross samples fit into the training set, and that images can be warped."""
        super().check(info)
        check_rates(info, poison_rate=self.poison_rate, cross_rate=self.cross_rate)
        if min(info.shape[1:]) < 2:
            raise ConfigError(f"wanet: images of {info.name} are single pixels, which cannot be warped")

    def check_trigger(self, info: DatasetInfo) -> None:
        """Nothing to check: it fits images of any size."""

    def field(self, info: DatasetInfo) -> Tensor:
        """Where each pixel is sampled from (1, H, W, 2), in the convention of `grid_sample`: -1..1, x first."""
        drawn = np.random.default_rng(self.field_seed).uniform(-1, 1, (1, 2, self.grid, self.grid))
        shifts = torch.from_numpy(drawn / np.abs(drawn).mean())
        height, width = info.shape[1:]
        smooth = F.interpolate(shifts, size=(height, width), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
        rows, columns = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
        still = torch.stack(torch.meshgrid(rows, columns, indexing="ij")[::-1], dim=-1)[None]
        return (still + self.strength * smooth / height).clamp(-1, 1)

    def stamp(self, images: Tensor, indices: Tensor, info: DatasetInfo, seed: int) -> Tensor:
        """`images` (N, C, H, W) uint8, warped."""
        field = self.field(info).float()
        return bend(images, lambda count: field.expand(count, -1, -1, -1))

    def poison(self, task: AttackTask, context: Context) -> PoisonedSamples:
        """Poisoned samples are warped and relabelled; cross samples are warped with noise and keep their label."""
        poisoned = super().poison(task, context)
        others = torch.ones(len(task.data), dtype=torch.bool)
        others[poisoned.indices] = False
        count = round(self.cross_rate * len(task.data))
        cross = draw_indices(torch.nonzero(others).flatten(), count, derive_seed(context.seed, "cross"))
        generator = np.random.default_rng(derive_seed(context.seed, "noise"))
        field, size = self.field(task.info).float(), task.info.shape[1]

        def noisy(images: int) -> Tensor:
            noise = torch.from_numpy(generator.random((images, *field.shape[1:]), dtype=np.float32))
            return noise.mul_(2 / size).sub_(1 / size).add_(field).clamp_(-1, 1)

        bent = bend(task.data.images[cross], noisy)
        indices, order = torch.cat([poisoned.indices, cross]).sort()
        return PoisonedSamples(
            indices,
            torch.cat([poisoned.images, bent])[order],
            torch.cat([poisoned.labels, task.data.labels[cross]])[order],
            order >= len(poisoned),
        )


def bend(images: Tensor, fields: Callable[[int], Tensor]) -> Tensor:
    """`images` (N, C, H, W) uint8, warped with bilinear interpolation and rounded.

    `fields(n)` returns the positions (n, H, W, 2) that the next n images are sampled at.
    """
    bent = torch.empty_like(images)
    for start in range(0, len(images), STAMP_CHUNK):
        part = images[start : start + STAMP_CHUNK]
        sampled = F.grid_sample(part.float(), fields(len(part)), align_corners=True)
        bent[start : start + STAMP_CHUNK] = sampled.round_().clamp_(0, 255)
    return bent
