"""Every built-in component runs on a pretended GPU: no devices are mixed, and no training step waits for the host."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from bbn_attacks.hidden_trigger import HiddenTrigger
from bbn_attacks.natural import Natural
from bbn_attacks.trojannet import all_patterns, train_steps
from bbn_attacks.trojannet_networks import SmallNetwork
from bbn_defenses.ac import AC
from bbn_defenses.none import NONE
from torch import Tensor, nn

from backdoor_bench_none.api import (
    Activation,
    Architecture,
    Batch,
    Component,
    Context,
    FitTask,
    History,
    ModelSpec,
    Recipe,
    choose_amp,
)
from backdoor_bench_none.leaderboard.weights import evaluate_weights
from backdoor_bench_none.models.mlp import MLP
from backdoor_bench_none.planning.stage_table import find_stage, needs_of
from backdoor_bench_none.registry.components import Registry
from backdoor_bench_none.registry.plugins import Plugins
from backdoor_bench_none.testing.bench import Bench, Undefended
from backdoor_bench_none.testing.checks import name_of, run_check
from backdoor_bench_none.testing.contracts import checks_for
from backdoor_bench_none.testing.pretend_cuda import pretend_cuda
from backdoor_bench_none.testing.pretended_device import Sightings
from backdoor_bench_none.trainers import centralized

REGISTRY = Registry(Plugins(external=False))
#: where the defaults take long, others
QUICK: Mapping[str, Mapping[str, Any]] = {
    "label_consistent": {"steps": 5, "crafter": {"width": 0.125, "epochs": 2, "steps": 2}},
    "hidden_trigger": {"steps": 5},
    "natural": {"areas": [0.05], "epochs": 2, "max_candidates": 2, "agreement": 0.1},
    "dba": {"malicious_epochs": 1},
    "trojannet": {"steps": 300},
    "dp_sgd": {"epochs": 1},
    "nad": {"teacher_epochs": 1, "epochs": 1},
    "fine_tune": {"epochs": 1},
    "fine_pruning": {"epochs": 1, "steps": 4},
    "none": {"epochs": 1},
    "none_robust": {"epochs": 1},
    "transfer": {"pretraining_epochs": 1},
    "federated": {"clients": 3},
    "vgg11": {"width": 0.05}, "vgg16": {"width": 0.05}, "alexnet": {"width": 0.05}, "nin": {"width": 0.05},
    "resnet18": {"width": 0.125}, "mlp": {"hidden": 16},
}  # fmt: skip


#: a network for cells in which another component matters
SMALL = MLP(hidden=16, depth=1)
#: with which every architecture learns something
GENTLE = Recipe(epochs=3, batch_size=32, lr=0.003, optimizer="adam", clip_norm=1.0)


@dataclass
class Gpu:
    """A bench on the pretended GPU, and what was seen there."""

    bench: Bench
    seen: Sightings

    def waits(self) -> int:
        """The waits and the copies from the host up to now, both of which stop the device."""
        return sum(self.seen.waits.values()) + sum(self.seen.copies.values())


@pytest.fixture(scope="module")
def opened() -> Iterator[Gpu]:
    with pretend_cuda(roots=["backdoor_bench_none/", "bbn_attacks/", "bbn_defenses/"]) as seen:
        yield Gpu(Bench("cuda"), seen)


@pytest.fixture
def gpu(opened: Gpu, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """The bench; every training in it is on the GPU, waits once in an epoch, and never in a step."""
    step, fit = centralized._step, centralized.Centralized._fit

    def watched_step(task: FitTask, network: nn.Module, batch: Batch, *rest: Any) -> Tensor:
        before = opened.waits()
        loss = step(task, network, batch, *rest)
        assert opened.waits() == before, f"a step waits for the host: {opened.seen.lap()}"
        assert loss.is_cuda
        assert batch.images.is_cuda
        return loss

    def watched_fit(self: centralized.Centralized, task: FitTask, context: Context) -> History:
        before = sum(opened.seen.waits.values())
        history = fit(self, task, context)
        given = 0 if task.keep is None or not task.keep.is_cuda else 1  # indices that come to the host
        assert sum(opened.seen.waits.values()) - before == task.recipe.epochs + given
        return history

    monkeypatch.setattr(centralized, "_step", watched_step)
    monkeypatch.setattr(centralized.Centralized, "_fit", watched_fit)
    opened.seen.lap()
    return opened


def create(kind: str, name: str, **params: Any) -> Component:
    return REGISTRY.create(kind, name, {**QUICK.get(name, {}), **params})


def evaluate(gpu: Gpu, **under_test: Component) -> None:
    record = gpu.bench.stages(**under_test).evaluate()
    assert record.counts is not None
    assert record.warnings == []


def all_of(kind: str, *quick: str) -> list[Any]:
    """The names of a kind of component; all but the quick ones are slow tests."""
    return [pytest.param(name, marks=[] if name in quick else pytest.mark.slow) for name in REGISTRY.names(kind)]


@pytest.mark.parametrize("name", all_of("attack", "badnets", "wanet"))
def test_attacks(gpu: Gpu, name: str) -> None:
    evaluate(gpu, attack=create("attack", name), architecture=SMALL)


@pytest.mark.parametrize("name", all_of("defense", "nad", "fine_tune"))
def test_defenses(gpu: Gpu, name: str) -> None:
    evaluate(gpu, defense=create("defense", name))


@pytest.mark.parametrize(
    "params",
    [
        {"procedure": "algorithm1", "min_gvf": 0.3, "lambda_z": 50.0},
        {"standardize": True, "released_quirks": True},
        {"standardize": "robust"},
    ],
)
@pytest.mark.slow
def test_procedures_of_none(gpu: Gpu, params: dict[str, Any]) -> None:
    evaluate(gpu, defense=create("defense", "none", **params))


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("dp_sgd", {"method": "loop"}),
        ("ac", {"rule": "reclassification"}),
        ("abl", {"isolation": "flooding", "reduction": "sample"}),
    ],
)
@pytest.mark.slow
def test_variants_of_defenses(gpu: Gpu, name: str, params: dict[str, Any]) -> None:
    evaluate(gpu, defense=create("defense", name, **params), architecture=SMALL)


@pytest.mark.parametrize("name", all_of("trainer", "centralized"))
def test_trainers(gpu: Gpu, name: str) -> None:
    evaluate(gpu, trainer=create("trainer", name), defense=create("defense", "abl"), architecture=SMALL)


@pytest.mark.parametrize("name", all_of("architecture", "mlp", "nin"))
def test_architectures(gpu: Gpu, name: str) -> None:
    stages = gpu.bench.stages(architecture=create("architecture", name))
    stages.cell = replace(stages.cell, recipe=GENTLE)
    assert stages.evaluate().counts is not None


@pytest.mark.parametrize("name", all_of("activation", "relu", "prelu"))
def test_activations(gpu: Gpu, name: str) -> None:
    evaluate(gpu, activation=create("activation", name), architecture=SMALL)


@pytest.mark.parametrize("name", REGISTRY.names("metric"))
def test_metrics(gpu: Gpu, name: str) -> None:
    assert verdicts_of(gpu, create("metric", name), "metric") == {"metric": ""}


def test_mixed_precision(gpu: Gpu) -> None:
    stages = gpu.bench.stages(architecture=SMALL)
    stages.context = replace(stages.context, amp=choose_amp(gpu.bench.device))
    assert stages.context.amp == torch.bfloat16
    assert stages.evaluate().counts is not None


# Loops that train nothing: the waits do not grow with the steps.


def waits_of(gpu: Gpu, stage: str, **under_test: Component) -> int:
    """The waits and copies of a stage whose needs are computed already."""
    stages = gpu.bench.stages(**under_test)
    for need in needs_of(find_stage(stage), stages.cell):
        stages.run(need.name)
    before = gpu.waits()
    stages.run(stage)
    return gpu.waits() - before


def test_hidden_trigger_waits_every_fifty_steps(gpu: Gpu) -> None:
    attacks = [HiddenTrigger(steps=steps, stop_at=0) for steps in (2, 20, 51)]
    few, some, many = (waits_of(gpu, "poison", attack=attack, architecture=SMALL) for attack in attacks)
    assert few == some == many - 1


@pytest.mark.slow
def test_trojannet_waits_every_hundred_steps(gpu: Gpu) -> None:
    network, context, known = SmallNetwork(3).to("cuda"), gpu.bench.context, all_patterns()[:3].to("cuda")
    optimizer = torch.optim.Adadelta(network.parameters())
    counts = []
    for steps in (10, 90, 110):
        before = gpu.waits()
        train_steps(network, known, steps, optimizer, context.generator(), context)
        counts.append(gpu.waits() - before)
    assert counts == [3, 3, 6]  # patches, noise and the loss


def test_a_search_for_natural_trojans_does_not_wait_in_its_steps(gpu: Gpu) -> None:
    attacks = [
        Natural(areas=(0.05,), epochs=2, max_candidates=1, agreement=0.1, searched_per_class=8, batch_size=size)
        for size in (24, 4)
    ]
    few, many = (waits_of(gpu, "search", attack=attack, architecture=SMALL) for attack in attacks)
    assert many == few > 0


def test_an_inspection_of_none_does_not_wait_for_each_class_and_layer(gpu: Gpu) -> None:
    gpu.seen.lap()
    waits_of(gpu, "defense", defense=NONE(epochs=0))
    waits = gpu.seen.lap()[0]
    # whether all scores are equal, and the scores themselves
    assert sum(count for (_, line), count in waits.items() if "compromised_neurons.py" in line) == 2


@pytest.mark.slow
def test_activation_clustering_brings_the_features_to_the_host_once(gpu: Gpu) -> None:
    waits_of(gpu, "victim", defense=AC(dimensions=3))
    gpu.seen.lap()
    waits_of(gpu, "defense", defense=AC(dimensions=3))
    copies = [count for (kind, line), count in gpu.seen.lap()[0].items() if "/ac.py" in line and "copy" in kind]
    assert sum(copies) == 2  # the labels too


# What the networks of a defense and of a leaderboard are.


def test_new_networks_leave_the_random_numbers_of_a_defense_alone(gpu: Gpu) -> None:
    task = gpu.bench.stages().defense_task()
    torch.manual_seed(5)
    before = torch.cuda.get_rng_state()
    task.new_model(1)
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_submitted_weights_of_a_joined_network_are_evaluated(gpu: Gpu) -> None:
    parts: dict[str, Component] = {
        "attack": create("attack", "trojannet"), "defense": create("defense", "fine_tune"), "architecture": SMALL,
    }  # fmt: skip
    stages = gpu.bench.stages(**parts)
    record = stages.evaluate()
    counts, _ = evaluate_weights(gpu.bench.stages(**parts), stages.defense().tensors)
    assert counts == record.counts


class Rescales(Undefended):
    """A defense that puts a layer with weights on the CPU before the victim."""

    def adapt(self, model: nn.Module) -> nn.Module:
        """The network behind a norm."""
        return nn.Sequential(nn.BatchNorm2d(3), model)


def test_what_an_attack_or_a_defense_adds_to_a_network_is_on_the_device(gpu: Gpu) -> None:
    trojan = gpu.bench.stages(attack=create("attack", "trojannet"), architecture=SMALL)
    networks = {
        "of an attack": trojan.victim_network(),
        "of a defense": gpu.bench.stages(defense=Rescales(), architecture=SMALL).defended_shell(),
    }
    for name, network in networks.items():
        assert all(tensor.is_cuda for tensor in (*network.parameters(), *network.buffers())), name


# The contract kit.


@pytest.mark.parametrize("name", ["abl", "dp_sgd", "group_norm", "oracle_filter"])
@pytest.mark.slow
def test_defenses_that_build_networks_leave_the_generators_alone(gpu: Gpu, name: str) -> None:
    verdicts = verdicts_of(gpu, create("defense", name), "global_state_left_alone")
    assert verdicts == {"global_state_left_alone": ""}


def verdicts_of(gpu: Gpu, component: Component, *names: str) -> dict[str, str]:
    """Why checks fail, or are skipped, by name; "" for those that pass."""
    checks = [check for check in checks_for(component) if not names or name_of(check) in names]
    verdicts = [run_check(check, component, gpu.bench) for check in checks]
    return {verdict.check: verdict.reason or verdict.skipped for verdict in verdicts}


UNREPEATABLE = "two runs differ on cuda; run it on a CPU"


@pytest.mark.parametrize(
    ("kind", "name", "skipped"),
    [
        ("attack", "badnets", ()),
        ("attack", "hidden_trigger", ("deterministic",)),
        ("defense", "no_defense", ("deterministic", "ground_truth_not_used")),
        ("architecture", "nin", ()),
        ("activation", "softplus", ()),
        ("trainer", "centralized", ()),
    ],
)
@pytest.mark.slow
def test_the_checks_of_the_kit_pass_or_say_that_they_are_skipped(
    gpu: Gpu, kind: str, name: str, skipped: tuple[str, ...]
) -> None:
    verdicts = verdicts_of(gpu, create(kind, name))
    assert verdicts == {check: UNREPEATABLE if check in skipped else "" for check in verdicts}


class Positions(Architecture):
    """A network whose `forward` makes a tensor on the CPU, whatever the device of its input."""

    def build(self, spec: ModelSpec) -> nn.Module:
        return AddsPositions(MLP(hidden=8, depth=1).build(spec))


class AddsPositions(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        return logits + torch.arange(logits.shape[1])


class Shifted(Activation):
    """An activation function with a constant on the CPU."""

    def build(self) -> nn.Module:
        return Shift()


class Shift(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.by = torch.ones(8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.by


@pytest.mark.parametrize(("component", "check"), [(Positions(), "logits"), (Shifted(), "activation")])
def test_a_network_with_a_tensor_on_the_cpu_does_not_pass_on_a_gpu(gpu: Gpu, component: Component, check: str) -> None:
    checks = {name_of(each): each for each in checks_for(component)}
    assert run_check(checks[check], component, Bench()).reason == ""
    assert "two devices" in run_check(checks[check], component, gpu.bench).reason
