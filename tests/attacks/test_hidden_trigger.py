"""Hidden trigger: what poisons look like to people and to a frozen network, how they are paired, who is attacked."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from bbn_attacks.hidden_trigger import HiddenTrigger, pair_greedily
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from backdoor_bench_none.api import AttackTask, Context, DatasetInfo, ImageSet
from backdoor_bench_none.contracts.network import Pixels
from backdoor_bench_none.errors import ConfigError
from backdoor_bench_none.planning.plan import Plan
from backdoor_bench_none.planning.stage_table import record_key
from backdoor_bench_none.run.evaluation import evaluate

CLASSES = 5
SHARES = [30, 25, 20, 15, 10]
CONTEXT = Context(torch.device("cpu"), seed=0)


def make_info(size: int = 12, mean: float = 0.0, std: float = 1.0) -> DatasetInfo:
    return DatasetInfo("toy", (3, size, size), CLASSES, 100, (mean,) * 3, (std,) * 3)


def make_network(size: int = 12, features: int | None = None) -> nn.Module:
    """Features are the pixels themselves, or as many linear functions of them."""
    pixels = 3 * size**2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Linear(pixels, CLASSES)]
        if features is not None:
            layers = [nn.Linear(pixels, features), nn.Linear(features, CLASSES)]
        return nn.Sequential(nn.Flatten(), *layers).eval()


def make_task(
    size: int = 12, features: int | None = None, info: DatasetInfo | None = None, network: bool = True
) -> AttackTask:
    """Noise of 10 levels, brighter by 40 from class to class."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.repeat_interleave(torch.arange(CLASSES), torch.tensor(SHARES))
    labels = labels[torch.randperm(100, generator=generator)]
    images = torch.randint(30, 40, (100, 3, size, size), generator=generator) + 40 * labels[:, None, None, None]
    data = ImageSet(images.byte(), labels)
    info = make_info(size) if info is None else info
    return AttackTask(data, info, make_network(size, features) if network else None)


def make_attack(**params: Any) -> HiddenTrigger:
    given = {"source": 1, "target": 2, "class_rate": 0.5, "size": 4, "steps": 20, "lr": 0.01, "stop_at": 0}
    return HiddenTrigger(**{**given, **params})


def patches(attack: HiddenTrigger, images: Tensor, info: DatasetInfo, tolerance: int = 0) -> Tensor:
    """How many windows of each image are the patch."""
    tile = (attack.tile(info) * 255).round().int()
    side = tile.shape[-1]
    windows = images.int().unfold(2, side, 1).unfold(3, side, 1)  # (N, C, rows, columns, side, side)
    near = (windows - tile[:, None, None]).abs() <= tolerance
    return near.all(1).all(-1).all(-1).flatten(1).sum(1)


def distances_of(network: nn.Module, moved: Tensor, wanted: Tensor) -> Tensor:
    """Squared, between the features of all pairs of images, for unnormalised pixels."""
    features = [network[:2](images / 255).detach().double() for images in (moved, wanted)]
    return torch.cdist(*features).square()


# what the poisons are


@pytest.mark.parametrize(("size", "side"), [(12, 4), (40, 30)])
@pytest.mark.parametrize("rule", ["gradient", "sign"])
def test_oracle_1_poisons_look_like_the_target_class(size: int, side: int, rule: str) -> None:
    task = make_task(size, features=8)
    images, labels = task.data.images.clone(), task.data.labels.clone()
    attack = make_attack(size=side, rule=rule, lr=0.5)
    poisoned = attack.poison(task, CONTEXT)
    assert len(poisoned.indices.unique()) == len(poisoned) == 10
    assert labels[poisoned.indices].eq(2).all()
    assert poisoned.labels.eq(2).all()
    assert poisoned.images.dtype == torch.uint8
    delta = poisoned.images.int() - images[poisoned.indices]
    assert delta.abs().max() <= 16
    assert delta.flatten(1).any(1).all()
    assert patches(attack, poisoned.images, task.info).eq(0).all()
    assert patches(attack, attack.attack_test(task, CONTEXT).images, task.info).eq(1).all()  # it can be found
    replaced = poisoned.replace(task.data)
    changed = (replaced.images != images).flatten(1).any(1)
    assert torch.nonzero(changed).flatten().tolist() == poisoned.indices.tolist()
    assert torch.equal(replaced.labels, labels)
    assert torch.equal(task.data.images, images)


@settings(deadline=None, max_examples=15)
@given(epsilon=st.floats(0, 255), lr=st.floats(1e-3, 10), rule=st.sampled_from(["gradient", "sign"]))
def test_oracle_1_perturbation_stays_within_any_bound(epsilon: float, lr: float, rule: str) -> None:
    task = make_task(features=8)
    poisoned = make_attack(epsilon=epsilon, lr=lr, rule=rule, steps=5).poison(task, CONTEXT)
    assert (poisoned.images.int() - task.data.images[poisoned.indices].int()).abs().max() <= epsilon


@pytest.mark.parametrize("rule", ["gradient", "sign"])
def test_oracle_2_feature_distance_falls(rule: str) -> None:
    task = make_task(features=8)
    network, data = task.network, task.data
    assert network is not None
    images, source = (data.images[data.labels == label][:15] for label in (2, 1))
    patched = make_attack().stamp(source, torch.arange(15), task.info, 3)
    lr = {"gradient": 0.05, "sign": 0.002}[rule]
    totals = []
    for steps in (0, 3, 6, 12, 24):
        moved = make_attack(steps=steps, rule=rule, lr=lr).optimise(network, images, patched, task, CONTEXT)
        squared = distances_of(network, moved, patched)
        totals.append(float(squared[torch.arange(15), pair_greedily(squared)].sum()))
    assert all(later < earlier for earlier, later in itertools.pairwise(totals))
    assert totals[-1] < totals[0] / 1.5


def test_it_stops_once_every_pair_is_near_enough() -> None:
    task = make_task(features=8)
    network, data = task.network, task.data
    assert network is not None
    images, source = (data.images[data.labels == label][:15] for label in (2, 1))
    patched = make_attack().stamp(source, torch.arange(15), task.info, 3)
    start = distances_of(network, images, patched)
    largest = float(start[torch.arange(15), pair_greedily(start)].max())

    def move(**params: Any) -> Tensor:
        return make_attack(lr=0.05, **params).optimise(network, images, patched, task, CONTEXT)

    assert torch.equal(move(stop_at=1.1 * largest), images)
    moved = move(stop_at=0.9 * largest)
    assert not torch.equal(moved, images)
    assert torch.equal(moved, move(stop_at=0.9 * largest, steps=40))


# pairing


def greedy_by_hand(distances: list[list[float]]) -> list[int]:
    """All pairs in ascending order, each taken if row and column are free."""
    size = len(distances)
    chosen: dict[int, int] = {}
    for row, column in sorted(itertools.product(range(size), repeat=2), key=lambda pair: distances[pair[0]][pair[1]]):
        if row not in chosen and column not in chosen.values():
            chosen[row] = column
    return [chosen[row] for row in range(size)]


def test_oracle_3_pairing_by_hand() -> None:
    # each row's nearest, and striking out no more than the pair that is taken, would take the first column twice
    assert pair_greedily(torch.tensor([[1.0, 2, 9], [1.5, 3, 8], [4, 5, 20]])).tolist() == [0, 1, 2]
    assert pair_greedily(torch.tensor([[5.0, 1, 6], [7, 2, 3], [4, 8, 9]])).tolist() == [1, 2, 0]


@settings(deadline=None, max_examples=60)
@given(size=st.integers(1, 12), seed=st.integers(0, 2**32))
def test_oracle_3_pairing_is_a_permutation_and_that_of_brute_force(size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    distances = torch.randperm(size**2, generator=generator).view(size, size).float()
    pairs = pair_greedily(distances)
    assert sorted(pairs.tolist()) == list(range(size))
    assert pairs.tolist() == greedy_by_hand(distances.tolist())
    rows, columns = (torch.randperm(size, generator=generator) for _ in range(2))
    shuffled = pair_greedily(distances[rows][:, columns])
    assert torch.equal(columns[shuffled], pairs[rows])


@settings(deadline=None, max_examples=40)
@given(size=st.integers(1, 8), seed=st.integers(0, 2**32), few=st.integers(1, 3))
def test_oracle_3_ties_leave_it_a_permutation(size: int, seed: int, few: int) -> None:
    distances = torch.randint(0, few, (size, size), generator=torch.Generator().manual_seed(seed)).float()
    before = distances.clone()
    assert sorted(pair_greedily(distances).tolist()) == list(range(size))
    assert torch.equal(distances, before)


# known answers for features that are the pixels


@pytest.mark.parametrize(("mean", "std", "lr"), [(0, 1, 0.25), (0.4, 0.5, 0.0625)])
def test_oracle_4_without_a_bound_poisons_become_the_patched_sources(mean: float, std: float, lr: float) -> None:
    task = make_task(info=make_info(mean=mean, std=std))
    attack = make_attack(epsilon=255, steps=60, lr=lr)
    data = task.data
    assert task.network is not None
    images, source = (data.images[data.labels == label][:15] for label in (2, 1))
    patched = attack.stamp(source, torch.arange(15), task.info, 3)
    moved = attack.optimise(task.network, images, patched, task, CONTEXT)
    near = (moved[:, None].int() - patched[None].int()).abs().flatten(2).amax(2) <= 1  # truncated
    assert near.sum(0).tolist() == near.sum(1).tolist() == [1] * 15


def test_oracle_4_sources_are_images_of_the_source_class_with_the_patch_at_random_places() -> None:
    task = make_task()
    attack = make_attack(epsilon=255, steps=60, lr=0.25, class_rate=1)
    poisoned = attack.poison(task, CONTEXT)
    assert patches(attack, poisoned.images, task.info, tolerance=1).eq(1).all()
    strange = (poisoned.images < 70) | (poisoned.images > 80)  # truncated, from the target's 110 on down
    assert strange.flatten(1).sum(1).le(3 * 4**2).all()
    outside = (poisoned.images[:, None].int() - task.data.images[task.data.labels == 1].int()).abs() <= 1
    origin = outside.flatten(2).double().mean(2).argmax(1)
    assert len(origin.unique()) == len(poisoned) == 20  # one to one
    assert len(torch.unique((poisoned.images > 80).any(1).flatten(1), dim=0)) > 10


@pytest.mark.parametrize("nothing", [{"epsilon": 0}, {"steps": 0}])
def test_oracle_4_no_bound_and_no_steps_change_nothing(nothing: dict[str, int]) -> None:
    task = make_task()
    poisoned = make_attack(**nothing).poison(task, CONTEXT)
    assert torch.equal(poisoned.images, task.data.images[poisoned.indices])


def test_steps_along_the_sign_are_halved() -> None:
    task = make_task()
    assert task.network is not None
    images, patched = torch.full((1, 3, 12, 12), 100).byte(), torch.full((1, 3, 12, 12), 200).byte()
    # 4.3; 4.3 + 2.15; 4.3 + 2.15 + 1.075; 4.3 + 4.3; 4.3 + 4.3 + 2.15; truncated
    for steps, halve_every, level in ((1, 1, 104), (2, 1, 106), (3, 1, 107), (2, 2, 108), (3, 2, 110)):
        attack = make_attack(steps=steps, halve_every=halve_every, rule="sign", lr=4.3 / 255, epsilon=255)
        assert attack.optimise(task.network, images, patched, task, CONTEXT).eq(level).all()


def test_nothing_is_warned_of() -> None:
    """Torch says many things once in a process; warnings are errors here."""
    torch.set_warn_always(True)
    try:
        make_attack(steps=2).poison(make_task(features=8), CONTEXT)
    finally:
        torch.set_warn_always(False)


def test_poison_is_a_function_of_the_seed_alone() -> None:
    task = make_task(features=8)
    torch.manual_seed(1)
    first = make_attack().poison(task, CONTEXT)
    torch.manual_seed(2)
    again = make_attack().poison(task, CONTEXT)
    assert torch.equal(first.indices, again.indices)
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.indices, make_attack().poison(task, replace(CONTEXT, seed=1)).indices)


# who is attacked


def test_oracle_6_only_the_source_class_is_attacked() -> None:
    task = make_task(network=False)
    attack = make_attack()
    triggered = attack.attack_test(task, CONTEXT)
    assert triggered.indices.tolist() == torch.nonzero(task.data.labels == 1).flatten().tolist()
    assert triggered.labels.eq(2).all()
    changed = (triggered.images != task.data.images[triggered.indices]).any(1)
    assert patches(attack, triggered.images, task.info).eq(1).all()
    assert changed.flatten(1).sum(1).le(16).all()
    assert len(torch.unique(changed.flatten(1), dim=0)) > 10
    assert torch.equal(triggered.images, attack.preview(task, CONTEXT)[triggered.indices])


class Bright(nn.Module):
    """Says the target class to images whose patch begins in the upper half."""

    def forward(self, images: Tensor) -> Tensor:
        upper = images[:, :, :6].amax((1, 2, 3)) > 0.4
        return nn.functional.one_hot(torch.where(upper, 2, 0), CLASSES).float()


def test_oracle_6_success_is_a_multiple_of_one_over_the_source_images() -> None:
    task = make_task(network=False)
    triggered = make_attack().attack_test(task, CONTEXT)
    counts = evaluate(Bright(), task.data, [triggered], Pixels.of(task.info, CONTEXT.device), CONTEXT)[0]
    hits = int((triggered.images[:, :, :6].amax((1, 2, 3)) > 0.4 * 255).sum())
    assert 0 < hits < 25
    assert counts.attack_success_rate is not None
    assert (counts.attack_success_rate.hits, counts.attack_success_rate.total) == (hits, 25)


# parameters and bad input


@pytest.mark.parametrize(
    ("size", "given", "wanted"),
    [(224, {}, (1, 0, 30)), (32, {"target": 4}, (0, 4, 4)), (8, {"target": 3, "source": 0, "size": 2}, (0, 3, 2)),
     (2, {"target": 1}, (2, 1, 1))],
)  # fmt: skip
def test_defaults_for_a_data_set(size: int, given: dict[str, int], wanted: tuple[int, int, int]) -> None:
    resolved = HiddenTrigger(**given).resolve(make_info(size))
    resolved.check(make_info(size))
    assert (resolved.source, resolved.target, resolved.size) == wanted
    assert resolved.resolve(make_info(size)) == resolved


@pytest.mark.parametrize(
    "params",
    [{"class_rate": 0}, {"class_rate": 1.01}, {"epsilon": -1}, {"epsilon": 256}, {"steps": -1}, {"lr": 0}, {"size": 0},
     {"rule": "adam"}, {"source": -1}, {"target": -1}, {"halve_every": 0}, {"label_mode": "all_to_all"},
     {"label_mode": "all_to_one"}, {"poison_rate": 0.1}],
)  # fmt: skip
def test_parameters_are_checked(params: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        HiddenTrigger(**params)


def test_too_few_source_images_are_an_error() -> None:
    with pytest.raises(ConfigError, match=r"(?s)20 pairs, but 10 source images.*lower class_rate"):
        make_attack(source=4, class_rate=1).poison(make_task(), CONTEXT)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ("source: 3, target: 3", "source and target are both class 3"),
        ("source: 0", "source and target are both class 0"),  # the target of digits
        ("source: 10", "source 10 is not a class of digits"),
        ("target: 10", "target 10 is not a class of digits; its classes are 0 to 9"),
        ("size: 9", "a trigger of 9 pixels does not fit into 8x8 pixels"),
        ("class_rate: 0.003", "class_rate 0.003 selects none of the about 130 training images"),
        ("class_rate: 0", "class_rate: .*greater than 0"),
        ("class_rate: 1.5", "class_rate: .*less than or equal to 1"),
        (
            "label_mode: all_to_all",
            "label_mode: .*a clean-label attack changes no label, so it cannot be all_to_all",
        ),
    ],
)
def test_faults_are_found_when_planning(params: str, message: str, tiny_plan: Callable[..., Plan]) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_plan(attack=f"{{name: hidden_trigger, params: {{{params}}}}}", trainer="transfer")


def test_skipped_unless_the_backbone_is_frozen(tiny_plan: Callable[..., Plan]) -> None:
    plan = tiny_plan(attack="hidden_trigger, badnets", trainer="centralized, transfer, federated", defense="no_defense")
    reasons = {(cell.attack.name, cell.trainer.name): plan.skipped.get(record_key(cell)) for cell in plan.cells}
    refused = "hidden_trigger needs a trainer with a frozen backbone, such as transfer"
    assert reasons == {
        **{("badnets", trainer): None for trainer in ("centralized", "transfer", "federated")},
        ("hidden_trigger", "centralized"): refused,
        ("hidden_trigger", "transfer"): None,
        ("hidden_trigger", "federated"): refused,
    }
