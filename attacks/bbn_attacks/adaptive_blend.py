"""Adaptive-Blend (Qi et al., 2023): pieces of a blended trigger in training, some of them with their true label."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from pydantic import Field

from backdoor_bench_none.api import (
    AttackTask,
    ConfigError,
    Context,
    DatasetInfo,
    PoisonedSamples,
    Trigger,
    TriggerAttack,
    check_rates,
    derive_seed,
    draw_indices,
    stamp_in_chunks,
    triggers,
)

if TYPE_CHECKING:
    from torch import Tensor


class AdaptiveBlend(TriggerAttack):
    """Blends pieces of a noise pattern into training images, and the whole pattern into test images.

    Every poisoned image has a random half of the 16 pieces, weakly blended; so does a share `cover_rate` of other
    images, which keep their label, so that triggered and benign features do not separate. Cover samples count as
    neither poisoned nor benign when a defense's flags are scored.
    """

    paper: ClassVar[str] = "Qi et al., ICLR 2023"

    poison_rate: float = Field(0.003, ge=0, le=1, description="share of the whole training set that is poisoned")
    cover_rate: float = Field(
        0.003, ge=0, le=1, description="share of the training set that gets pieces and keeps its label"
    )
    opacity: float = Field(0.15, gt=0, le=1, description="share of the pattern in training images")
    test_opacity: float = Field(0.2, gt=0, le=1, description="share of the pattern in test images")
    pieces: int = Field(4, ge=1, le=16, description="the pattern is cut into pieces x pieces squares")
    piece_rate: float = Field(0.5, gt=0, le=1, description="share of the pieces that a training image gets")
    pattern_seed: int = Field(0, ge=0, description="seed of the noise pattern")

    def check(self, info: DatasetInfo) -> None:
        """Check also that poisoned and cover samples fit into the training set, and pieces into the images."""
        super().check(info)
        check_rates(info, poison_rate=self.poison_rate, cover_rate=self.cover_rate)
        if self.pieces > min(info.shape[1:]):
            raise ConfigError(f"{self.pieces}x{self.pieces} pieces do not fit into images of {info.shape[1:]}")

    def trigger(self, info: DatasetInfo) -> Trigger:
        """The whole pattern, as at test time."""
        pattern = triggers.noise(info.shape, self.pattern_seed)
        return Trigger(torch.full((1, *info.shape[1:]), self.test_opacity), pattern)

    def draw_pieces(self, indices: Tensor, seed: int) -> Tensor:
        """Which pieces each training sample gets (N, 1, pieces, pieces), 0 or 1.

        They are round(piece_rate * pieces ** 2) in number, and depend on (seed, index) alone.
        """
        total = self.pieces**2
        kept = max(1, round(self.piece_rate * total))
        count = max(indices.tolist(), default=-1) + 1
        drawn = np.random.default_rng(seed).random((count, total))[indices.numpy()]
        chosen = torch.from_numpy(drawn <= np.partition(drawn, kept - 1, axis=1)[:, kept - 1 : kept])
        return chosen.reshape(-1, 1, self.pieces, self.pieces).float()

    def partial_trigger(self, info: DatasetInfo, pieces: Tensor) -> Trigger:
        """The trigger of each training image, from its `pieces` (N, 1, pieces, pieces)."""
        rows, columns = (torch.arange(extent) * self.pieces // extent for extent in info.shape[1:])
        mask = (pieces * self.opacity)[:, :, rows][:, :, :, columns]
        return Trigger(mask, triggers.noise(info.shape, self.pattern_seed))

    def poison(self, task: AttackTask, context: Context) -> PoisonedSamples:
        """Poisoned samples get the attacker's labels, cover samples keep theirs."""
        labels = task.data.labels
        poisoned = self.select(labels, derive_seed(context.seed, "select"))
        others = torch.ones(len(labels), dtype=torch.bool)
        others[poisoned] = False
        count = round(self.cover_rate * len(labels))
        cover = draw_indices(torch.nonzero(others).flatten(), count, derive_seed(context.seed, "cover"))
        indices, order = torch.cat([poisoned, cover]).sort()
        pieces = self.draw_pieces(indices, derive_seed(context.seed, "place"))
        images = stamp_in_chunks(task.data.images[indices], lambda part: self.partial_trigger(task.info, pieces[part]))
        decoys = order >= len(poisoned)
        wanted = self.relabel(labels[indices], task.info.num_classes)
        return PoisonedSamples(indices, images, torch.where(decoys, labels[indices], wanted), decoys)
