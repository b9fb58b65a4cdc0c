"""Spectral signatures (Tran et al., 2018): poisoned samples stand out along a singular vector of their class."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field

from backdoor_bench_none.api import Context, Defense, DefenseResult, DefenseTask, Stage, collect_features

if TYPE_CHECKING:
    from torch import Tensor


class SpectralSignatures(Defense):
    """Drops the outliers along the first singular vector of each given class, and retrains from scratch.

    Outliers are the samples with the largest squared projection. 1.5 times `expected_fraction` of every class is
    dropped, clean ones too, as published: it costs benign accuracy even without an attack.
    """

    paper: ClassVar[str] = "arXiv:1811.00636"
    stage: ClassVar[Stage] = Stage.PRE_TRAINING
    starts_from_victim: ClassVar[bool] = True
    returns: ClassVar[tuple[Literal["flagged", "scores", "infected"], ...]] = ("flagged", "scores")

    expected_fraction: float = Field(
        0.1, gt=0, lt=2 / 3, description="assumed upper bound of the poisoned share of a class"
    )

    def run(self, task: DefenseTask, context: Context) -> DefenseResult:
        """The network retrained on what is left; `scores` are divided by their class's median, to compare classes."""
        data = task.training_data(None, context)
        features = collect_features(task.victim(), data.images.images, data.pixels, replace(context, amp=None))
        labels = data.images.labels
        flagged = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
        scores = torch.zeros(len(labels), dtype=torch.float64, device=labels.device)
        for k in range(task.info.num_classes):
            members = torch.nonzero(labels == k).flatten()
            if len(members) < 2:
                continue
            outlying = outlier_scores(features[members])
            scores[members] = outlying / outlying.median().clamp(min=1e-12)
            flagged[members[outlying.argsort(descending=True, stable=True)[: self.count(len(members))]]] = True
        model = task.new_model()
        task.fit(model, context, keep=torch.nonzero(~flagged).flatten())
        return DefenseResult(model, flagged, scores)

    def count(self, size: int) -> int:
        """The number of samples that are dropped from a class of that size."""
        return int(1.5 * self.expected_fraction * size)


def outlier_scores(features: Tensor) -> Tensor:
    """Squared projections (n,) float64 of the centred `features` (n, D) on their first right singular vector."""
    centred = features.double() - features.double().mean(0)
    projections: Tensor = centred @ first_direction(centred)
    return projections.square()


def first_direction(centred: Tensor) -> Tensor:
    """The first right singular vector (D,) of `centred` (n, D), up to its sign."""
    if centred.is_cuda:  # from the D x D products: an SVD of 5,000 rows takes a GPU far longer
        vectors: Tensor = torch.linalg.eigh(centred.T @ centred).eigenvectors
        return vectors[:, -1]
    direction: Tensor = torch.linalg.svd(centred, full_matrices=False).Vh[0]
    return direction
