"""`compile: true` changes how plain training is computed, and no result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bbn_defenses.dp_sgd import DPSGD
from bbn_defenses.nad import NAD
from torch import nn

from backdoor_bench_none.api import Batch, Context, Defense, FitTask, TrainingData, cross_entropy
from backdoor_bench_none.trainers.centralized import Centralized

CPU = Context(torch.device("cpu"), 0)


class Watched(nn.Module):
    """Stands for a compiled network, and counts its calls."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.calls = network, 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        logits: torch.Tensor = self.network(images)
        return logits


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Watched]:
    """The networks that are compiled from now on."""
    networks: list[Watched] = []

    def compile_(network: nn.Module) -> nn.Module:
        networks.append(Watched(network))
        return networks[-1]

    monkeypatch.setattr(torch, "compile", compile_)
    return networks


def own_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    return cross_entropy(model, batch)


def own_gradients(model: nn.Module, batch: Batch, context: Context) -> torch.Tensor:
    loss = cross_entropy(model, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def fit(make_task: Callable[..., Any], hooked: bool = False, compile_it: bool = True, **options: Any) -> nn.Module:
    task = make_task(compile=compile_it, epochs=2).task
    model: nn.Module = task.new_model()
    if hooked:
        next(model.children()).register_forward_hook(lambda *call: None)
    data = TrainingData.of(task.train, task.info, CPU.device)
    Centralized().fit(FitTask(model, data, task.recipe, **options), CPU)
    return model


def test_plain_training_runs_the_compiled_network(make_task: Callable[..., Any], compiled: list[Watched]) -> None:
    model = fit(make_task)
    assert compiled[-1].network is model
    assert compiled[-1].calls == 2 * (150 // 16)
    assert not isinstance(model, Watched)


@pytest.mark.parametrize("options", [{"loss": own_loss}, {"gradients": own_gradients}, {"hooked": True}], ids=" ".join)
def test_what_reads_more_than_the_output_is_not_compiled(
    make_task: Callable[..., Any], compiled: list[Watched], options: dict[str, Any]
) -> None:
    model = fit(make_task, **options)
    assert all(network.network is not model for network in compiled)


def test_only_what_the_recipe_asks_for_is_compiled(make_task: Callable[..., Any], compiled: list[Watched]) -> None:
    fit(make_task, compile_it=False)
    assert compiled == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "defense", [NAD(teacher_epochs=1, epochs=1, clean_fraction=0.3), DPSGD(epochs=1)], ids=["nad", "dp_sgd"]
)
def test_defenses_that_read_inside_run_with_it(
    make_task: Callable[..., Any],
    stripes: Callable[..., Any],
    defense: Defense,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda network: compile_(network, backend="eager"))
    clean, _ = stripes(40, 0, seed=1)
    plain, other = (
        defense.run(make_task(clean=clean, compile=chosen, epochs=1).task, CPU).model.state_dict()
        for chosen in (False, True)
    )
    assert all(torch.equal(plain[name], other[name]) for name in plain)
