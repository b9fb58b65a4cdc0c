"""Activation clustering (Chen et al., 2018): in each given class, poisoned samples form a separate cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

import numpy as np
import torch
from pydantic import Field

from backdoor_bench_none.api import Context, Defense, DefenseResult, DefenseTask, Stage, collect_features

if TYPE_CHECKING:
    from numpy.typing import NDArray

Floats: TypeAlias = "NDArray[np.floating[Any]]"
Rule = Literal["smaller", "relative_size", "silhouette", "distance", "reclassification"]
#: samples that stand for a class in a silhouette, whose cost grows with the square of their number
SILHOUETTE_SAMPLES = 2000


@dataclass(frozen=True)
class Clusters:
    """The two clusters of one class: `members` (n,) dataset indices, and `assigned` (n,) 0 or 1, 1 being the smaller.

    `assigned` is 0 throughout for a single cluster; `reason` says why a class was not split.
    """

    members: NDArray[np.int64]
    assigned: NDArray[np.int64]
    silhouette: float | None = None
    reason: str | None = None

    @property
    def small_share(self) -> float:
        """The share of the class that is in the smaller cluster."""
        return float(self.assigned.mean()) if len(self.assigned) else 0.0


class AC(Defense):
    """Clusters the last hidden activations of each class in two, and retrains from scratch without suspicious clusters.

    Rules: `smaller` flags the smaller cluster of every class, clean ones too; `relative_size` one below
    `size_threshold` of its class; `silhouette` that, if the clusters are also well apart; `distance` one whose median
    lies nearer to another class than to its own, while the other's does not; `reclassification` retrains without all
    smaller clusters and flags those that the new network mostly assigns to one other class. Whole classes are
    clustered, in the order of the data set; unpooled maps are averaged over positions.
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
        rows, labels = features.cpu().numpy(), task.train.labels.cpu().numpy()
        clusters = {k: self.cluster(rows, np.flatnonzero(labels == k), context) for k in range(task.info.num_classes)}
        suspects = self.decide(clusters, rows)
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
        from sklearn.cluster import KMeans

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
        from sklearn.decomposition import PCA, FastICA

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
        return {k: self._suspects(k, split, features, medians) for k, split in clusters.items()}

    def _suspects(self, k: int, split: Clusters, features: Floats, medians: Mapping[int, Floats]) -> set[int]:
        if not split.assigned.any():
            return set()
        if self.rule == "distance":
            centers = {c: np.median(features[split.members[split.assigned == c]], axis=0) for c in (0, 1)}
            strays = {c for c, center in centers.items() if _strays(center, k, medians)}
            return strays if len(strays) == 1 else set()
        is_suspicious = True
        if self.rule in ("relative_size", "silhouette"):
            is_suspicious = round(split.small_share, 2) < self.size_threshold
        if self.rule == "silhouette":
            apart = split.silhouette is not None and round(split.silhouette, 4) > self.silhouette_threshold
            is_suspicious = is_suspicious and apart
        return {1} if is_suspicious else set()

    def _reclassified(
        self, clusters: Mapping[int, Clusters], suspects: Mapping[int, set[int]], task: DefenseTask, context: Context
    ) -> dict[int, set[int]]:
        """Exclusionary reclassification: the candidates that a network trained without them gives another class."""
        kept = torch.ones(len(task.train), dtype=torch.bool)
        for k, candidates in suspects.items():
            kept[clusters[k].members[np.isin(clusters[k].assigned, list(candidates))]] = False
        model = task.new_model()
        retraining = context.derive("reclassification")
        task.fit(model, retraining, keep=torch.nonzero(kept).flatten())
        predicted = task.predict(model, retraining).argmax(1).cpu().numpy()
        flagged: dict[int, set[int]] = {}
        for k, candidates in suspects.items():
            labels = {c: predicted[clusters[k].members[clusters[k].assigned == c]] for c in candidates}
            flagged[k] = {c for c in candidates if not self.is_legitimate(labels[c], k)}
        return flagged

    def is_legitimate(self, predicted: NDArray[np.int64], label: int) -> bool:
        """Whether a left-out cluster of class `label` is mostly classified as that class.

        That is l / p > threshold, where l counts the label and p the most frequent other class.
        """
        counts = np.bincount(predicted, minlength=label + 1)
        own = counts[label]
        most = np.delete(counts, label).max(initial=0)
        return bool(most == 0 or own / most > self.reclassification_threshold)


def _silhouette(reduced: Floats, assigned: NDArray[np.int64], size: int, seed: int) -> float | None:
    """The mean silhouette over `size` samples; None if they happen to be of one cluster."""
    from sklearn.metrics import silhouette_score

    try:
        return float(silhouette_score(reduced, assigned, sample_size=size, random_state=seed))
    except ValueError:
        return None


def _strays(median: Floats, k: int, medians: Mapping[int, Floats]) -> bool:
    """Whether another class's median is nearer than class k's."""
    distances = {other: float(np.linalg.norm(median - center)) for other, center in medians.items()}
    return min(distances, key=lambda other: distances[other]) != k


def _report(clusters: Mapping[int, Clusters], suspects: Mapping[int, set[int]]) -> list[dict[str, Any]]:
    report: list[dict[str, Any]] = []
    for k, split in clusters.items():
        report.append(
            {
                "class": k,
                "sizes": np.bincount(split.assigned, minlength=2).tolist(),
                "silhouette": split.silhouette,
                "flagged_clusters": sorted(suspects[k]),
            }
        )
        if split.reason:
            report[-1]["not_split"] = split.reason
    return report
