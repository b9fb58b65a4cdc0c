"""Every check of defenses, and one that breaks just what it looks at."""

from __future__ import annotations

import inspect
import random
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from backdoor_bench_none.api import Component, Context, Defense, DefenseResult, DefenseTask, OracleTask, Stage
from backdoor_bench_none.errors import DeadlineError
from backdoor_bench_none.run.stages import Stages
from backdoor_bench_none.testing.checks import COMPONENT_CHECKS, name_of
from backdoor_bench_none.testing.defense_checks import DEFENSE_CHECKS

Fault = Callable[[str, Component], str]
Returns = ClassVar[tuple[Literal["flagged", "scores", "infected"], ...]]


# the well-behaved


class Untrained(Defense):
    """Returns the initial network, which takes no time."""

    stage: ClassVar[Stage] = Stage.IN_TRAINING

    def run(self, task: DefenseTask, context: Context) -> DefenseResult:
        return DefenseResult(task.new_model())


class Good(Defense):
    """Trains, and drops what was learned best."""

    stage: ClassVar[Stage] = Stage.IN_TRAINING
    returns: Returns = ("flagged", "scores", "infected")

    def run(self, task: DefenseTask, context: Context) -> DefenseResult:
        model = task.new_model()
        task.fit(model, context, epochs=1)
        scores = -losses_of(model, task, context)
        flagged = scores > scores.quantile(0.9)
        return DefenseResult(model, flagged, scores, infected=bool(flagged.any()))


class GoodRepair(Defense):
    """Fine-tunes the victim on trusted images."""

    stage: ClassVar[Stage] = Stage.POST_TRAINING
    starts_from_victim: ClassVar[bool] = True

    clean_fraction: float = Field(0.1, gt=0, lt=1, description="share of the training set granted as trusted images")

    def run(self, task: DefenseTask, context: Context) -> DefenseResult:
        model = task.victim()
        task.fit(model, context, data=task.clean, epochs=1)
        return DefenseResult(model)


class GoodOracle(Untrained):
    """Is told which samples are poisoned, and says so."""

    sees_ground_truth: ClassVar[bool] = True
    returns: Returns = ("flagged",)

    def run(self, task: DefenseTask, context: Context) -> DefenseResult:
        assert isinstance(task, OracleTask)
        return DefenseResult(task.new_model(), task.poisoned)


def losses_of(model: nn.Module, task: DefenseTask, context: Context) -> Tensor:
    return F.cross_entropy(task.predict(model, context), task.train.labels, reduction="none")


# what is wrong with each


def running(run: Callable[[DefenseTask, Context], Any], base: type[Defense] = Untrained, **facts: Any) -> type[Defense]:
    """A defense that does this instead."""
    return type("Running", (base,), {"__module__": __name__, "run": lambda self, *given: run(*given), **facts})


def returning(base: type[Defense] = Untrained, says: tuple[str, ...] = (), **parts: Any) -> type[Defense]:
    """A defense that returns these parts, and says that it returns those of `says`."""
    return running(lambda task, context: DefenseResult(task.new_model(), **parts), base, returns=says)


class NoStage(Defense):
    def run(self, task: DefenseTask, context: Context) -> DefenseResult:
        return DefenseResult(task.new_model())


class RepairsNothing(Untrained):
    stage: ClassVar[Stage] = Stage.POST_TRAINING


class RepairsUnchanged(RepairsNothing):
    starts_from_victim: ClassVar[bool] = True


class NeverAsks(Untrained):
    starts_from_victim: ClassVar[bool] = True


@torch.no_grad()
def scaled(model: nn.Module, factor: float) -> DefenseResult:
    next(model.parameters()).mul_(factor)
    return DefenseResult(model)


def through_numpy(task: DefenseTask, context: Context) -> DefenseResult:
    task.train.labels.numpy()[:] = 0
    return DefenseResult(task.new_model())


def black_out(name: str) -> Callable[[DefenseTask, Context], DefenseResult]:
    def run(task: DefenseTask, context: Context) -> DefenseResult:
        getattr(task, name).images[:5] = 0
        return DefenseResult(task.victim() if task.victim_network else task.new_model())

    return run


def trains_the_victim_itself(task: DefenseTask, context: Context) -> DefenseResult:
    assert task.victim_network is not None
    return scaled(task.victim_network, 0.5)


def meddles(meddle: Callable[[], object]) -> Callable[[DefenseTask, Context], DefenseResult]:
    def run(task: DefenseTask, context: Context) -> DefenseResult:
        meddle()
        return DefenseResult(task.new_model())

    return run


def leaves_dtype(task: DefenseTask, context: Context) -> DefenseResult:
    model = task.new_model()
    torch.set_default_dtype(torch.float64)
    return DefenseResult(model)


# those that look where they must not


def callers() -> Iterator[object]:
    """The local variables of all callers."""
    frame = inspect.currentframe()
    while frame is not None:
        yield from frame.f_locals.values()
        frame = frame.f_back


def stages() -> Stages | None:
    return next((value for value in callers() if isinstance(value, Stages)), None)


def sneak_scores(task: DefenseTask, context: Context) -> DefenseResult:
    core = stages()
    scores = torch.zeros(len(task.train)) if core is None else core.poisoned().float()
    return DefenseResult(task.new_model(), scores=scores)


def sneak_indices(task: DefenseTask, context: Context) -> DefenseResult:
    flagged = torch.zeros(len(task.train), dtype=torch.bool)
    if (core := stages()) is not None:
        flagged[core.poison()[0].indices] = True
    return DefenseResult(task.new_model(), flagged)


def sneak_weights(task: DefenseTask, context: Context) -> DefenseResult:
    core = stages()
    return scaled(task.new_model(), 1.0 if core is None else float(core.poison()[0].indices.sum()))


def sneak_verdict(task: DefenseTask, context: Context) -> DefenseResult:
    core = stages()
    return DefenseResult(task.new_model(), infected=core is not None and int(core.poisoned()[:40].sum()) > 20)


# those that do not look at the clock


def goes_on(task: DefenseTask, context: Context) -> DefenseResult:
    model = task.new_model()
    with suppress(DeadlineError):
        task.fit(model, context)
    task.fit(model, replace(context, deadline=None), epochs=1)
    return DefenseResult(model)


def goes_on_for_ages(task: DefenseTask, context: Context) -> DefenseResult:
    model = task.new_model()
    for _ in range(1000):
        with suppress(DeadlineError):
            task.fit(model, context, epochs=1)
    return DefenseResult(model)


def loop_of_its_own(task: DefenseTask, context: Context) -> DefenseResult:
    model = task.new_model().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for images in task.train.images.float().split(48):
        optimizer.zero_grad()
        model(images / 255).square().mean().backward()
        optimizer.step()
    return DefenseResult(model)


# those that lose the order


def shuffled(task: DefenseTask, context: Context) -> DefenseResult:
    """What public code does most often: the scores are those of a shuffled loader."""
    order = torch.randperm(len(task.train), generator=context.generator("loader"))
    model = task.new_model()
    task.fit(model, context, epochs=1)
    scores = losses_of(model, replace(task, train=task.train.take(order)), context)
    return DefenseResult(model, scores > scores.median(), scores)


def shuffled_flags(task: DefenseTask, context: Context) -> DefenseResult:
    return DefenseResult(task.new_model(), shuffled(task, context).flagged)


def sorted_scores(task: DefenseTask, context: Context) -> DefenseResult:
    return DefenseResult(task.new_model(), scores=losses_of(task.new_model(), task, context).sort().values)


N = 240
#: check, a defense it catches, and what it says
CAUGHT: list[tuple[str, type[Defense], str]] = [
    ("stage", NoStage, r"declare stage: ClassVar\[Stage\]"),
    ("stage", RepairsNothing, "repairs a finished network .* does not ask for it; set starts_from_victim = True"),
    ("stage", NeverAsks, r"says starts_from_victim and never calls task.victim\(\)"),
    ("stage", running(lambda t, c: DefenseResult(t.victim())), "uses the victim without declaring it"),
    ("result_well_formed", running(lambda t, c: t.new_model()), "a defense returns a DefenseResult, not "),
    ("result_well_formed", running(lambda t, c: {"model": t.new_model()}), "a DefenseResult, not dict"),
    ("result_well_formed", running(lambda t, c: DefenseResult(nn.Linear(2, 2))), "override Defense.adapt"),
    ("result_well_formed", returning(scores=torch.zeros(N)), "scores is returned; `returns` says otherwise"),
    ("result_well_formed", returning(infected=False), "infected is returned; `returns` says otherwise"),
    ("result_well_formed", returning(says=("flagged",)), "flagged is not returned; `returns` says otherwise"),
    ("result_well_formed", returning(says=("flagged",), flagged=torch.zeros(N)), "flagged is torch.float32, not bool"),
    ("result_well_formed", returning(says=("flagged",), flagged=torch.arange(9) > 3), r"flagged has shape \(9,\)"),
    ("result_well_formed", returning(says=("scores",), scores=torch.zeros(N) / 0), "scores are not all finite"),
    ("result_well_formed", returning(extras={"found": torch.zeros(1)}), "extras hold a value that JSON cannot"),
    ("logits", running(lambda t, c: scaled(t.new_model(), float("nan"))), "logits are not all finite"),
    ("logits", running(lambda t, c: DefenseResult(nn.Identity())), r"the network gives \(60, 3, 16, 16\), not logits"),
    ("inputs_unchanged", running(black_out("train")), "changes task.train in place; change a clone"),
    ("inputs_unchanged", running(through_numpy), "changes task.train in place"),
    ("inputs_unchanged", running(black_out("clean"), GoodRepair), "changes task.clean in place"),
    ("inputs_unchanged", running(trains_the_victim_itself, GoodRepair), "changes the victim; "),
    ("deterministic", running(lambda t, c: scaled(t.new_model(), np.random.rand())), "return different weights"),
    ("deterministic", running(lambda t, c: scaled(t.new_model(), random.random())), "draw from context.generator"),
    ("deterministic", running(lambda t, c: DefenseResult(t.new_model(), scores=torch.from_numpy(np.random.rand(N)))),
     "two runs of one seed return different scores"),
    ("deterministic", running(lambda t, c: DefenseResult(t.new_model(), torch.from_numpy(np.random.rand(N) > 0.5))),
     "two runs of one seed return different flagged"),
    ("deterministic", running(lambda t, c: DefenseResult(t.new_model(), infected=random.random() > 0.5)),
     "two runs of one seed return different infected"),
    ("global_state_left_alone", running(meddles(lambda: torch.set_grad_enabled(False))), "whether gradients are comp"),
    ("global_state_left_alone", running(meddles(np.random.rand)), "numpy's global generator; use context.generator"),
    ("global_state_left_alone", running(meddles(random.random)), "Python's global generator"),
    ("global_state_left_alone", running(meddles(lambda: torch.rand(1))), "torch's global generator"),
    ("global_state_left_alone", running(meddles(lambda: torch.set_num_threads(2))), "the number of threads"),
    ("global_state_left_alone", running(leaves_dtype), "default type"),
    ("changes_network", running(lambda t, c: DefenseResult(t.victim()), RepairsUnchanged), "set `may_return_victim`"),
    ("ground_truth_not_used", running(sneak_scores), "depends on which samples core knows to be poisoned"),
    ("ground_truth_not_used", running(sneak_indices), "use only what the task holds"),
    ("ground_truth_not_used", running(sneak_weights), "depends on which samples core knows to be poisoned"),
    ("ground_truth_not_used", running(sneak_verdict), "depends on which samples core knows to be poisoned"),
    ("deadline", running(goes_on), "it trained after its deadline and did not stop"),
    ("deadline", running(goes_on_for_ages), r"continues training long after the deadline|trained and did not stop"),
    ("deadline", running(loop_of_its_own), r"train with task.fit, or call context.check_deadline\(\)"),
    ("order_of_samples", running(shuffled), r"equal images get different flagged: .* order of task.train"),
    ("order_of_samples", running(shuffled_flags), r"equal images get different flagged"),
    ("order_of_samples", running(sorted_scores), r"equal images get different scores: .*\(a shuffled loader\?\)"),
]  # fmt: skip


@pytest.mark.parametrize("index", range(len(CAUGHT)), ids=lambda index: f"{CAUGHT[index][0]}-{index}")
def test_what_is_wrong_is_caught_and_named(index: int, fault: Fault) -> None:
    check, defense, reason = CAUGHT[index]
    assert re.search(reason, fault(check, defense()))


@pytest.mark.parametrize("check", [name_of(check) for check in (*COMPONENT_CHECKS, *DEFENSE_CHECKS)])
@pytest.mark.parametrize("defense", [Untrained, Good, GoodRepair, GoodOracle])
def test_the_well_behaved_pass(defense: type[Defense], check: str, fault: Fault) -> None:
    assert fault(check, defense()) == ""


def test_there_is_a_wrong_one_for_every_check() -> None:
    assert {check for check, _, _ in CAUGHT} == {name_of(check) for check in DEFENSE_CHECKS}


def test_one_that_leaves_gradients_off_does_not_harm_the_next(fault: Fault) -> None:
    assert fault("deterministic", running(meddles(lambda: torch.set_grad_enabled(False)))()) == ""
    assert fault("deadline", Good()) == ""


def test_a_few_flags_say_nothing_of_their_order(fault: Fault) -> None:
    few = torch.arange(N) < 3
    assert fault("order_of_samples", returning(says=("flagged",), flagged=few)()) == ""
    assert "different flagged" in fault(
        "order_of_samples", returning(says=("flagged",), flagged=torch.arange(N) < 99)()
    )
