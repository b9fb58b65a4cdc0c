"""Counts, detection and defense effectiveness against hand values and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from sklearn.metrics import confusion_matrix, roc_auc_score
from torch import Tensor, nn

from backdoor_bench_none.api import Context, DatasetInfo, ImageSet, PoisonedSamples
from backdoor_bench_none.contracts.measures import Count, Counts, Detection, defense_effectiveness
from backdoor_bench_none.contracts.network import Pixels
from backdoor_bench_none.run.evaluation import evaluate, score_detection

CPU = Context(torch.device("cpu"), 0)
INFO = DatasetInfo("rigged", (1, 2, 2), 4, 6, (0.0,), (1.0,))
PIXELS = Pixels.of(INFO, CPU.device)
LABELS = torch.tensor([0, 1, 2, 3, 1, 0])
#: the test samples of another label than 0, triggered, which the attacker wants to be 0
INDICES = torch.tensor([1, 2, 3, 4])


class FirstPixel(nn.Module):
    """Predicts what the first pixel says."""

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.one_hot((images[:, 0, 0, 0] * 255).round().long(), 4).float()


def saying(classes: Tensor) -> Tensor:
    """Images that make `FirstPixel` predict `classes`."""
    return classes.to(torch.uint8)[:, None, None, None].expand(-1, 1, 2, 2).clone()


def run_evaluation(clean: list[int], attacked: list[int], wanted: int = 0) -> Counts:
    test = ImageSet(saying(torch.tensor(clean)), LABELS)
    samples = PoisonedSamples(INDICES, saying(torch.tensor(attacked)), torch.full((4,), wanted))
    return evaluate(FirstPixel(), test, [samples], PIXELS, CPU)[0]


def make_counts(benign: int, attacked: int | None, total: int = 100) -> Counts:
    success = None if attacked is None else Count(hits=attacked, total=total)
    return Counts(benign_accuracy=Count(hits=benign, total=total), attack_success_rate=success, robust_accuracy=success)


@pytest.mark.parametrize(
    ("clean", "attacked", "expected"),
    [
        ([0, 1, 2, 3, 1, 0], [0, 0, 0, 0], (6, 4, 0)),  # a perfect backdoor
        ([0, 1, 2, 3, 1, 0], [1, 2, 3, 1], (6, 0, 4)),  # a perfect defense
        ([0, 0, 0, 0, 0, 0], [0, 0, 0, 0], (2, 4, 0)),  # always the target
        ([0, 1, 2, 0, 0, 3], [0, 2, 1, 3], (3, 1, 1)),  # neither the target nor the truth counts as nothing
        ([3, 3, 3, 0, 3, 3], [3, 3, 0, 3], (0, 1, 0)),
    ],
)
def test_counts_by_hand(clean: list[int], attacked: list[int], expected: tuple[int, int, int]) -> None:
    counts = run_evaluation(clean, attacked)
    assert counts.attack_success_rate is not None
    assert counts.robust_accuracy is not None
    measures = (counts.benign_accuracy, counts.attack_success_rate, counts.robust_accuracy)
    assert tuple(count.hits for count in measures) == expected
    assert tuple(count.total for count in measures) == (6, 4, 4)


def test_success_is_measured_against_the_label_each_sample_should_get() -> None:
    samples = PoisonedSamples(INDICES, saying(torch.tensor([2, 3, 0, 2])), (LABELS[INDICES] + 1) % 4)
    counts, _ = evaluate(FirstPixel(), ImageSet(saying(LABELS), LABELS), [samples], PIXELS, CPU)
    assert counts.attack_success_rate == Count(hits=4, total=4)


def test_without_a_trigger_there_is_neither_success_nor_robust_accuracy() -> None:
    test = ImageSet(saying(LABELS), LABELS)
    counts, seen = evaluate(FirstPixel(), test, [PoisonedSamples.nothing(test)], PIXELS, CPU)
    assert counts == make_counts(6, None, total=6)
    assert len(seen.triggered_predictions) == 0


def test_a_metric_sees_predictions_and_labels() -> None:
    samples = PoisonedSamples(INDICES, saying(torch.tensor([0, 0, 3, 1])), torch.zeros(4, dtype=torch.int64))
    model = FirstPixel()
    _, seen = evaluate(model, ImageSet(saying(LABELS.flip(0)), LABELS), [samples], PIXELS, CPU)
    assert seen.model is model
    assert seen.clean_predictions.tolist() == LABELS.flip(0).tolist()
    assert seen.clean_labels.tolist() == LABELS.tolist()
    assert seen.triggered_predictions.tolist() == [0, 0, 3, 1]
    assert seen.triggered_labels.tolist() == LABELS[INDICES].tolist()
    assert seen.wanted_labels.tolist() == [0, 0, 0, 0]


def test_a_model_is_evaluated_in_eval_mode() -> None:
    model = nn.Sequential(nn.Dropout(0.9), FirstPixel()).train()
    test = ImageSet(saying(LABELS), LABELS)
    assert evaluate(model, test, [PoisonedSamples.nothing(test)], PIXELS, CPU)[0].benign_accuracy.hits == 6


def test_rate_is_a_share() -> None:
    assert Count(hits=1, total=8).rate == 0.125


@pytest.mark.parametrize(("hits", "total"), [(0, 0), (-1, 3)])
def test_impossible_counts_are_refused(hits: int, total: int) -> None:
    with pytest.raises(ValidationError):
        Count(hits=hits, total=total)


@pytest.mark.parametrize("seed", range(5))
def test_detection_equals_scikit_learn(seed: int) -> None:
    generator = np.random.default_rng(seed)
    poisoned, flagged = generator.random(200) < 0.1, generator.random(200) < 0.3
    scores = np.round(generator.normal(size=200) + poisoned, 1)  # with ties
    detection = score_detection(*(torch.from_numpy(x) for x in (flagged, scores, poisoned)))
    negative, positive = confusion_matrix(poisoned, flagged).tolist()
    assert [detection.true_negative, detection.false_positive] == negative
    assert [detection.false_negative, detection.true_positive] == positive
    assert detection.tpr == pytest.approx((flagged & poisoned).sum() / poisoned.sum())
    assert detection.fpr == pytest.approx((flagged & ~poisoned).sum() / (~poisoned).sum())
    assert detection.auroc == pytest.approx(roc_auc_score(poisoned, scores))


@pytest.mark.parametrize(
    ("scores", "auroc"),
    [
        ([1.0, 2.0, 3.0, 4.0], 1.0),
        ([4.0, 3.0, 2.0, 1.0], 0.0),
        ([7.0, 7.0, 7.0, 7.0], 0.5),
        ([1.0, 3.0, 2.0, 4.0], 0.75),
        ([1.0, 2.0, 2.0, 3.0], 0.875),  # a tie is half a pair
        (None, None),
    ],
)
def test_auroc_by_hand(scores: list[float] | None, auroc: float | None) -> None:
    poisoned = torch.tensor([False, False, True, True])
    given = None if scores is None else torch.tensor(scores)
    assert score_detection(poisoned, given, poisoned).auroc == auroc


def test_auroc_tells_apart_scores_that_are_equal_in_float32() -> None:
    scores = torch.tensor([1.0, 1.0 + 1e-12], dtype=torch.float64)
    poisoned = torch.tensor([False, True])
    assert score_detection(poisoned, scores, poisoned).auroc == 1.0


def test_without_poisoned_samples_there_is_no_tpr_and_no_auroc() -> None:
    detection = score_detection(
        torch.tensor([True, False, False, False]), torch.rand(4), torch.zeros(4, dtype=torch.bool)
    )
    assert (detection.tpr, detection.fpr, detection.auroc) == (None, 0.25, None)


def test_without_benign_samples_there_is_no_fpr_and_no_auroc() -> None:
    detection = score_detection(torch.tensor([True, False]), torch.rand(2), torch.ones(2, dtype=torch.bool))
    assert (detection.tpr, detection.fpr, detection.auroc) == (0.5, None, None)


def test_detection_survives_json() -> None:
    detection = score_detection(torch.tensor([True, False]), torch.tensor([1.0, 0.0]), torch.tensor([True, False]))
    assert Detection.model_validate_json(detection.model_dump_json()) == detection


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((90, 100), (90, 0), 1.0),  # everything won, nothing lost
        ((90, 100), (90, 100), 0.5),  # nothing happened
        ((90, 100), (40, 100), 0.25),  # accuracy lost for nothing
        ((100, 0), (0, 0), 0.0),
        ((90, 100), (80, 20), 0.85),
        ((80, 50), (95, 50), 0.5),  # accuracy won is no merit
        ((80, 50), (80, 90), 0.5),  # an attack that got worse is no demerit
    ],
)
def test_defense_effectiveness_by_hand(before: tuple[int, int], after: tuple[int, int], expected: float) -> None:
    shares = [(ba / 100, asr / 100) for ba, asr in (before, after)]
    assert defense_effectiveness(*shares) == pytest.approx(expected)


def test_losing_accuracy_lowers_effectiveness() -> None:
    values = [defense_effectiveness((0.9, 1.0), (benign, 0.1)) for benign in (0.9, 0.8, 0.5, 0.1)]
    assert values == sorted(values, reverse=True)
    assert len(set(values)) == 4


def test_a_part_without_images_keeps_its_place() -> None:
    """A trigger for the only class there is has no image to change: 0 of 0, not the next trigger's numbers."""
    test = ImageSet(saying(LABELS), LABELS)
    everything = PoisonedSamples(torch.arange(len(LABELS)), saying(LABELS), LABELS)
    counts, seen = evaluate(FirstPixel(), test, [PoisonedSamples.nothing(test), everything], PIXELS, CPU)
    assert seen.part_sizes == (0, len(LABELS))
    assert counts.attack_success_rate == Count(hits=len(LABELS), total=len(LABELS))
