"""Activation clustering (Chen et al., 2018): within each given class, poisoned samples form a cluster of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA, FastICA
from sklearn.metrics import silhouette_score

from backdoor_bench_none.api import Context, Defense, DefenseResult, DefenseTask, Stage, collect_features

Floats = NDArray[np.floating[Any]]
Rule = Literal["smaller", "relative_size", "silhouette", "distance", "reclassification"]
#: pairs of samples behind a silhouette grow with the square; this many samples stand for a class
SILHOUETTE_SAMPLES = 2000


@dataclass(frozen=True)
class Clusters:
    """The two clusters of one class: `members` (n,) dataset indices, `assigned`
    (n,) 0 or 1, 1 being the smaller (0 all over if there is one).

    `reason` says why a class was not split.
    """

    members: NDArray[np.int64]
    assigned: NDArray[np.int64]
    silhouette: float | None = None
    reason: str | None = None

    @property
    def small_share(self) -> float:
        """The size of the smaller cluster over that of the class."""
        return float(self.assigned.mean()) if len(self.assigned) else 0.0


class AC(Defense):
    """Clusters the last hidden activations of each class in two, flags
    clusters by a rule, and retrains from scratch without them.

    Rules: `smaller` flags the smaller cluster of every class, clean ones too; `relative_size` one below
    `size_threshold` of its class; `silhouette` that, if the clusters are also well apart; `distance` one whose median
    lies nearer to another class than to its own, while the other's does not; `reclassification` retrains without all
    smaller clusters and flags those the new network mostly gives one other class. Whole classes are clustered, in the
    order of the data set; unpooled maps are averaged over places.
    """

    paper: ClassVar[str] = "arXiv:1811.03728"
    stage: ClassVar[Stage] = Stage.PRE_TRAINING
    starts_from_victim: ClassVar[bool] = True
    returns: ClassVar[tuple[Literal["flagged", "scores", "infected"], ...]] = ("flagged", "infected")

    rule: Rule = Field("relative_size", description="which clusters are flagged")
    reduction: Literal["pca", "ica"] = Field("pca", description="pca, or pca followed by FastICA as in the paper")
    dimensions: int = Field(
        10, ge=1, description="dimensions that are clustered; fewer where a class has fewer samples"
    )
    size_threshold: float = Field(
        0.35, gt=0, le=0.5, description="a share of its class, rounded to 2 digits, below which a cluster is suspicious"
    )
    silhouette_threshold: float = Field(0.10, ge=-1, le=1, description="mean silhouette above which clusters are apart")
    reclassification_threshold: float = Field(
        1.0, gt=0, description="a cluster is legitimate if own label / most frequent other exceeds this"
    )

    def run(self, task: DefenseTask, context: Context) -> DefenseResult:
        """The network retrained on what is left; `classes` in extras has sizes, silhouette and decision per class."""
        data = task.training_data(None, context)
        features = collect_features(task.victim(), data.images.images, data.pixels, replace(context, amp=None))
        labels = task.train.labels.cpu().numpy()
        clusters = {
            k: self.cluster(features.cpu().numpy(), np.flatnonzero(labels == k), context)
            for k in range(task.info.num_classes)
        }
        suspects = self.decide(clusters, features.cpu().numpy())
        if self.rule == "reclassification":
            suspects = self._reclassified(clusters, suspects, task, context)
        flagged = torch.zeros(len(labels), dtype=torch.bool)
        for k, suspected in suspects.items():
            for cluster in suspected:
                flagged[clusters[k].members[clusters[k].assigned == cluster]] = True
        model = task.new_model()
        task.fit(model, context, keep=torch.nonzero(~flagged).flatten())
        return DefenseResult(
            model, flagged, infected=bool(flagged.any()), extras={"classes": _report(clusters, suspects)}
        )

    def cluster(self, features: Floats, members: NDArray[np.int64], context: Context) -> Clusters:
        """Split one class: `features` (N, D) of all samples, `members` (n,) the class's indices."""
        rows = features[members].astype(np.float64)
        alone = np.zeros(len(members), np.int64)
        if len(members) < 2:
            return Clusters(members, alone, reason=f"{len(members)} samples")
        if not np.isfinite(rows).all():
            raise ValueError("ac: the activations are not finite")
        if np.ptp(rows, axis=0).max() == 0:
            return Clusters(members, alone, reason="all activations are equal")
        seed = context.derive("cluster").seed % 2**32
        reduced = self.reduce(rows, seed)
        assigned = KMeans(2, n_init=10, random_state=seed).fit_predict(reduced)
        if assigned.sum() * 2 > len(assigned) or (assigned.sum() * 2 == len(assigned) and assigned[0] == 1):
            assigned = 1 - assigned
        silhouette = None
        if 0 < assigned.sum() < len(assigned) and len(members) > 2:
            size = min(SILHOUETTE_SAMPLES, len(members))
            silhouette = _silhouette(reduced, assigned, size, seed)
        return Clusters(members, assigned.astype(np.int64), silhouette)

    def reduce(self, rows: Floats, seed: int) -> Floats:
        """(n, D) -> (n, d): d is at most `dimensions`, n - 1 and the rank."""
        pca = PCA(min(self.dimensions, len(rows) - 1, rows.shape[1]), random_state=seed)
        reduced: Floats = pca.fit_transform(rows)
        reduced = reduced[:, pca.explained_variance_ > 1e-12 * pca.explained_variance_[0]]
        if self.reduction == "ica":
            ica = FastICA(whiten="unit-variance", max_iter=1000, tol=0.005, random_state=seed)
            reduced = ica.fit_transform(reduced)
        return reduced

    def decide(self, clusters: Mapping[int, Clusters], features: Floats) -> dict[int, set[int]]:
        """The suspicious clusters of every class; for `reclassification`, the candidates."""
        medians = {k: np.median(features[c.members], axis=0) for k, c in clusters.items() if len(c.members)}
        return {k: self._suspects(k, found, features, medians) for k, found in clusters.items()}

    def _suspects(self, k: int, found: Clusters, features: Floats, medians: Mapping[int, Floats]) -> set[int]:
        if not found.assigned.any():
            return set()
        is_small = round(found.small_share, 2) < self.size_threshold
        match self.rule:
            case "smaller" | "reclassification":
                return {1}
            case "relative_size":
                return {1} if is_small else set()
            case "silhouette":
                apart = found.silhouette is not None and round(found.silhouette, 4) > self.silhouette_threshold
                return {1} if is_small and apart else set()
            case "distance":
                strays = {
                    c
                    for c in (0, 1)
                    if _strays(np.median(features[found.members[found.assigned == c]], axis=0), k, medians)
                }
                return strays if len(strays) == 1 else set()

    def _reclassified(
        self, clusters: Mapping[int, Clusters], suspects: Mapping[int, set[int]], task: DefenseTask, context: Context
    ) -> dict[int, set[int]]:
        """Exclusionary reclassification: train without the candidates, and see what that network takes them for."""
        kept = torch.ones(len(task.train), dtype=torch.bool)
        for k, candidates in suspects.items():
            kept[clusters[k].members[np.isin(clusters[k].assigned, list(candidates))]] = False
        model = task.new_model()
        here = context.derive("reclassification")
        task.fit(model, here, keep=torch.nonzero(kept).flatten())
        predicted = task.predict(model, here).argmax(1).cpu().numpy()
        return {
            k: {
                c
                for c in candidates
                if not self.is_legitimate(predicted[clusters[k].members[clusters[k].assigned == c]], k)
            }
            for k, candidates in suspects.items()
        }

    def is_legitimate(self, predicted: NDArray[np.int64], label: int) -> bool:
        """Whether a left-out cluster of class `label` is mostly taken for it: l /
        p > threshold, p the count of the most frequent other class.
        """
        counts = np.bincount(predicted, minlength=label + 1)
        own = counts[label]
        others = np.delete(counts, label)
        most = others.max() if len(others) else 0
        return bool(most == 0 or own / most > self.reclassification_threshold)


def _silhouette(reduced: Floats, assigned: NDArray[np.int64], size: int, seed: int) -> float | None:
    """The mean silhouette over `size` samples; None if they happen to be of one cluster."""
    try:
        return float(silhouette_score(reduced, assigned, sample_size=size, random_state=seed))
    except ValueError:
        return None


def _strays(median: Floats, k: int, medians: Mapping[int, Floats]) -> bool:
    """Whether another class's median is nearer than class k's."""
    distances = {other: float(np.linalg.norm(median - center)) for other, center in medians.items()}
    return min(distances, key=lambda other: distances[other]) != k


def _report(clusters: Mapping[int, Clusters], suspects: Mapping[int, set[int]]) -> list[dict[str, Any]]:
    return [
        {
            "class": k,
            "sizes": np.bincount(found.assigned, minlength=2).tolist(),
            "silhouette": found.silhouette,
            "flagged_clusters": sorted(suspects[k]),
            **({"not_split": found.reason} if found.reason else {}),
        }
        for k, found in clusters.items()
    ]
