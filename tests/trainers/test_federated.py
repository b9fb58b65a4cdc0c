"""Federated averaging: who holds what, what a round computes, how a defense drops samples, and NONE on top of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from backdoor_bench_none.api import (
    Cell,
    Context,
    DatasetInfo,
    FitTask,
    History,
    ImageSet,
    ModelSpec,
    Recipe,
    TrainingData,
    TrainingTask,
)
from backdoor_bench_none.contracts.builder import ModelBuilder
from backdoor_bench_none.errors import ConfigError, DeadlineError
from backdoor_bench_none.models.mlp import MLP
from backdoor_bench_none.planning.plan import Plan
from backdoor_bench_none.results.store import Store
from backdoor_bench_none.run.stages import Stages
from backdoor_bench_none.trainers.centralized import Centralized
from backdoor_bench_none.trainers.federated import Average, Federated

CPU = Context(torch.device("cpu"), 0)
CLASSES, COUNT = 3, 24
INFO = DatasetInfo("toy", (1, 3, 3), CLASSES, COUNT, (0.5,), (0.25,))
#: one step along the mean gradient of all samples an epoch, which no order of samples changes
FULL_BATCH: dict[str, Any] = {"epochs": 1, "batch_size": 1000, "lr": 0.5, "momentum": 0.0, "nesterov": False,
                              "weight_decay": 0.0, "schedule": "constant", "augment": False}  # fmt: skip
HALVES = torch.arange(COUNT) % 2
Weights = dict[str, Tensor]


def make_images(count: int = COUNT, seed: int = 0) -> ImageSet:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 1, 3, 3), generator=generator).byte()
    return ImageSet(images, torch.arange(count) % CLASSES)


def make_network(norm: bool = False) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        norms = [nn.BatchNorm1d(8)] if norm else []
        return nn.Sequential(nn.Flatten(), nn.Linear(9, 8), *norms, nn.Tanh(), nn.Linear(8, CLASSES))


def fit(
    trainer: Federated | Centralized,
    clients: Tensor | None = None,
    data: ImageSet | None = None,
    norm: bool = False,
    context: Context = CPU,
    options: Mapping[str, Any] | None = None,
    **recipe: Any,
) -> tuple[Weights, History]:
    """The weights of a network after training from the same initial weights; `options` are fields of the task."""
    model = make_network(norm)
    prepared = TrainingData.of(data or make_images(), INFO, context.device, clients)
    task = FitTask(model, prepared, Recipe(**{**FULL_BATCH, **recipe}), **(options or {}))
    history = trainer.fit(task, context)
    assert not model.training
    return model.state_dict(), history


def held_by(client: int, clients: Tensor = HALVES) -> Tensor:
    return torch.nonzero(clients == client).flatten()


def alone(samples: Tensor, **keywords: Any) -> Weights:
    """What one client makes of these samples."""
    return fit(Centralized(), options={"keep": samples}, **keywords)[0]


def mean(*parts: Weights) -> Weights:
    return {name: torch.stack([part[name].float() for part in parts]).mean(0) for name in parts[0]}


def assert_close(first: Weights, second: Weights, tolerance: float = 1e-5) -> None:
    for name in first:
        torch.testing.assert_close(first[name].float(), second[name].float(), rtol=tolerance, atol=tolerance)


def assert_same(first: Weights, second: Weights) -> None:
    assert all(torch.equal(first[name], second[name]) for name in first)


def differ(first: Weights, second: Weights) -> bool:
    return any(not torch.allclose(first[name], second[name], atol=1e-4) for name in first)


# Who holds what (DBA 6).


@settings(deadline=None, max_examples=60)
@given(count=st.integers(1, 300), data=st.data(), seed=st.integers(0, 2**63 - 1))
def test_iid_shares_are_a_partition_of_equal_sizes(count: int, data: st.DataObject, seed: int) -> None:
    clients = data.draw(st.integers(1, count))
    owners = Federated(clients=clients).split(torch.arange(count) % CLASSES, CLASSES, seed)
    assert (owners.shape, owners.dtype) == ((count,), torch.int64)
    sizes = torch.bincount(owners, minlength=clients)
    assert len(sizes) == clients
    assert int(sizes.max() - sizes.min()) <= 1


@settings(deadline=None, max_examples=60)
@given(count=st.integers(1, 300), clients=st.integers(1, 12), alpha=st.floats(0.05, 100), seed=st.integers(0, 2**31))
def test_dirichlet_gives_each_index_to_one_client_or_names_one_without(
    count: int, clients: int, alpha: float, seed: int
) -> None:
    trainer = Federated(clients=clients, distribution="dirichlet", alpha=alpha)
    try:
        owners = trainer.split(torch.arange(count) % CLASSES, CLASSES, seed)
    except ConfigError:
        owners = None  # a client without a sample is refused
    if owners is None:
        assert clients > 1
    else:
        assert owners.shape == (count,)
        assert torch.equal(torch.unique(owners), torch.arange(clients))


def test_low_alpha_gives_clients_few_classes_and_high_alpha_equal_shares_of_each() -> None:
    labels = torch.arange(3000) % CLASSES

    def shares(alpha: float) -> Tensor:
        owners = Federated(clients=4, distribution="dirichlet", alpha=alpha).split(labels, CLASSES, 1)
        return torch.stack([torch.bincount(labels[owners == client], minlength=CLASSES) for client in range(4)])

    assert ((shares(1e5) - 250).abs() < 10).all()
    uneven = shares(0.2)
    assert (uneven.sum(0) == 1000).all()
    assert (uneven.amax(0) > 500).any()
    assert int(uneven.sum(1).max() - uneven.sum(1).min()) > 300


@pytest.mark.parametrize("distribution", ["iid", "dirichlet"])
def test_a_split_is_a_function_of_the_seed(distribution: str) -> None:
    trainer, labels = Federated(clients=3, distribution=distribution, alpha=5), torch.arange(200) % CLASSES
    first = trainer.split(labels, CLASSES, 7)
    torch.rand(5)
    assert torch.equal(first, trainer.split(labels, CLASSES, 7))
    assert not torch.equal(first, trainer.split(labels, CLASSES, 8))
    assert (first.diff() != 0).sum() > 50  # not one block after the other


# Averaging (DBA 2).


@settings(deadline=None, max_examples=40)
@given(
    count=st.integers(1, 12),
    seed=st.integers(0, 1000),
    kind=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64]),
)
def test_averages(count: int, seed: int, kind: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randint(-50, 50, (2, 3), generator=generator).to(kind) for _ in range(count)]
    average, backwards, copies = Average(), Average(), Average()
    for part, other in zip(parts, reversed(parts), strict=True):
        average.add({"w": part})
        backwards.add({"w": other})
        copies.add({"w": parts[0]})
    exact = torch.stack(parts).double().mean(0)
    result = average.result()["w"]
    assert result.dtype == kind
    if kind.is_floating_point:
        torch.testing.assert_close(result, exact.to(kind))
    else:
        assert ((exact - result >= 0) | (exact < 0)).all()
        assert ((exact - result).abs() < 1).all()
    assert torch.equal(result, backwards.result()["w"])
    assert torch.equal(copies.result()["w"], parts[0])


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.int64])
def test_a_network_that_trains_on_afterwards_changes_no_average(kind: torch.dtype) -> None:
    weights, average = torch.tensor([4, 8]).to(kind), Average()
    average.add({"w": weights})
    weights.fill_(99)
    assert average.result()["w"].tolist() == [4, 8]


def test_one_of_ten_who_moves_by_ten_moves_the_mean_by_one() -> None:
    start, average = torch.tensor([1.0, -2.0]), Average()
    for client in range(10):
        average.add({"w": start + 10 * (client == 4), "steps": torch.tensor(client)})
    assert average.result()["w"].tolist() == [2.0, -1.0]
    assert average.result()["steps"].item() == 4  # of 4.5


# What a round computes.


@pytest.mark.parametrize("rounds", [1, 4])
def test_equal_clients_with_one_full_batch_are_centralized_training(rounds: int) -> None:
    federated, history = fit(Federated(clients=2), HALVES, epochs=rounds)
    central, expected = fit(Centralized(), epochs=rounds)
    assert_close(federated, central)
    assert differ(central, make_network().state_dict())
    assert history.losses == pytest.approx(expected.losses, abs=1e-5)


def test_one_client_that_holds_everything_trains_as_it_would_with_the_seed_of_its_round() -> None:
    recipe: dict[str, Any] = {"batch_size": 5, "momentum": 0.9}
    trainer = Federated(clients=1, local_epochs=3)
    federated, _ = fit(trainer, torch.zeros(COUNT, dtype=torch.int64), epochs=1, **recipe)
    central, _ = fit(Centralized(), context=CPU.derive("round", 0, 0), epochs=3, **recipe)
    assert_close(federated, central, 1e-7)


def test_clients_count_alike_whatever_they_hold() -> None:
    clients = (torch.arange(COUNT) >= 2).long()
    expected = mean(alone(torch.arange(2)), alone(torch.arange(2, COUNT)))
    assert_close(fit(Federated(clients=2), clients)[0], expected)
    assert differ(expected, fit(Centralized())[0])


def test_a_client_can_train_in_its_own_way() -> None:
    options = {"local": {1: {"lr": 1e-30}, 0: {"epochs": 4}}}
    expected = mean(alone(held_by(0), epochs=4), make_network().state_dict())
    assert_close(fit(Federated(clients=2), HALVES, options=options)[0], expected)


def test_epochs_of_the_recipe_are_rounds_and_so_are_milestones() -> None:
    done: list[tuple[int, int]] = []
    context = Context(torch.device("cpu"), 0, progress=lambda *at: done.append(at))
    step: dict[str, Any] = {"schedule": "step", "milestones": (2,), "gamma": 1e-12}
    trainer = Federated(clients=2, local_epochs=2)
    once, _ = fit(trainer, HALVES, epochs=1, **step)
    often, history = fit(trainer, HALVES, context=context, epochs=3, **step)
    assert_close(once, often, 1e-7)
    assert len(history.losses) == 3
    assert done == [(1, 3), (2, 3), (3, 3)]


def test_a_seed_determines_the_weights_and_nothing_else_does() -> None:
    def run(seed: int) -> Weights:
        return fit(Federated(clients=3), torch.arange(COUNT) % 3, context=Context(CPU.device, seed), batch_size=4)[0]

    torch.manual_seed(1)
    first = run(0)
    torch.manual_seed(2)
    assert_same(first, run(0))
    assert differ(first, run(1))


def test_the_deadline_is_kept() -> None:
    with pytest.raises(DeadlineError):
        fit(Federated(clients=2), HALVES, context=Context(CPU.device, 0, deadline=time.monotonic() - 1))


# What a defense may change.


def test_dropped_samples_are_dropped_on_their_clients_only() -> None:
    data, keep = make_images(), torch.cat([held_by(0)[:5], held_by(1)])
    averaged, _ = fit(Federated(clients=2), HALVES, options={"keep": keep})
    assert_close(averaged, mean(alone(held_by(0)[:5]), alone(held_by(1))))
    dropped = torch.ones(COUNT, dtype=torch.bool)
    dropped[keep] = False
    data.images[dropped] = 0
    assert_same(averaged, fit(Federated(clients=2), HALVES, data, options={"keep": keep})[0])


def test_a_client_without_samples_sits_out() -> None:
    averaged, _ = fit(Federated(clients=2), HALVES, options={"keep": held_by(1)})
    assert_close(averaged, alone(held_by(1)))


def test_samples_that_no_client_holds_are_not_trained_on() -> None:
    clients = torch.where(torch.arange(COUNT) < 10, HALVES, -1)
    expected = mean(alone(held_by(0, clients)), alone(held_by(1, clients)))
    assert_close(fit(Federated(clients=2), clients)[0], expected)


def test_nothing_left_to_train_on_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no client has a sample"):
        fit(Federated(clients=2), HALVES, options={"keep": torch.arange(0)})


def test_frozen_statistics_stay_and_others_are_averaged() -> None:
    start, statistics = make_network(norm=True).state_dict(), ("2.running_mean", "2.running_var")
    frozen, _ = fit(Federated(clients=2), HALVES, norm=True, options={"freeze_batchnorm": True}, epochs=2)
    assert all(torch.equal(frozen[name], start[name]) for name in (*statistics, "2.num_batches_tracked"))
    assert not torch.equal(frozen["2.weight"], start["2.weight"])
    usual, _ = fit(Federated(clients=2), HALVES, norm=True)
    expected = mean(*(alone(held_by(client), norm=True) for client in range(2)))
    assert_close(usual, expected)
    assert not torch.allclose(usual["2.running_mean"], start["2.running_mean"])
    assert usual["2.num_batches_tracked"].item() == 1


def test_data_that_no_client_holds_are_trained_on_by_the_server() -> None:
    assert_same(fit(Federated(clients=2), batch_size=5)[0], fit(Centralized(), batch_size=5)[0])


def test_a_task_trains_its_own_set_on_clients_and_other_data_on_the_server() -> None:
    build = ModelBuilder(MLP(hidden=4, depth=1), ModelSpec(CLASSES, 1, 3, nn.ReLU), "toy", CPU.device)
    clients = (torch.arange(COUNT) >= 2).long()
    task = TrainingTask(train=make_images(), info=INFO, recipe=Recipe(**FULL_BATCH), trainer=Federated(clients=2),
                        build=build, clients=clients)  # fmt: skip

    def trained(trainer: Federated | Centralized, data: ImageSet | None) -> Weights:
        model = task.new_model()
        prepared = TrainingData.of(data or task.train, INFO, CPU.device, None if data else clients)
        trainer.fit(FitTask(model, prepared, task.recipe), CPU)
        return model.state_dict()

    for data, trainer in ((None, Federated(clients=2)), (make_images(9, seed=4), Centralized())):
        task.fit(model := task.new_model(), CPU, data=data)
        assert_same(model.state_dict(), trained(trainer, data))
    assert differ(trained(Federated(clients=2), None), trained(Centralized(), make_images()))


# In a benchmark.


def test_the_recipe_is_that_of_dba_and_what_is_given_wins(tiny_plan: Callable[..., Plan]) -> None:
    (cell,) = tiny_plan(defense="no_defense", trainer="{name: federated, recipe: {lr: 0.02}}").cells
    recipe = cell.recipe
    assert (recipe.lr, recipe.batch_size, recipe.schedule, recipe.nesterov) == (0.02, 64, "constant", False)
    assert Federated().recipe()["lr"] == 0.1


def test_more_clients_than_samples(tiny_plan: Callable[..., Plan]) -> None:
    tiny_plan(trainer="{name: federated, params: {clients: 1297}}")
    with pytest.raises(ConfigError, match="1298 clients cannot share the 1297 training images of digits"):
        tiny_plan(trainer="{name: federated, params: {clients: 1298}}")


def test_an_empty_client(tiny_plan: Callable[..., Plan], tmp_path: Path) -> None:
    trainer = "{name: federated, params: {clients: 60, distribution: dirichlet, alpha: 0.001}}"
    (cell,) = tiny_plan(defense="no_defense", trainer=trainer).cells
    with pytest.raises(ConfigError, match=r"client \d+ has no sample"):
        Stages(cell, Store(tmp_path / "results"), CPU).evaluate()


@pytest.mark.parametrize("params", [{"clients": 0}, {"local_epochs": 0}, {"alpha": 0}, {"distribution": "even"}])
def test_parameters_are_checked(params: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Federated(**params)


def test_none_drops_what_it_flags_on_each_client(
    tiny_plan: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = tiny_plan(
        seeds="0, 1, 2, 3, 4",
        epochs=6,
        attack="{name: badnets, params: {poison_rate: 0.2}}",
        defense="no_defense, {name: none, params: {epochs: 3, lr: 0.02}}",
        architecture="{name: mlp, params: {hidden: 32, depth: 2}}",
        trainer="{name: federated, params: {clients: 5, distribution: dirichlet, alpha: 5}, recipe: {epochs: 6}}",
    )
    store = Store(tmp_path / "results")
    trained: list[Tensor | None] = []
    really = Centralized.fit

    def watched(self: Centralized, task: FitTask, context: Context) -> History:
        trained.append(task.keep)
        return really(self, task, context)

    monkeypatch.setattr(Centralized, "fit", watched)
    attacked, benign = [], []
    for undefended, defended in zip(*(named(plan, name) for name in ("no_defense", "none")), strict=True):
        before = Stages(undefended, store, CPU).evaluate().counts
        assert before is not None
        assert before.attack_success_rate is not None
        attacked.append(before.attack_success_rate.rate)

        trained.clear()
        stages = Stages(defended, store, CPU)
        record, clients = stages.evaluate(), stages.clients()
        assert clients is not None
        kept = ~stages.defense().tensors["flagged"]
        assert 0 < int(kept.sum()) < 1297
        expected = [torch.nonzero(kept & (clients == client)).flatten().tolist() for client in range(5)]
        assert [samples.tolist() for samples in trained if samples is not None] == expected * 3
        assert record.counts is not None
        benign.append(record.counts.benign_accuracy.rate)
        detection = record.detection
        assert detection is not None
        assert detection.true_positive + detection.false_negative == 259
        assert detection.true_negative + detection.false_positive == 1297 - 259
    assert median(attacked) > 0.8  # measured: 0.96 to 0.99
    assert median(benign) > 0.5  # measured: 0.74 to 0.79; chance is 0.1


def named(plan: Plan, defense: str) -> list[Cell]:
    """The cells with that defense, by seed."""
    return [cell for cell in plan.cells if cell.defense.name == defense]
