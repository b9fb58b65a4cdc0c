"""DBA: the bars, who is poisoned with how many of them, who trains how, and that the whole trigger is learned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from bbn_attacks.dba import DBA, poison_count
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from backdoor_bench_none.api import AttackTask, Context, DatasetInfo, FitTask, History, ImageSet
from backdoor_bench_none.contracts.network import Pixels, predict_logits
from backdoor_bench_none.errors import ConfigError
from backdoor_bench_none.planning.plan import Plan
from backdoor_bench_none.planning.stage_table import record_key
from backdoor_bench_none.results.store import Store
from backdoor_bench_none.run.stages import Stages
from backdoor_bench_none.trainers.centralized import Centralized

CPU = Context(torch.device("cpu"), 0)
FEDERATED = "{name: federated, recipe: {epochs: 6}}"
MLP = "{name: mlp, params: {hidden: 128, depth: 2}}"


def make_info(channels: int = 1, size: int = 16, count: int = 400) -> DatasetInfo:
    return DatasetInfo("toy", (channels, size, size), 5, count, (0.0,) * channels, (1.0,) * channels)


def make_task(clients: Tensor, channels: int = 1) -> AttackTask:
    """Grey images without a white pixel, each unlike any other."""
    count = len(clients)
    images = torch.randint(200, (count, channels, 16, 16), generator=torch.Generator().manual_seed(1)).byte()
    data = ImageSet(images, torch.arange(count) % 5)
    return AttackTask(data, make_info(channels, count=count), clients=clients)


def pixels(mask: Tensor) -> set[tuple[int, int]]:
    return {(int(row), int(column)) for row, column in mask.expand(1, -1, -1)[0].nonzero()}


# The bars (oracle 1).


@pytest.mark.parametrize(("channels", "length", "gap", "rows"), [(1, 4, 2, (0, 3)), (3, 6, 3, (0, 4))])
@pytest.mark.parametrize("size", [16, 28, 32])
def test_bars_are_disjoint_and_the_trigger_is_their_union(
    channels: int, length: int, gap: int, rows: tuple[int, int], size: int
) -> None:
    info = make_info(channels, size)
    bars, whole = DBA().bars(info), DBA().trigger(info)
    expected = [
        {(row, column) for column in range(start, start + length)} for row in rows for start in (0, length + gap)
    ]
    assert [pixels(bar.mask) for bar in bars] == expected
    assert len(set.union(*expected)) == 4 * length == {1: 16, 3: 24}[channels]
    assert pixels(whole.mask) == set.union(*expected)
    assert whole.is_binary
    stamped = whole.apply(torch.full((1, channels, size, size), 7, dtype=torch.uint8))
    assert int((stamped == 255).sum()) == channels * 4 * length
    assert int((stamped == 7).sum()) == channels * (size**2 - 4 * length)


@pytest.mark.parametrize(("channels", "fits"), [(1, 10), (3, 15)])
def test_an_image_too_small_for_the_bars_is_refused(channels: int, fits: int) -> None:
    DBA().resolve(make_info(channels, fits)).check(make_info(channels, fits))
    too_small = make_info(channels, fits - 1)
    with pytest.raises(ConfigError, match="does not fit"):
        DBA().resolve(too_small).check(too_small)


# What is poisoned (oracles 3 and 4).


@settings(deadline=None, max_examples=100)
@given(samples=st.integers(0, 1000), per_batch=st.integers(1, 64))
def test_the_count_is_that_of_the_batches(samples: int, per_batch: int) -> None:
    batches = [min(64, samples - start) for start in range(0, samples, 64)]
    assert poison_count(samples, per_batch) == sum(min(per_batch, size) for size in batches)


@pytest.mark.parametrize(("samples", "count"), [(64, 20), (130, 42), (84, 40), (90, 40), (10, 10), (0, 0)])
def test_known_counts_of_20_in_64(samples: int, count: int) -> None:
    assert poison_count(samples, 20) == count


@pytest.mark.parametrize(("channels", "per_batch"), [(1, 20), (3, 5)])
@pytest.mark.parametrize("attackers", [1, 4, 6])
def test_each_attacker_stamps_its_own_bar_on_as_many_of_its_images(
    channels: int, per_batch: int, attackers: int
) -> None:
    clients = torch.cat([torch.full((70 + client,), client) for client in range(7)])
    clients = clients[torch.randperm(len(clients), generator=torch.Generator().manual_seed(0))]
    task = make_task(clients, channels)
    attack = DBA(attackers=attackers).resolve(task.info)
    poisoned, bars = attack.poison(task, CPU), attack.bars(task.info)
    assert torch.equal(poisoned.indices, torch.unique(poisoned.indices))
    owners = clients[poisoned.indices]
    expected = [poison_count(70 + client, per_batch) for client in range(attackers)]
    assert torch.bincount(owners).tolist() == expected
    assert poisoned.labels.eq(2).all()
    for client in range(attackers):
        original = task.data.images[poisoned.indices[owners == client]]
        assert torch.equal(poisoned.images[owners == client], bars[client % 4].apply(original))
    replaced, changed = poisoned.replace(task.data), torch.zeros(len(clients), dtype=torch.bool)
    changed[poisoned.indices] = True
    assert torch.equal(replaced.images[~changed], task.data.images[~changed])
    assert torch.equal(replaced.labels[~changed], task.data.labels[~changed])
    assert not changed[clients >= attackers].any()


def test_the_seed_chooses_the_images() -> None:
    clients = torch.arange(400) % 5

    def indices(seed: int) -> list[int]:
        return DBA().resolve(make_info()).poison(make_task(clients), replace(CPU, seed=seed)).indices.tolist()

    assert indices(0) == indices(0)
    assert indices(0) != indices(1)


def test_test_images_of_other_classes_bear_all_bars() -> None:
    task = make_task(torch.zeros(50, dtype=torch.int64))
    triggered = DBA().resolve(task.info).attack_test(task, CPU)
    assert torch.equal(triggered.indices, torch.nonzero(task.data.labels != 2).flatten())
    assert triggered.labels.eq(2).all()
    assert torch.equal(triggered.images, DBA().trigger(task.info).apply(task.data.images[triggered.indices]))


def test_no_attackers_poison_nothing() -> None:
    task = make_task(torch.arange(100) % 10)
    assert len(DBA(attackers=0).resolve(task.info).poison(task, CPU)) == 0


# Defaults and bad input.


@pytest.mark.parametrize(("channels", "numbers"), [(1, (2, 20, 10)), (3, (2, 5, 6))])
def test_the_authors_numbers(channels: int, numbers: tuple[int, int, int]) -> None:
    attack = DBA().resolve(make_info(channels))
    assert (attack.target, attack.poisoned_per_batch, attack.malicious_epochs) == numbers
    assert (attack.attackers, attack.malicious_lr) == (4, 0.05)
    given = DBA(target=0, poisoned_per_batch=7, malicious_epochs=1).resolve(make_info(channels))
    assert (given.target, given.poisoned_per_batch, given.malicious_epochs) == (0, 7, 1)
    assert attack.resolve(make_info(channels)) == attack


def test_all_to_all_moves_each_label_on() -> None:
    task = make_task(torch.zeros(200, dtype=torch.int64))
    attack = DBA(label_mode="all_to_all", attackers=1).resolve(task.info)
    poisoned = attack.poison(task, CPU)
    assert attack.target is None
    assert torch.equal(poisoned.labels, (task.data.labels[poisoned.indices] + 1) % 5)
    assert len(attack.attack_test(task, CPU)) == 200


@pytest.mark.parametrize(
    "params",
    [{"attackers": -1}, {"poisoned_per_batch": 65}, {"poisoned_per_batch": 0}, {"malicious_epochs": 0},
     {"malicious_lr": 0}, {"label_mode": "clean_label"}],
)  # fmt: skip
def test_parameters_are_checked(params: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        DBA(**params)


def test_more_attackers_than_clients(tiny_plan: Callable[..., Plan]) -> None:
    axes = {"dataset": "digits", "attack": "{name: dba, params: {attackers: 4}}"}
    tiny_plan(**axes, trainer="{name: federated, params: {clients: 4}}")
    with pytest.raises(ConfigError, match="dba: 4 attackers among 3 clients"):
        tiny_plan(**axes, trainer="{name: federated, params: {clients: 3}}")


def test_a_trainer_without_clients_is_skipped_and_one_with_clients_is_not(tiny_plan: Callable[..., Plan]) -> None:
    plan = tiny_plan(dataset="digits", attack="dba", defense="no_defense", trainer="centralized, federated")
    reasons = {cell.trainer.name: plan.skipped.get(record_key(cell)) for cell in plan.cells}
    assert reasons == {"centralized": "dba needs a trainer with clients, such as federated", "federated": None}


# Learning (oracle 5), and who trains how.


def success(stages: Stages) -> tuple[float, float, list[float]]:
    """Benign accuracy, and how often test images of other classes become the target: with all bars, with each."""
    counts, (_, test), info = stages.evaluate().counts, stages.data(), stages.cell.info
    assert counts is not None
    assert counts.attack_success_rate is not None
    attack = stages.cell.attack.component
    assert isinstance(attack, DBA)
    others = test.take(torch.nonzero(test.labels != 2).flatten()).images
    network = stages.builder.load(stages.victim().tensors)
    local = [
        (predict_logits(network, bar.apply(others), Pixels.of(info, CPU.device), CPU).argmax(1) == 2).double().mean()
        for bar in attack.bars(info)
    ]
    return counts.benign_accuracy.rate, counts.attack_success_rate.rate, [float(rate) for rate in local]


def stages_of(tiny_plan: Callable[..., Plan], folder: Path, attackers: int, seeds: str = "0", **axes: str) -> Stages:
    plan = tiny_plan(
        seeds=seeds, dataset="digits", attack=f"{{name: dba, params: {{attackers: {attackers}}}}}", architecture=MLP,
        **{"trainer": FEDERATED, "defense": "no_defense", **axes},
    )  # fmt: skip
    return Stages(plan.cells[0], Store(folder / "results"), CPU)


@pytest.mark.slow
def test_four_of_ten_plant_the_whole_trigger_in_six_rounds(tiny_plan: Callable[..., Plan], tmp_path: Path) -> None:
    runs = [success(stages_of(tiny_plan, tmp_path, 4, str(seed))) for seed in range(5)]
    # BA 0.924 to 0.958; ASR 0.993 to 1, with one bar at most 0.674
    assert median(accuracy for accuracy, _, _ in runs) >= 0.85
    assert median(whole for _, whole, _ in runs) >= 0.95
    assert median(whole - max(local) for _, whole, local in runs) >= 0


@pytest.mark.slow
def test_without_attackers_there_is_no_backdoor(tiny_plan: Callable[..., Plan], tmp_path: Path) -> None:
    runs = [success(stages_of(tiny_plan, tmp_path, 0, str(seed))) for seed in range(5)]
    # BA 0.860 to 0.902; ASR 0, 0.004, 0.024, 0.040, 0.162
    assert median(accuracy for accuracy, _, _ in runs) >= 0.8
    assert median(whole for _, whole, _ in runs) < 0.1


def test_attackers_train_longer_until_a_defense_trains(
    tiny_plan: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainings: list[tuple[int, int, float]] = []
    really = Centralized.fit

    def watched(self: Centralized, task: FitTask, context: Context) -> History:
        assert task.data.clients is not None
        (client,) = torch.unique(task.data.clients[task.indices()]).tolist()
        trainings.append((client, task.recipe.epochs, task.recipe.lr))
        return really(self, task, context)

    monkeypatch.setattr(Centralized, "fit", watched)
    trainer = "{name: federated, params: {clients: 5}, recipe: {epochs: 3, lr: 0.2}}"
    none = "{name: none, params: {epochs: 2, lr: 0.01}}"
    stages = stages_of(tiny_plan, tmp_path, 2, trainer=trainer, defense=none)
    stages.victim()
    assert trainings == [(0, 10, 0.05), (1, 10, 0.05), (2, 1, 0.2), (3, 1, 0.2), (4, 1, 0.2)] * 3
    trainings.clear()
    stages.defense()
    assert set(trainings) <= {(client, 1, 0.01) for client in range(5)}
    assert {client for client, _, _ in trainings} >= {2, 3, 4}
    assert int(stages.poisoned().sum()) == poison_count(259, 20) + poison_count(260, 20)
