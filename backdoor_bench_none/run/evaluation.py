"""Core's own evaluation: counts, never percentages, and detection against a ground truth the defense never saw."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from backdoor_bench_none.contracts.attack import PoisonedSamples
from backdoor_bench_none.contracts.context import Context
from backdoor_bench_none.contracts.dataset import ImageSet
from backdoor_bench_none.contracts.measures import Count, Counts, Detection, Outcomes
from backdoor_bench_none.contracts.metric import Evaluation
from backdoor_bench_none.contracts.network import Pixels, predict_logits
from backdoor_bench_none.maths.statistics import pack_outcomes, tpr_at_fpr


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
    from sklearn.metrics import roc_auc_score

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
