"""The checks of defenses."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from backdoor_bench_none.contracts.attack import PoisonedSamples
from backdoor_bench_none.contracts.defense import Defense, DefenseResult, DefenseTask, OracleTask, Stage
from backdoor_bench_none.contracts.network import Pixels, predict_logits, unwrap
from backdoor_bench_none.errors import DeadlineError
from backdoor_bench_none.run.checks import check_rebuilt, check_result, is_same_network
from backdoor_bench_none.run.stages import Stages
from backdoor_bench_none.testing.bench import Bench, mixed_order, weights_of
from backdoor_bench_none.testing.checks import (
    Check,
    disturbed,
    equal,
    left_alone,
    need_repeatable,
    require,
    same_weights,
)

#: with fewer flagged, or fewer not flagged samples, their order cannot be checked
FEW = 10


def _stages(defense: Defense, bench: Bench) -> Stages:
    return cast("Stages", bench.keep("stages", defense, lambda: bench.stages(defense=defense)))


def _run(defense: Defense, bench: Bench, task: DefenseTask | None = None, disturbance: int = 1) -> DefenseResult:
    """Run it as core does, with the other global generators in a state set by `disturbance`."""
    with disturbed(disturbance):
        torch.manual_seed(bench.context.seed)
        return defense.run(task or _stages(defense, bench).defense_task(), bench.context)


@dataclass(frozen=True)
class _Run:
    """A run of a defense, and what it did beside its result."""

    result: DefenseResult
    asked_for_victim: bool
    #: the sets of the task that it changed in place, by name
    changed_sets: list[str]
    changed_victim: bool


def _observed(defense: Defense, bench: Bench) -> _Run:
    """One run of the defense, which several checks look at."""
    return cast("_Run", bench.keep("run", defense, lambda: _observe(defense, bench)))


def _observe(defense: Defense, bench: Bench) -> _Run:
    given = _stages(defense, bench).defense_task()
    asked = []

    class Asking(type(given)):  # type: ignore[misc]
        def victim(self) -> nn.Module:
            asked.append(1)
            return cast("nn.Module", super().victim())

    task = Asking(**vars(given))
    sets = {"train": task.train, "clean": task.clean}
    before = {name: (data.images.clone(), data.labels.clone()) for name, data in sets.items() if data is not None}
    victim = None
    if task.victim_network is not None:
        victim = weights_of(task.victim_network)
    result = _run(defense, bench, task)
    changed = [
        name for name, (images, labels) in before.items()
        if not (torch.equal(sets[name].images, images) and torch.equal(sets[name].labels, labels))
    ]  # fmt: skip
    changed_victim = victim is not None and not same_weights(weights_of(task.victim_network), victim)
    return _Run(result, bool(asked), changed, changed_victim)


def _result(defense: Defense, bench: Bench) -> DefenseResult:
    """The result of the defense, computed once."""
    return _observed(defense, bench).result


def check_stage(defense: Defense, bench: Bench) -> None:
    """A repair asks for the victim, and a defense that declares `starts_from_victim` uses it."""
    require(isinstance(getattr(defense, "stage", None), Stage), "declare stage: ClassVar[Stage]")
    repairs = defense.stage is Stage.POST_TRAINING
    require(
        defense.starts_from_victim or not repairs,
        "it repairs a finished network (POST_TRAINING) and does not ask for it; set starts_from_victim = True",
    )
    require(
        _observed(defense, bench).asked_for_victim or not defense.starts_from_victim,
        "it says starts_from_victim and never calls task.victim(): its cost would include a training it does not use",
    )


def check_result_well_formed(defense: Defense, bench: Bench) -> None:
    """The result holds what the defense declares, with the right types and shapes, and a network core can rebuild."""
    result, stages = _result(defense, bench), _stages(defense, bench)
    check_result(result, len(stages.data()[0]))
    start = stages.victim_network() if defense.starts_from_victim else stages.builder(0)
    train, info = stages.poisoned_train(), stages.cell.info
    pixels = Pixels.of(info, bench.device)
    check_rebuilt(unwrap(result.model), defense.adapt(start), train.images, pixels, bench.context, "Defense.adapt")
    for name in ("flagged", "scores", "infected"):
        is_returned, is_declared = getattr(result, name) is not None, name in defense.returns
        require(is_returned or not is_declared, f"{name} is not returned; `returns` says otherwise")
        require(is_declared or not is_returned, f"{name} is returned; `returns` says otherwise")


def check_changes_network(defense: Defense, bench: Bench) -> None:
    """A repair that declares neither a detection nor `may_return_victim` returns another network than the victim."""
    if defense.stage is not Stage.POST_TRAINING or defense.returns or defense.may_return_victim:
        return
    stages = _stages(defense, bench)
    pixels = Pixels.of(stages.cell.info, bench.device)
    model, victim = unwrap(_result(defense, bench).model), stages.victim_network()
    same = is_same_network(model, victim, stages.poisoned_train().images, pixels, bench.context)
    require(not same, "the network it returned is the victim, unchanged; if that is right, set `may_return_victim`")


def check_logits(defense: Defense, bench: Bench) -> None:
    """The network gives finite logits (N, K)."""
    stages = _stages(defense, bench)
    test, info = stages.data()[1], stages.cell.info
    logits = predict_logits(_result(defense, bench).model, test.images, Pixels.of(info, bench.device), bench.context)
    shape = tuple(logits.shape)
    require(shape == (len(test), info.num_classes), f"the network gives {shape}, not logits (N, {info.num_classes})")
    require(bool(torch.isfinite(logits).all()), "the network's logits are not all finite")


def check_inputs_unchanged(defense: Defense, bench: Bench) -> None:
    """Training set, clean images and victim are not changed."""
    observed = _observed(defense, bench)
    changed = " and ".join(f"task.{name}" for name in observed.changed_sets)
    require(not changed, f"it changes {changed} in place; change a clone")
    require(not observed.changed_victim, "it changes the victim; task.victim() is a copy")


def check_deterministic(defense: Defense, bench: Bench) -> None:
    """On a CPU, equal seeds give equal results, in any state of the generators of numpy and Python."""
    need_repeatable(bench)
    first, second = _result(defense, bench), _run(defense, bench, disturbance=2)
    require(
        same_weights(weights_of(first.model), weights_of(second.model)),
        "two runs of one seed return different weights; draw from context.generator",
    )
    for name in ("flagged", "scores"):
        require(equal(getattr(first, name), getattr(second, name)), f"two runs of one seed return different {name}")
    require(first.infected == second.infected, "two runs of one seed return different infected")


def check_global_state_left_alone(defense: Defense, bench: Bench) -> None:
    """Generators, gradient mode and settings are not changed."""
    task = _stages(defense, bench).defense_task()
    with left_alone():
        defense.run(task, bench.context)


@dataclass
class _OtherTruth(Stages):
    """Stages that give a defense `task`, and hold another ground truth than the one it was made with."""

    task: DefenseTask | None = field(default=None, repr=False)

    def poison(self) -> tuple[PoisonedSamples, PoisonedSamples]:
        train, test = super().poison()
        others = torch.ones(len(self.data()[0]), dtype=torch.bool)
        others[train.indices] = False
        chosen = torch.nonzero(others).flatten()[: len(train)]
        return replace(train, indices=chosen), test

    def defense_task(self) -> DefenseTask:
        return self.task or super().defense_task()


def check_ground_truth_not_used(defense: Defense, bench: Bench) -> None:
    """The result does not change with the ground truth that core holds: the defense did not read it."""
    if defense.sees_ground_truth:
        return
    need_repeatable(bench)
    stages = _stages(defense, bench)
    task = stages.defense_task()
    require(not isinstance(task, OracleTask), "it is given the ground truth")
    others = cast("_OtherTruth", bench.stages(_OtherTruth, defense=defense))
    others.task = task
    with disturbed(1):
        results = [each._defend() for each in (stages, others)]
    same = results[0].meta["infected"] == results[1].meta["infected"]
    require(
        same and same_weights(results[0].tensors, results[1].tensors),
        "its result depends on which samples core knows to be poisoned; use only what the task holds",
    )


@contextmanager
def _count_training_steps(limit: int) -> Iterator[list[int]]:
    """Yield a list that grows with each forward pass of a layer in training; `AssertionError` beyond `limit`."""
    steps: list[int] = []

    def count(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ANN401
        if module.training and torch.is_grad_enabled() and isinstance(module, (nn.Linear, nn.Conv2d)):
            steps.append(1)
            require(len(steps) <= limit, "it continues training long after the deadline; call context.check_deadline()")

    handle = register_module_forward_hook(count)
    try:
        yield steps
    finally:
        handle.remove()


def check_deadline(defense: Defense, bench: Bench) -> None:
    """The defense stops after its deadline: one that trains checks it at least once per epoch."""
    task = _stages(defense, bench).defense_task()
    late = replace(bench.context, deadline=time.monotonic() - 1)
    layers = sum(isinstance(module, (nn.Linear, nn.Conv2d)) for module in task.new_model().modules())
    epochs = 3 * layers * max(1, len(task.train) // task.recipe.batch_size)
    with disturbed(1), _count_training_steps(limit=5 * epochs) as steps:
        torch.manual_seed(late.seed)
        try:
            defense.run(task, late)
        except DeadlineError:
            return
    require(
        not steps,
        "it trained after its deadline and did not stop; train with task.fit, or call context.check_deadline()",
    )


def check_order_of_samples(defense: Defense, bench: Bench) -> None:
    """`flagged` and `scores` are in the order of task.train: equal images get equal values at both positions."""
    result = _result(defense, bench)
    first, second = _twin_positions()
    for name in ("flagged", "scores"):
        values = getattr(result, name)
        if values is None:
            continue
        values = values.detach().cpu().double()
        # with a handful of flags, a single pair of which one is flagged decides the correlation
        if name == "scores" or FEW <= int(values.sum()) <= len(values) - FEW:
            require(
                _agreement(values[first], values[second]) > 0.5,
                f"equal images get different {name}: they are not in the order of task.train (a shuffled loader?)",
            )


def _twin_positions() -> tuple[Tensor, Tensor]:
    """The first and the second position (120,) of each training image."""
    positions = mixed_order().argsort(stable=True).reshape(-1, 2)
    return positions[:, 0], positions[:, 1]


def _agreement(one: Tensor, other: Tensor) -> float:
    """The rank correlation; 1 if all values are equal."""
    if torch.equal(one, other):
        return 1.0
    ranks = [_ranks(values) for values in (one, other)]
    return float(torch.nan_to_num(torch.corrcoef(torch.stack(ranks))[0, 1]))


def _ranks(values: Tensor) -> Tensor:
    below = (values[:, None] > values[None, :]).double().sum(1)
    not_above = (values[:, None] >= values[None, :]).double().sum(1)
    return (below + not_above) / 2


DEFENSE_CHECKS: tuple[Check, ...] = (
    check_stage, check_result_well_formed, check_changes_network, check_logits, check_inputs_unchanged,
    check_deterministic, check_global_state_left_alone, check_ground_truth_not_used, check_deadline,
    check_order_of_samples,
)  # fmt: skip
