"""The evaluation of finished networks, and of detection against the ground truth, which the defense never sees.

Results are kept as counts, not as percentages.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from backdoor_bench_none.contracts.attack import FoundTriggers, PoisonedSamples
from backdoor_bench_none.contracts.context import Context
from backdoor_bench_none.contracts.dataset import ImageSet
from backdoor_bench_none.contracts.measures import Count, Counts, Detection, Outcomes
from backdoor_bench_none.contracts.metric import Evaluation
from backdoor_bench_none.contracts.network import Pixels, predict_logits
from backdoor_bench_none.maths.statistics import pack_outcomes, tpr_at_fpr
from backdoor_bench_none.run.checks import NOT_FINITE


def evaluate(
    model: nn.Module, test: ImageSet, triggered: Iterable[PoisonedSamples], pixels: Pixels, context: Context
) -> tuple[Counts, Evaluation]:
    """Classify the clean test set and the triggered sets, part by part, and count over all parts."""
    clean = _classify(model, test.images, pixels, context)
    labels = test.labels.cpu()
    empty = torch.empty(0, dtype=torch.int64)
    attacked, true, wanted = [empty], [empty], [empty]
    sizes: list[int] = []
    for part in triggered:
        sizes.append(len(part))
        if len(part):
            attacked.append(_classify(model, part.images, pixels, context))
            true.append(labels[part.indices])
            wanted.append(part.labels)
    evaluation = Evaluation(model, clean, labels, torch.cat(attacked), torch.cat(true), torch.cat(wanted), tuple(sizes))
    predicted = evaluation.triggered_predictions
    counts = Counts(
        benign_accuracy=_count(clean == labels),
        attack_success_rate=_count_if_any(predicted == evaluation.wanted_labels),
        robust_accuracy=_count_if_any(predicted == evaluation.triggered_labels),
    )
    return counts, evaluation


def _classify(model: nn.Module, images: Tensor, pixels: Pixels, context: Context) -> Tensor:
    """The predicted labels (N,) on the CPU; `ValueError` if logits are not finite, where one class would always win."""
    logits = predict_logits(model, images, pixels, context)
    if not bool(torch.isfinite(logits).all()):
        raise ValueError(NOT_FINITE)
    return logits.argmax(1).cpu()


def pack_evaluation(evaluation: Evaluation) -> Outcomes:
    """Whether each image was a hit, packed into bits."""
    benign = evaluation.clean_predictions == evaluation.clean_labels
    attacked = evaluation.triggered_predictions == evaluation.wanted_labels
    packed = pack_outcomes(attacked.numpy()) if len(attacked) else None
    return Outcomes(benign=pack_outcomes(benign.numpy()), attacked=packed)


def count_trigger_hits(triggers: FoundTriggers, evaluation: Evaluation) -> list[dict[str, Any]]:
    """The facts of each trigger found in the network, with its hits among the test images of other classes."""
    hits = evaluation.triggered_predictions == evaluation.wanted_labels
    return [
        {**fact, "hits": int(part.sum()), "total": len(part)}
        for fact, part in zip(triggers.facts, torch.split(hits, list(evaluation.part_sizes)), strict=True)
    ]


def _count(hits: Tensor) -> Count:
    return Count(hits=int(hits.sum()), total=len(hits))


def _count_if_any(hits: Tensor) -> Count | None:
    if len(hits) == 0:
        return None
    return _count(hits)


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
