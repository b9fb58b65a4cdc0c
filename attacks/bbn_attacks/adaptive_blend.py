"""Adaptive-Blend (Qi et al., 2023): pieces of a blended trigger in training, some of them with their true label."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

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


class AdaptiveBlend(TriggerAttack):
    """Every poisoned image bears a random half of the 16 pieces of a noise pattern, weakly; so do as many others that
    keep their label (`cover_rate`), so that triggered and benign features do not separate. The whole pattern is stamped
    at test time. Cover samples count neither as poisoned nor as benign when a defense's flags are scored.
    """

    paper: ClassVar[str] = "Qi et al., ICLR 2023"

    poison_rate: float = Field(0.003, ge=0, le=1, description="share of the whole training set that is poisoned")
    cover_rate: float = Field(
        0.003, ge=0, le=1, description="share of the training set that bears pieces and keeps its label"
    )
    opacity: float = Field(0.15, gt=0, le=1, description="share of the pattern in training images")
    test_opacity: float = Field(0.2, gt=0, le=1, description="share of the pattern in test images")
    pieces: int = Field(4, ge=1, le=16, description="the pattern is cut into pieces x pieces squares")
    piece_rate: float = Field(0.5, gt=0, le=1, description="share of the pieces that a training image bears")
    pattern_seed: int = Field(0, ge=0, description="which noise image")

    def check(self, info: DatasetInfo) -> None:
        """Also: poisoned and cover samples find room, and the pieces do."""
        super().check(info)
        check_rates(info, poison_rate=self.poison_rate, cover_rate=self.cover_rate)
        if self.pieces > min(info.shape[1:]):
            raise ConfigError(f"{self.pieces}x{self.pieces} pieces do not fit into images of {info.shape[1:]}")

    def trigger(self, info: DatasetInfo) -> Trigger:
        """The whole pattern, as at test time."""
        pattern = triggers.noise(info.shape, self.pattern_seed)
        return Trigger(torch.full((1, *info.shape[1:]), self.test_opacity), pattern)

    def draw_pieces(self, indices: Tensor, seed: int) -> Tensor:
        """Which pieces each training sample bears (N, 1, pieces, pieces), 0 or 1: round(piece_rate * pieces ** 2) of
        them, by (seed, index).
        """
        places = self.pieces**2
        count = int(indices.max()) + 1 if len(indices) else 0
        borne = max(1, round(self.piece_rate * places))
        drawn = np.random.default_rng(seed).random((count, places))[indices.numpy()]
        chosen = torch.from_numpy(drawn <= np.partition(drawn, borne - 1, axis=1)[:, borne - 1 : borne])
        return chosen.reshape(-1, 1, self.pieces, self.pieces).float()

    def partial_trigger(self, info: DatasetInfo, pieces: Tensor) -> Trigger:
        """The trigger of each training image, of the pieces (N, 1, pieces, pieces) that it bears."""
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
