"""ABL: its losses by hand, isolation against a plain sort, one step of ascent by formula, and a real backdoor."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from bbn_defenses import abl as abl_module
from bbn_defenses.abl import ABL, ascent
from torch import Tensor, nn
from torch.nn import functional as F

from backdoor_bench_none.api import Architecture, Batch, Context, FitTask, History, ImageSet, ModelSpec, Trainer
from backdoor_bench_none.contracts import network
from backdoor_bench_none.contracts.record import Record
from backdoor_bench_none.errors import BenchError, TrainingError
from backdoor_bench_none.models.mlp import MLP
from backdoor_bench_none.models.resnet import ResNet18
from backdoor_bench_none.planning.plan import make_plan
from backdoor_bench_none.registry.components import Registry
from backdoor_bench_none.registry.plugins import Plugins
from backdoor_bench_none.results.store import Store
from backdoor_bench_none.run.stages import Stages
from backdoor_bench_none.trainers.centralized import Centralized

CPU = Context(torch.device("cpu"), 0)
Make = Callable[..., Any]


@pytest.fixture
def small(make_task: Make) -> Make:
    """A task with a small network without norm or dropout, so that a step can be computed by hand."""
    return partial(make_task, architecture=MLP(hidden=12, depth=1), weights={})


# The losses of the first stage.


def batch_of(losses: list[float]) -> Batch:
    """Logits (as images) of two classes that give each sample this cross entropy."""
    margins = -torch.tensor(losses, dtype=torch.float64).expm1().log()
    logits = torch.stack([margins, torch.zeros_like(margins)], 1).requires_grad_()
    return Batch(logits, torch.zeros(len(losses), dtype=torch.int64), torch.arange(len(losses)))


def value(defense: ABL, losses: list[float]) -> float:
    return float(defense.isolation_loss(nn.Identity(), batch_of(losses)).detach())


@pytest.mark.parametrize("reduction", ["batch", "sample"])
@pytest.mark.parametrize(
    ("isolation", "expected"), [("lga", {0.1: -0.1, 2.0: 2.0}), ("flooding", {0.1: 0.9, 0.5: 0.5, 2.0: 2.0})]
)
def test_values_by_hand(isolation: str, reduction: str, expected: dict[float, float]) -> None:
    for loss, wanted in expected.items():
        assert value(ABL(isolation=isolation, reduction=reduction), [loss]) == pytest.approx(wanted, abs=1e-9)


def test_at_gamma_exactly_the_sign_and_so_local_gradient_ascent_is_zero() -> None:
    batch = batch_of([math.log(2)])
    at = float(F.cross_entropy(batch.images, batch.labels).detach())
    assert ABL(gamma=at).isolation_loss(nn.Identity(), batch).detach() == 0


@pytest.mark.parametrize("isolation", ["lga", "flooding"])
@pytest.mark.parametrize(("reduction", "signs"), [("batch", [1, 1, 1, 1]), ("sample", [-1, -1, -1, 1])])
def test_the_direction_of_every_samples_gradient(isolation: str, reduction: str, signs: list[int]) -> None:
    losses = [0.1, 0.1, 0.1, 2.0]  # their mean is 0.575
    batch, plain = batch_of(losses), batch_of(losses)
    ABL(isolation=isolation, reduction=reduction).isolation_loss(nn.Identity(), batch).backward()
    F.cross_entropy(plain.images, plain.labels).backward()
    expected = torch.tensor(signs)[:, None] * plain.images.grad
    torch.testing.assert_close(batch.images.grad, expected)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.2])
def test_flooding_and_local_gradient_ascent_take_the_same_steps(make_task: Make, gamma: float) -> None:
    states = []
    for isolation in ("lga", "flooding"):
        task = make_task(weights={}, epochs=2).task
        model = task.new_model()
        task.fit(model, CPU, loss=ABL(isolation=isolation, gamma=gamma).isolation_loss)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.slow
def test_the_loss_is_kept_from_falling_below_gamma(make_task: Make) -> None:
    task = make_task(weights={}, epochs=8).task

    def final_losses(gamma: float) -> list[float]:
        losses = []
        for seed in range(5):
            model, context = task.new_model(seed), Context(CPU.device, seed)
            task.fit(model, context, loss=ABL(gamma=gamma).isolation_loss, schedule="constant")
            losses.append(float(F.cross_entropy(task.predict(model, CPU), task.train.labels)))
        return losses

    assert median(final_losses(0.0)) < 0.1  # measured: 4e-5 to 3e-4
    assert median(final_losses(0.5)) > 0.2  # measured: 0.31 to 0.47, median 0.39


# Isolation.


def expected_isolation(task: Any, count: int) -> list[int]:
    losses = F.cross_entropy(task.predict(task.new_model(), CPU), task.train.labels, reduction="none")
    assert len(losses.unique()) == len(losses)
    return sorted(range(len(losses)), key=lambda i: float(losses[i]))[:count]


@pytest.mark.parametrize(("fraction", "count"), [(0.01, 1), (0.05, 7), (0.1, 15), (0.999, 149)])
def test_the_samples_of_lowest_loss_are_isolated(small: Make, fraction: float, count: int) -> None:
    tiny = small(trains=False)  # the network stays as it was made
    result = ABL(isolation_fraction=fraction).run(tiny.task, CPU)
    expected = expected_isolation(tiny.task, count)
    assert torch.nonzero(result.flagged).flatten().tolist() == sorted(expected)
    assert result.extras["isolated"] == count
    assert result.scores[expected].min() > result.scores[~result.flagged].max()


def test_losses_that_round_to_zero_are_still_told_apart(small: Make) -> None:
    """A backdoor is learnt to margins beyond 17, where a float32 cross entropy
    is 0 for all: then the order of the data set would decide.
    """

    class Sure(Architecture):
        def build(self, spec: ModelSpec) -> nn.Module:
            model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
            nn.init.zeros_(model[1].weight)
            nn.init.zeros_(model[1].bias)
            model[1].weight.data[0, 0] = 30.0
            return model

    train = ImageSet(torch.zeros(30, 1, 8, 8, dtype=torch.uint8), torch.zeros(30, dtype=torch.int64))
    train.images[:, 0, 0, 0] = torch.arange(150, 240, 3)  # margins from 17.6 to 27.9, rising
    tiny = small(train, torch.zeros(30, dtype=torch.bool), architecture=Sure(), trains=False)
    result = ABL(isolation_fraction=0.1).run(tiny.task, CPU)
    assert torch.nonzero(result.flagged).flatten().tolist() == [27, 28, 29]


def test_scores_are_minus_the_loss(small: Make) -> None:
    task = small(trains=False).task
    losses = F.cross_entropy(task.predict(task.new_model(), CPU), task.train.labels, reduction="none")
    torch.testing.assert_close(ABL().run(task, CPU).scores, -losses.double(), rtol=1e-5, atol=1e-7)


def test_isolation_does_not_depend_on_batch_size_or_order(small: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, order = small(trains=False), torch.randperm(150)
    expected = ABL(isolation_fraction=0.1).run(tiny.task, CPU).flagged
    shuffled = small(train=tiny.task.train.take(order), poisoned=tiny.poisoned[order], trains=False)
    assert torch.equal(ABL(isolation_fraction=0.1).run(shuffled.task, CPU).flagged, expected[order])
    monkeypatch.setattr(network, "iterate_normalized", partial(network.iterate_normalized, batch_size=7))
    assert torch.equal(ABL(isolation_fraction=0.1).run(tiny.task, CPU).flagged, expected)


def test_a_fraction_that_selects_nothing_is_an_error_before_training(small: Make) -> None:
    tiny = small()
    with pytest.raises(ValueError, match=r"0.005 selects none of 150 samples; raise isolation_fraction above 0.0067"):
        ABL(isolation_fraction=0.005).run(tiny.task, CPU)
    assert tiny.calls == []


@pytest.mark.parametrize(
    "wrong", [{"isolation_fraction": 0}, {"isolation_fraction": 1}, {"gamma": -1}, {"isolation": "none"}]
)
def test_parameters_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ABL(**wrong)


# The stages.


def test_each_stage_trains_on_its_samples_and_on_no_other(small: Make) -> None:
    tiny = small(trains=False, epochs=10)
    result = ABL(isolation_fraction=0.1, unlearning_epochs=1).run(tiny.task, CPU)
    isolate, tune, unlearn = tiny.calls
    isolated = torch.nonzero(result.flagged).flatten()
    assert isolate.keep is None
    assert torch.equal(isolate.data.images.images, tiny.task.train.images)
    assert torch.equal(tune.keep, torch.nonzero(~result.flagged).flatten())
    assert torch.equal(tune.data.images.images, tiny.task.train.images)
    assert unlearn.keep is None
    assert sorted(unlearn.data.images.images.flatten(1).tolist()) == sorted(
        tiny.task.train.take(isolated).images.flatten(1).tolist()
    )
    assert all(call.model is result.model for call in tiny.calls)


def test_each_stage_has_its_recipe(small: Make) -> None:
    tiny = small(trains=False, epochs=10)
    ABL(unlearning_epochs=1).run(tiny.task, CPU)
    ABL(isolation_epochs=3, tuning_epochs=4, unlearning_epochs=1, unlearning_lr=0.25).run(tiny.task, CPU)
    ABL(tuning_epochs=0, unlearning_epochs=0).run(tiny.task, CPU)
    assert [call.recipe.epochs for call in tiny.calls] == [2, 10, 1, 3, 4, 1, 2]
    isolate, tune, unlearn = (call.recipe for call in tiny.calls[3:6])
    assert (isolate.lr, isolate.schedule, isolate.augment) == (0.05, "constant", False)
    assert (tune.lr, tune.schedule, tune.augment) == (0.05, "one_cycle", True)
    assert (unlearn.lr, unlearn.schedule, unlearn.augment) == (0.25, "constant", False)


class OnlyAscends(Trainer):
    """Leaves the network as it is until it is to be unlearned."""

    def fit(self, task: FitTask, context: Context) -> History:
        return Centralized().fit(task, context) if task.loss is ascent else History([0.0])


def test_one_step_of_ascent_raises_the_loss_by_the_documented_amount(small: Make) -> None:
    task = replace(small(weight_decay=0.1).task, trainer=OnlyAscends())
    result = ABL(isolation_fraction=0.1, unlearning_epochs=1, unlearning_lr=0.01).run(task, CPU)
    some = task.train.take(torch.nonzero(result.flagged).flatten())
    before = task.new_model()
    data = task.training_data(some, CPU)
    F.cross_entropy(before(data.pixels.normalize(some.images)), some.labels).backward()
    for old, new in zip(before.parameters(), result.model.parameters(), strict=True):
        expected = old + 0.01 * 1.9 * (old.grad - 0.1 * old)  # Nesterov's first step is 1 + 0.9 times the gradient
        torch.testing.assert_close(new, expected)
    first, last = (F.cross_entropy(task.predict(model, CPU, some), some.labels) for model in (before, result.model))
    assert last > first


@pytest.mark.parametrize(("count", "batch_size", "passes"), [(40, 16, 5), (15, 16, 5), (32, 16, 2), (34, 16, 1)])
def test_the_steps_of_ascent_are_passes_times_batches(
    small: Make, monkeypatch: pytest.MonkeyPatch, count: int, batch_size: int, passes: int
) -> None:
    sizes: list[int] = []

    def spy(model: nn.Module, batch: Batch) -> Tensor:
        sizes.append(len(batch.labels))
        return ascent(model, batch)

    monkeypatch.setattr(abl_module, "ascent", spy)
    tiny = small(batch_size=batch_size, epochs=1)
    result = ABL(isolation_fraction=(count + 0.5) / 150, unlearning_epochs=passes, unlearning_lr=1e-9).run(
        tiny.task, CPU
    )
    assert len(sizes) == passes * math.ceil(count / batch_size)
    assert sum(sizes) == passes * count
    assert result.extras["unlearning_passes"] == passes


def test_ascent_stops_once_the_isolated_samples_are_forgotten(small: Make) -> None:
    tiny = small(epochs=3)
    result = ABL(isolation_fraction=0.1, unlearning_epochs=50, unlearning_lr=0.5).run(tiny.task, CPU)
    some = tiny.task.train.take(torch.nonzero(result.flagged).flatten())
    predicted = tiny.task.predict(result.model, CPU, some).argmax(1)
    assert 0 < result.extras["unlearning_passes"] < 50
    assert (predicted == some.labels).float().mean() < 1 / 3
    assert all(torch.isfinite(p).all() for p in result.model.parameters())


def test_a_network_that_already_forgot_is_not_trained_any_further(small: Make) -> None:
    class Wrong(Architecture):
        def build(self, spec: ModelSpec) -> nn.Module:
            model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
            nn.init.zeros_(model[1].weight)
            model[1].bias.data = torch.tensor([-9.0, 9, 0])
            return model

    train = ImageSet(torch.zeros(30, 1, 8, 8, dtype=torch.uint8), torch.zeros(30, dtype=torch.int64))
    tiny = small(train, torch.zeros(30, dtype=torch.bool), architecture=Wrong(), trains=False)
    result = ABL(isolation_fraction=0.1).run(tiny.task, CPU)
    assert result.extras["unlearning_passes"] == 0
    assert len(tiny.calls) == 2


@pytest.mark.parametrize("isolated", [1, 17])
def test_a_batch_of_one_isolated_sample_is_no_riddle(make_task: Make, isolated: int) -> None:
    """In batches of 16, with batch norm on maps of 1x1, which has no
    variance: it is unlearned, or the error says whose fault it is.
    """
    tiny = make_task(architecture=ResNet18(width=0.05), weights={}, epochs=1)
    try:
        result = ABL(isolation_fraction=(isolated + 0.5) / 150, unlearning_epochs=1).run(tiny.task, CPU)
    except (ValueError, BenchError) as error:
        assert "isolat" in str(error)  # noqa: PT017
    else:
        assert result.extras["isolated"] == isolated


def test_losses_that_are_not_finite_are_an_error(small: Make) -> None:
    with pytest.raises(TrainingError, match="not finite"):
        ABL().run(small(lr=1e30).task, CPU)


def test_losses_that_are_not_finite_after_the_first_stage_are_an_error(small: Make) -> None:
    class Broken(Architecture):
        def build(self, spec: ModelSpec) -> nn.Module:
            model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
            nn.init.constant_(model[1].bias, math.nan)
            return model

    with pytest.raises(ValueError, match="abl: the losses after the first stage are not finite"):
        ABL().run(small(architecture=Broken(), trains=False).task, CPU)


def test_a_seed_determines_the_network(small: Make) -> None:
    first, again = (ABL(isolation_fraction=0.1).run(small().task, CPU).model.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


# A real backdoor.

BENCHMARK = """
version: 1
name: whole way
seeds: [0, 1, 2, 3, 4]
matrix:
  dataset: [digits]
  attack: [{name: badnets, params: {poison_rate: 0.1, trigger_kind: label_consistent, size: 5}}]
  defense: [no_defense, {name: abl, params: {isolation_epochs: 4, isolation_fraction: 0.03, unlearning_epochs: 8}}]
  architecture: [{name: resnet18, params: {width: 0.125}, recipe: {epochs: 8, batch_size: 32}}]
"""


@pytest.mark.slow
def test_abl_isolates_and_unlearns_a_real_backdoor(tmp_path: Path) -> None:
    """Eight passes are 16 steps of ascent, as many as the authors'; 8 seeds ended at ASR 0 to 13 %, BA 86 to 97."""
    (tmp_path / "benchmark.yaml").write_text(BENCHMARK)
    store = Store(tmp_path / "results")
    store.create()
    plan = make_plan(tmp_path / "benchmark.yaml", Registry(Plugins(external=False)))
    records = {(cell.defense.name, cell.seed): Stages(cell, store, CPU).evaluate() for cell in plan.cells}
    isolated = []
    for seed in range(5):
        detection = records["abl", seed].detection
        assert detection is not None
        assert detection.true_positive + detection.false_positive == 38
        isolated.append(detection.true_positive)
    before, after = ([rates_of(records[name, seed]) for seed in range(5)] for name in ("no_defense", "abl"))
    (benign, attacked), (benign_after, attacked_after) = (
        [median(rates) for rates in zip(*runs, strict=True)] for runs in (before, after)
    )
    assert attacked >= 0.95
    assert attacked_after <= 0.15
    assert benign_after >= benign - 0.15
    assert median(isolated) >= 0.9 * 38


def rates_of(record: Record) -> tuple[float, float]:
    """BA and ASR."""
    assert record.counts is not None
    assert record.counts.attack_success_rate is not None
    return record.counts.benign_accuracy.rate, record.counts.attack_success_rate.rate
