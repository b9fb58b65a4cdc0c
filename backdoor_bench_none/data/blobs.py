"""Five Gaussian blobs in the plane: the two-dimensional data of Figs. 6 and 7."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field

from backdoor_bench_none.contracts.dataset import Dataset, DatasetInfo, ImageSet

#: The paper gives no centres. The first two straddle the height of its trigger, 0.6; class 3 is its target.
CENTRES = ((0.20, 0.60), (0.80, 0.55), (0.15, 0.15), (0.85, 0.10), (0.50, 0.85))


class Blobs(Dataset):
    """Points drawn from five isotropic Gaussians, as 1x1 images of two channels: x and y in 0..1, rounded to 1/255.

    Centres, spread and numbers are our choice: the paper gives none (section 8.1). Two benign blobs must straddle the
    height of the trigger; otherwise ten poisoned points suffice to plant it.
    """

    paper: ClassVar[str] = "NONE, section 8.1"

    per_class: int = Field(400, ge=2, le=100_000, description="training points of each blob, and as many test points")
    spread: float = Field(0.08, gt=0, le=1, description="standard deviation of each coordinate")
    draw: int = Field(0, ge=0, description="seed of the points")

    def info(self) -> DatasetInfo:
        """The metadata; coordinates are not normalised."""
        return DatasetInfo(
            name="blobs",
            shape=(2, 1, 1),
            num_classes=len(CENTRES),
            train_size=self.per_class * len(CENTRES),
            mean=(0.0, 0.0),
            std=(1.0, 1.0),
            paper_target=3,
            paper_trigger="static",
        )

    def files(self) -> list[Path]:
        """An empty list: the points are drawn."""
        return []

    def fingerprint(self) -> str:
        """The sha256 of the points of both parts."""
        return hashlib.sha256(b"".join(part.images.numpy().tobytes() for part in self.load())).hexdigest()

    def recipe(self) -> Mapping[str, Any]:
        """Adam, since SGD at common rates often fails on five layers of 100 units; in full precision."""
        return {"optimizer": "adam", "lr": 1e-3, "schedule": "constant", "epochs": 60, "batch_size": 64,
                "weight_decay": 0.0, "drop_last": False, "precision": "float32"}  # fmt: skip

    def load(self) -> tuple[ImageSet, ImageSet]:
        """Training and test points (N, 2, 1, 1), class after class."""
        generator = np.random.default_rng((self.draw, 6))
        train, test = (self._sample(generator) for _ in range(2))
        return train, test

    def _sample(self, generator: np.random.Generator) -> ImageSet:
        centres = np.repeat(np.array(CENTRES), self.per_class, axis=0)
        points = np.clip(generator.normal(centres, self.spread), 0, 1)
        images = torch.from_numpy(np.rint(points * 255).astype(np.uint8))[:, :, None, None]
        return ImageSet(images, torch.arange(len(CENTRES)).repeat_interleave(self.per_class))
