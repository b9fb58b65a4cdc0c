"""Activation clustering on synthetic features, against scikit-learn used directly, and on planted networks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import numpy as np
import pytest
import torch
from bbn_defenses.ac import AC, Clusters, Rule
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from torch import Tensor, nn

from backdoor_bench_none.api import Architecture, Context, ImageSet, ModelSpec
from backdoor_bench_none.errors import TrainingError
from backdoor_bench_none.inspection import features as features_module
from backdoor_bench_none.inspection.features import collect_features

CPU = Context(torch.device("cpu"), 0)
# FastICA's own warning reaches the record; that it need not converge on noise is no fault
pytestmark = pytest.mark.filterwarnings("ignore:FastICA did not converge")
RULES: tuple[Rule, ...] = get_args(Rule)
Make = Callable[..., Any]


def draw_features(count: int = 100, poisoned: int = 10, classes: int = 3, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Features (N, 20) of normal classes, of which class 0 has a second blob; labels; and who is in that."""
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), count)
    features = random.normal(size=(classes * count, 20))
    features[:, :classes] += 12 * np.eye(classes)[labels]
    truth = np.zeros(len(labels), bool)
    truth[random.choice(count, poisoned, replace=False)] = True
    features[truth, -1] += 15
    order = random.permutation(len(labels))
    return features[order], labels[order], truth[order]


def flag(defense: AC, features: np.ndarray, labels: np.ndarray, classes: int = 3) -> np.ndarray:
    """The flagged samples, without a network."""
    clusters = {k: defense.cluster(features, np.flatnonzero(labels == k), CPU) for k in range(classes)}
    suspects = defense.decide(clusters, features)
    flagged = np.zeros(len(labels), bool)
    for k, cluster in clusters.items():
        flagged[cluster.members[np.isin(cluster.assigned, list(suspects[k]))]] = True
    return flagged


# The rules.


@pytest.mark.parametrize("reduction", ["pca", "ica"])
@pytest.mark.parametrize("rule", ["relative_size", "silhouette"])
@pytest.mark.parametrize("seed", range(3))
def test_a_blob_of_a_tenth_is_flagged_exactly(rule: Rule, reduction: str, seed: int) -> None:
    features, labels, truth = draw_features(seed=seed)
    options = {"dimensions": 2} if reduction == "ica" else {}  # whitened noise in many dimensions hides the blob
    assert np.array_equal(flag(AC(rule=rule, reduction=reduction, **options), features, labels), truth)


def test_the_smaller_cluster_of_every_class_is_flagged_by_smaller() -> None:
    features, labels, truth = draw_features()
    flagged = flag(AC(rule="smaller"), features, labels)
    assert np.array_equal(flagged[labels == 0], truth[labels == 0])
    assert all(0.2 < flagged[labels == k].mean() <= 0.5 for k in (1, 2))


def test_distance_flags_the_cluster_that_looks_like_another_class() -> None:
    features, labels, _ = draw_features(poisoned=0)
    strangers = np.flatnonzero(labels == 1)[:20]
    labels[strangers] = 0  # their features are class 1's
    flagged = flag(AC(rule="distance"), features, labels)
    assert np.flatnonzero(flagged).tolist() == sorted(strangers)


def test_distance_leaves_a_blob_of_its_own_alone() -> None:
    features, labels, _ = draw_features()
    assert not flag(AC(rule="distance"), features, labels).any()


def make_clusters(small: int, total: int, silhouette: float | None = 0.5) -> Clusters:
    return Clusters(np.arange(total), (np.arange(total) < small).astype(np.int64), silhouette)


@pytest.mark.parametrize(
    ("small", "total", "flagged"),
    [(35, 100, False), (34, 100, True), (346, 1000, False), (344, 1000, True), (50, 100, False), (1, 100, True)],
)
@pytest.mark.parametrize("rule", ["relative_size", "silhouette"])
def test_shares_are_rounded_to_two_digits_and_compared_strictly(
    rule: Rule, small: int, total: int, flagged: bool
) -> None:
    suspects = AC(rule=rule).decide({0: make_clusters(small, total)}, np.zeros((total, 2)))
    assert suspects == {0: {1} if flagged else set()}


@pytest.mark.parametrize(("silhouette", "flagged"), [(0.1, False), (0.10004, False), (0.1001, True), (None, False)])
def test_silhouette_must_exceed_its_threshold_too(silhouette: float | None, flagged: bool) -> None:
    suspects = AC(rule="silhouette").decide({0: make_clusters(10, 100, silhouette)}, np.zeros((100, 2)))
    assert suspects == {0: {1} if flagged else set()}


def test_silhouette_does_not_flag_large_clusters_however_far_apart() -> None:
    assert AC(rule="silhouette").decide({0: make_clusters(40, 100, 0.99)}, np.zeros((100, 2))) == {0: set()}


@pytest.mark.parametrize(
    ("own", "most", "legitimate"), [(9, 10, False), (10, 10, False), (11, 10, True), (5, 0, True), (0, 3, False)]
)
def test_a_left_out_cluster_is_legitimate_above_the_threshold(own: int, most: int, legitimate: bool) -> None:
    """Class 1, against the most frequent other class, 3; class 0 is less frequent."""
    predicted = np.array([1] * own + [3] * most + [0] * (most // 2))
    assert AC().is_legitimate(predicted, 1) is legitimate


def test_the_threshold_of_reclassification_is_a_parameter() -> None:
    predicted = np.array([1] * 11 + [3] * 10)
    assert not AC(reclassification_threshold=1.1).is_legitimate(predicted, 1)
    assert AC(reclassification_threshold=1.09).is_legitimate(predicted, 1)


# Clustering.


@pytest.mark.parametrize("rule", ["smaller", "relative_size", "silhouette", "distance"])
@pytest.mark.parametrize("seed", range(3))
def test_flags_follow_the_samples(rule: Rule, seed: int) -> None:
    features, labels, _ = draw_features(101, seed=seed)  # an odd number: clusters are never equal in size
    if rule == "smaller":  # three clear pairs of clusters: in pure noise k-means has many equally good answers
        features[:, 5] += np.where(np.arange(len(labels)) % 3 == 0, 9, 0)
    order = np.random.default_rng(seed).permutation(len(labels))
    shuffled = flag(AC(rule=rule), features[order], labels[order])
    assert np.array_equal(shuffled, flag(AC(rule=rule), features, labels)[order])


@pytest.mark.parametrize("reduction", ["pca", "ica"])
def test_a_seed_determines_the_clusters(reduction: str) -> None:
    features, labels, _ = draw_features()
    members = np.flatnonzero(labels == 1)
    first, again = (AC(reduction=reduction).cluster(features, members, CPU) for _ in range(2))
    assert np.array_equal(first.assigned, again.assigned)
    assert first.silhouette == again.silhouette
    assert set(first.assigned.tolist()) == {0, 1}


def test_cluster_1_is_the_smaller_and_of_equal_ones_the_one_without_the_first_sample() -> None:
    rows = np.array([[0.0], [0], [9], [9], [9]])
    assert AC().cluster(rows, np.arange(5), CPU).assigned.tolist() == [1, 1, 0, 0, 0]
    assert AC().cluster(rows, np.arange(1, 5)[[0, 1]], CPU).assigned.tolist() == [0, 1]
    assert AC().cluster(rows[[2, 0, 3, 1]], np.arange(4), CPU).assigned.tolist() == [0, 1, 0, 1]


def test_dimensions_are_at_most_what_was_asked_what_there_is_and_the_rank() -> None:
    random = np.random.default_rng(0)
    assert AC(dimensions=4).reduce(random.normal(size=(50, 20)), 0).shape == (50, 4)
    assert AC().reduce(random.normal(size=(6, 20)), 0).shape == (6, 5)
    assert AC().reduce(random.normal(size=(50, 3)), 0).shape == (50, 3)
    assert AC().reduce(random.normal(size=(50, 2)) @ random.normal(size=(2, 20)), 0).shape == (50, 2)


@pytest.mark.parametrize("reduction", ["pca", "ica"])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 9])
def test_small_classes_do_not_crash(count: int, reduction: str) -> None:
    """Fewer samples than dimensions, and than clusters."""
    rows = np.random.default_rng(0).normal(size=(20, 30))
    clusters = AC(reduction=reduction).cluster(rows, np.arange(count), CPU)
    assert len(clusters.assigned) == count
    assert clusters.assigned.sum() * 2 <= count
    assert clusters.reason == (f"{count} samples" if count < 2 else None)
    assert not count < 2 or AC(rule="smaller").decide({0: clusters}, rows) == {0: set()}


def test_equal_activations_are_not_split() -> None:
    clusters = AC(rule="smaller").cluster(np.full((20, 8), 3.0), np.arange(20), CPU)
    assert clusters.reason == "all activations are equal"
    assert AC(rule="smaller").decide({0: clusters}, np.full((20, 8), 3.0)) == {0: set()}


def test_two_values_are_split_in_two() -> None:
    rows = np.zeros((20, 8))
    rows[3] = 1
    assert AC().cluster(rows, np.arange(20), CPU).assigned.tolist() == [0] * 3 + [1] + [0] * 16


def test_activations_that_are_not_finite_are_an_error() -> None:
    rows = np.zeros((20, 8))
    rows[3, 3] = np.nan
    with pytest.raises(ValueError, match="ac: the activations are not finite"):
        AC().cluster(rows, np.arange(20), CPU)


@pytest.mark.parametrize(
    "wrong", [{"dimensions": 0}, {"size_threshold": 0.6}, {"rule": "none"}, {"reclassification_threshold": 0}]
)
def test_parameters_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        AC(**wrong)


# On a network.


PATTERN = torch.tensor([[1.0, -1, 1], [-1, 1, -1], [1, -1, 1]])


class Rigged(nn.Module):
    """Four features, of which the last sees the trigger."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.flatten, self.head = nn.Conv2d(1, 4, 8), nn.ReLU(), nn.Flatten(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.flatten(self.act(self.conv(x))))


class RiggedArchitecture(Architecture):
    """Begins as if it were trained: the kind of stripe decides."""

    def build(self, spec: ModelSpec) -> nn.Module:
        model = Rigged()
        with torch.no_grad():
            for label in range(3):
                model.conv.weight[label] = 0
                model.conv.weight[label, 0, 2 * label : 2 * label + 2, :4] = 1.0
            model.conv.bias.zero_()
            model.head.weight.copy_(torch.eye(3, 4))
            model.head.bias.zero_()
        return model


def plant(strength: float) -> dict[str, Tensor]:
    """The weights of a network whose last feature answers the trigger with five times `strength`, and no other."""
    weights = RiggedArchitecture().build(ModelSpec(3, 1, 8, nn.ReLU)).state_dict()
    weights["conv.weight"][3] = 0
    weights["conv.weight"][3, 0, -3:, -3:] = strength * PATTERN
    return weights


def victim_features(task: Any) -> np.ndarray:
    data = task.training_data(None, CPU)
    features = collect_features(task.victim(), data.images.images, data.pixels, CPU)
    return features.double().numpy()


def reference_flags(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Whole classes, PCA and k-means by scikit-learn; the smaller cluster if it has less than 35 % of its class."""
    flagged = np.zeros(len(labels), bool)
    for k in np.unique(labels):
        members = np.flatnonzero(labels == k)
        reduced = PCA(features.shape[1]).fit_transform(features[members])
        assigned = KMeans(2, n_init=10, random_state=123).fit_predict(reduced)
        small = np.bincount(assigned).argmin()
        if round((assigned == small).mean(), 2) < 0.35:
            flagged[members[assigned == small]] = True
    return flagged


@pytest.fixture
def planted(make_task: Make, stripes: Any) -> Any:
    """A task whose victim answers the trigger far more strongly than anything else, and whose trainer only records.

    30 of the 120 or so samples of class 0 are poisoned, so that they are its smaller cluster, below 35 %.
    """
    train, truth = stripes(300, 30)
    return make_task(train, truth, architecture=RiggedArchitecture(), weights=plant(10.0), trains=False)


def test_the_same_samples_are_flagged_as_by_scikit_learn(planted: Any) -> None:
    expected = reference_flags(victim_features(planted.task), planted.task.train.labels.numpy())
    result = AC().run(planted.task, CPU)
    assert np.array_equal(planted.poisoned.numpy(), expected)
    assert torch.equal(result.flagged, planted.poisoned)
    assert result.infected is True


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_retrains_on_exactly_what_it_did_not_flag(planted: Any, rule: Rule) -> None:
    result = AC(rule=rule).run(planted.task, CPU)
    call = planted.calls[-1]
    assert call.keep is not None
    assert torch.equal(call.keep, torch.nonzero(~result.flagged).flatten())
    assert call.model is result.model
    assert len(planted.calls) == (2 if rule == "reclassification" else 1)


def test_rules_by_size_flag_the_planted_samples_and_the_smaller_clusters_benign_ones_too(planted: Any) -> None:
    flagged = {rule: AC(rule=rule).run(planted.task, CPU).flagged for rule in RULES}
    assert torch.equal(flagged["relative_size"], planted.poisoned)
    assert torch.equal(flagged["silhouette"], planted.poisoned)
    assert (planted.poisoned <= flagged["smaller"]).all()
    # each of the two clean classes loses its smaller half, of whatever size
    assert flagged["smaller"][~planted.poisoned].double().mean() > 0.1
    assert (flagged["reclassification"] <= flagged["smaller"]).all()
    assert not flagged["reclassification"][~planted.poisoned].any()


def test_flags_follow_the_samples_of_a_task(planted: Any, make_task: Make) -> None:
    order = torch.randperm(300)
    train, truth = planted.task.train.take(order), planted.poisoned[order]
    shuffled = make_task(train, truth, architecture=RiggedArchitecture(), weights=plant(10.0), trains=False)
    assert torch.equal(AC().run(shuffled.task, CPU).flagged, truth)


def test_flags_do_not_depend_on_the_batch_size(planted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    small = partial(features_module.iterate_normalized, batch_size=7)
    monkeypatch.setattr(features_module, "iterate_normalized", small)
    assert torch.equal(AC().run(planted.task, CPU).flagged, planted.poisoned)


def test_the_report_has_every_class_and_says_which_were_not_split(make_task: Make, stripes: Any) -> None:
    """Class 1 has one sample and class 2 none."""
    train, truth = stripes(60, 0)
    kept = torch.cat([torch.nonzero(train.labels == 0).flatten(), torch.nonzero(train.labels == 1).flatten()[:1]])
    weights = make_task(weights={}).task.new_model().state_dict()
    tiny = make_task(train.take(kept), truth[kept], weights=weights, trains=False)
    result = AC(rule="smaller").run(tiny.task, CPU)
    zero, one, two = result.extras["classes"]
    assert sum(zero["sizes"]) == len(kept) - 1
    assert zero["flagged_clusters"] == [1]
    assert (one["not_split"], two["not_split"]) == ("1 samples", "0 samples")
    assert one["flagged_clusters"] == two["flagged_clusters"] == []
    assert int(result.flagged.sum()) == zero["sizes"][1]


def test_a_clean_bill_of_health_is_reported(make_task: Make, stripes: Any) -> None:
    """Equal images: nothing is split, nothing flagged, and everything trained on."""
    train = ImageSet(torch.full((20, 1, 8, 8), 7, dtype=torch.uint8), torch.arange(20) % 3)
    weights = make_task(weights={}).task.new_model().state_dict()
    tiny = make_task(train, torch.zeros(20, dtype=torch.bool), weights=weights, trains=False)
    result = AC(rule="smaller").run(tiny.task, CPU)
    assert result.infected is False
    assert len(tiny.calls[0].keep) == 20
    assert [entry["not_split"] for entry in result.extras["classes"]] == ["all activations are equal"] * 3


# Reclassification, end to end.


def test_reclassification_flags_what_the_network_takes_for_another_class(make_task: Make, stripes: Any) -> None:
    """Images of class 1 with the trigger and label 0 are taken for class 1 by a network that never saw them; the
    smaller clusters of clean classes for what they are.
    """
    train, truth = stripes(300, 0)
    truth[torch.nonzero(train.labels == 1).flatten()[:30]] = True
    train.images[truth, :, -3:, -3:] = torch.tensor([[255, 0, 255], [0, 255, 0], [255, 0, 255]], dtype=torch.uint8)
    train = ImageSet(train.images, torch.where(truth, 0, train.labels))
    tiny = make_task(train, truth, architecture=RiggedArchitecture(), weights=plant(1.0), trains=False)
    result = AC(rule="reclassification").run(tiny.task, CPU)
    assert torch.equal(result.flagged, truth)
    assert [entry["flagged_clusters"] for entry in result.extras["classes"]] == [[1], [], []]
    without_candidates, final = (call.keep for call in tiny.calls)
    assert len(without_candidates) < len(final) == int((~truth).sum())
    assert not truth[without_candidates].any()


def test_nothing_left_to_train_on_is_an_error(make_task: Make) -> None:
    empty = ImageSet(torch.empty(0, 1, 8, 8, dtype=torch.uint8), torch.empty(0, dtype=torch.int64))
    weights = make_task(weights={}).task.new_model().state_dict()
    tiny = make_task(empty, torch.zeros(0, dtype=torch.bool), weights=weights)
    with pytest.raises(TrainingError, match="no sample"):
        AC().run(tiny.task, CPU)
