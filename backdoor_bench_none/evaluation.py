"""Core's own evaluation: counts, never percentages, and detection against a ground truth the defense never saw."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from backdoor_bench_none.attack import PoisonedSamples
from backdoor_bench_none.component import Component
from backdoor_bench_none.context import Context
from backdoor_bench_none.data.dataset import ImageSet
from backdoor_bench_none.measures import Count, Counts, Detection, Outcomes
from backdoor_bench_none.statistics import pack_outcomes, tpr_at_fpr
from backdoor_bench_none.training import Pixels, predict_logits

#: bumped when the evaluation changes results: part of every cell's key
EVALUATION_REVISION = 1


@dataclass(frozen=True)
class Evaluation:
    """What a metric may look at: predictions (N,) int64 on the clean test set and
    (M,) on the triggered one, with their labels, and the finished model.
    """

    model: nn.Module
    clean_predictions: Tensor
    clean_labels: Tensor
    triggered_predictions: Tensor
    triggered_labels: Tensor
    wanted_labels: Tensor
    #: numbers of triggered images of each of the attack's triggers, where it has several
    part_sizes: tuple[int, ...] = ()


class Metric(Component):
    """Base of all extra metrics."""

    def compute(self, evaluation: Evaluation) -> Mapping[str, float]:
        """Numbers by name; the names are prefixed with the metric's."""
        raise NotImplementedError


def evaluate(
    model: nn.Module, test: ImageSet, triggered: Iterable[PoisonedSamples], pixels: Pixels, context: Context
) -> tuple[Counts, Evaluation]:
    """Classify the clean test set and the triggered ones, part by part, and count over all parts."""
    clean = predict_logits(model, test.images, pixels, context).argmax(1).cpu()
    labels = test.labels.cpu()
    empty = torch.empty(0, dtype=torch.int64)
    attacked, true, wanted = [empty], [empty], [empty]
    sizes: list[int] = []
    for part in triggered:
        sizes.append(len(part))
        if len(part):
            attacked.append(predict_logits(model, part.images, pixels, context).argmax(1).cpu())
            true.append(labels[part.indices])
            wanted.append(part.labels)
    evaluation = Evaluation(model, clean, labels, torch.cat(attacked), torch.cat(true), torch.cat(wanted), tuple(sizes))
    predicted, is_triggered = evaluation.triggered_predictions, sum(sizes) > 0
    counts = Counts(
        benign_accuracy=_count(clean == labels),
        attack_success_rate=_count(predicted == evaluation.wanted_labels) if is_triggered else None,
        robust_accuracy=_count(predicted == evaluation.triggered_labels) if is_triggered else None,
    )
    return counts, evaluation


def pack_evaluation(evaluation: Evaluation) -> Outcomes:
    """The hits of every image."""
    benign = evaluation.clean_predictions == evaluation.clean_labels
    attacked = evaluation.triggered_predictions == evaluation.wanted_labels
    return Outcomes(
        benign=pack_outcomes(benign.numpy()), attacked=pack_outcomes(attacked.numpy()) if len(attacked) else None
    )


def _count(hits: Tensor) -> Count:
    return Count(hits=int(hits.sum()), total=len(hits))


def score_detection(flagged: Tensor, scores: Tensor | None, poisoned: Tensor) -> Detection:
    """Compare `flagged` (N,) bool with the ground truth `poisoned` (N,) bool."""
    flagged, poisoned = flagged.cpu(), poisoned.cpu()
    auroc = tpr = None
    if scores is not None and 0 < int(poisoned.sum()) < len(poisoned):
        suspicion = scores.double().cpu().numpy()
        auroc, tpr = float(roc_auc_score(poisoned.numpy(), suspicion)), tpr_at_fpr(suspicion, poisoned.numpy(), 0.01)
    return Detection(
        true_positive=int((flagged & poisoned).sum()),
        false_positive=int((flagged & ~poisoned).sum()),
        true_negative=int((~flagged & ~poisoned).sum()),
        false_negative=int((~flagged & poisoned).sum()),
        auroc=auroc,
        tpr_at_1_fpr=tpr,
    )
