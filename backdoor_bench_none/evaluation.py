"""Core's own evaluation: counts, never percentages, and detection against a ground truth the defense never saw."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict, Field
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from backdoor_bench_none.attack import PoisonedSamples
from backdoor_bench_none.component import Component
from backdoor_bench_none.context import Context
from backdoor_bench_none.data.dataset import ImageSet
from backdoor_bench_none.training import Pixels, predict_logits

#: bumped when the evaluation changes results: part of every cell's key
EVALUATION_REVISION = 1


class Count(BaseModel):
    """`hits` of `total`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    hits: int = Field(ge=0)
    total: int = Field(gt=0)

    @property
    def rate(self) -> float:
        """The share, 0 to 1."""
        return self.hits / self.total


class Counts(BaseModel):
    """BA: clean test images given their label. ASR: triggered ones given the
    attacker's label; RA: the same ones given their true label.

    ASR and RA count the test samples whose label the attack would change, and are None where there is no trigger.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    benign_accuracy: Count
    attack_success_rate: Count | None
    robust_accuracy: Count | None


class Detection(BaseModel):
    """Which training samples a defense flagged, against the poisoned
    ones; AUROC needs scores and both kinds of sample.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    true_positive: int
    false_positive: int
    true_negative: int
    false_negative: int
    auroc: float | None

    @property
    def tpr(self) -> float | None:
        """The share of poisoned samples that were flagged."""
        return _share(self.true_positive, self.false_negative)

    @property
    def fpr(self) -> float | None:
        """The share of benign samples that were flagged."""
        return _share(self.false_positive, self.true_negative)


def _share(part: int, rest: int) -> float | None:
    return part / (part + rest) if part + rest else None


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


def _count(hits: Tensor) -> Count:
    return Count(hits=int(hits.sum()), total=len(hits))


def score_detection(flagged: Tensor, scores: Tensor | None, poisoned: Tensor) -> Detection:
    """Compare `flagged` (N,) bool with the ground truth `poisoned` (N,) bool."""
    flagged, poisoned = flagged.cpu(), poisoned.cpu()
    auroc = None
    if scores is not None and 0 < int(poisoned.sum()) < len(poisoned):
        auroc = float(roc_auc_score(poisoned.numpy(), scores.double().cpu().numpy()))
    return Detection(
        true_positive=int((flagged & poisoned).sum()),
        false_positive=int((flagged & ~poisoned).sum()),
        true_negative=int((~flagged & ~poisoned).sum()),
        false_negative=int((~flagged & poisoned).sum()),
        auroc=auroc,
    )


def defense_effectiveness(before: Counts, after: Counts) -> float | None:
    """DER = (max(0, dASR) - max(0, dBA) + 1) / 2 in [0, 1]: what was won in ASR
    less what was lost in BA, against `before`, the undefended model.

    The formula is that of BackdoorBench's documentation; the code there adds the BA term in places.
    """
    if before.attack_success_rate is None or after.attack_success_rate is None:
        return None
    won = max(0.0, before.attack_success_rate.rate - after.attack_success_rate.rate)
    lost = max(0.0, before.benign_accuracy.rate - after.benign_accuracy.rate)
    return (won - lost + 1) / 2
