"""Every check of components in general, and of those that are neither attack nor defense."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from bbn_attacks.clean import Clean
from pydantic import ConfigDict, Field, PrivateAttr, field_validator
from torch import Tensor, nn

from backdoor_bench_none.api import (
    Activation,
    Architecture,
    Attack,
    Component,
    Context,
    Dataset,
    DatasetInfo,
    Evaluation,
    FitTask,
    History,
    ImageSet,
    Metric,
    ModelSpec,
    Trainer,
)
from backdoor_bench_none.testing.bench import Stripes
from backdoor_bench_none.testing.checks import COMPONENT_CHECKS, name_of
from backdoor_bench_none.testing.network_checks import checks_of_kind
from backdoor_bench_none.trainers.centralized import Centralized

Fault = Callable[[str, Component], str]


# the well-behaved


class Net(Architecture):
    """Two convolutions and a linear layer."""

    def build(self, spec: ModelSpec) -> nn.Module:
        return nn.Sequential(*self.layers(spec))

    def layers(self, spec: ModelSpec) -> list[nn.Module]:
        inner, outer = self.scale(8), self.scale(16)
        return [
            nn.Conv2d(spec.channels, inner, 3, stride=2), spec.activation(), nn.Conv2d(inner, outer, 3, stride=2),
            spec.activation(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(outer, spec.num_classes),
        ]  # fmt: skip


class Leaky(Activation):
    """x, or x / 5."""

    slope: float = Field(0.2, description="slope below zero")

    def build(self) -> nn.Module:
        return nn.LeakyReLU(self.slope)


class Share(Metric):
    """The share of hits."""

    def compute(self, evaluation: Evaluation, context: Context) -> Mapping[str, float]:
        return {"share": float((evaluation.clean_predictions == evaluation.clean_labels).float().mean())}


# components in general


class Undocumented(Attack):
    pass


class NoSentence(Attack):
    """stamps something"""


class Bare(Leaky):
    """Has an undescribed parameter."""

    power: int = 1


class Lenient(Clean):
    """Takes any parameter."""

    model_config = ConfigDict(extra="ignore")


class Changeable(Clean):
    """Can be changed."""

    model_config = ConfigDict(frozen=False)


class Unpicklable(Clean):
    """Holds a function of its own."""

    _function: Callable[[int], int] = PrivateAttr(default_factory=lambda: lambda x: x)


class Drifting(Clean):
    """Adds one whenever it is made."""

    size: int = Field(1, description="a number that grows")

    @field_validator("size")
    @classmethod
    def _grow(cls, size: int) -> int:
        return size + 1


class Stateful(Clean):
    """Has an identity of its own each time."""

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "id": id(self)}


class NotJson(Clean):
    """Has an identity that JSON does not hold."""

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "mask": np.zeros(2)}


class Unrevised(Clean):
    """Begins to count at 0."""

    revision: ClassVar[int] = 0


# architectures


def building(change: Callable[[list[nn.Module], ModelSpec], list[nn.Module]]) -> type[Architecture]:
    """The good network, with other layers."""

    class Building(Net):
        def build(self, spec: ModelSpec) -> nn.Module:
            return nn.Sequential(*change(self.layers(spec), spec))

    return Building


def hard_coded(layers: list[nn.Module], spec: ModelSpec) -> list[nn.Module]:
    return [nn.ReLU() if index in (1, 3) else layer for index, layer in enumerate(layers)]


def mixed(layers: list[nn.Module], spec: ModelSpec) -> list[nn.Module]:
    return [*layers[:3], nn.ELU(), *layers[4:]]


def shared(layers: list[nn.Module], spec: ModelSpec) -> list[nn.Module]:
    return [*layers[:3], layers[1], *layers[4:]]


def pooled_head(layers: list[nn.Module], spec: ModelSpec) -> list[nn.Module]:
    """Two outputs of the last layer for each class."""
    return [*layers[:-1], nn.Linear(16, 2 * spec.num_classes), nn.AdaptiveAvgPool1d(spec.num_classes)]


class Unused(nn.Module):
    """A network with a layer that is never called."""

    def __init__(self, layers: list[nn.Module], idle: nn.Module, first: bool) -> None:
        super().__init__()
        parts = {"idle": idle, "body": nn.Sequential(*layers)}
        for name in parts if first else reversed(parts):
            self.add_module(name, parts[name])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.get_submodule("body")(x)
        return y


class TupleOutput(nn.Sequential):
    def forward(self, x: Tensor) -> Any:
        return (super().forward(x),)


class IgnoresWidth(Net):
    def scale(self, channels: int) -> int:
        return channels


class OwnSeed(Net):
    def build(self, spec: ModelSpec) -> nn.Module:
        torch.manual_seed(0)
        return super().build(spec)


class NumpySeed(Net):
    @torch.no_grad()
    def build(self, spec: ModelSpec) -> nn.Module:
        model = super().build(spec)
        next(model.parameters()).mul_(float(np.random.rand()))
        return model


class HeadFirst(Net):
    def build(self, spec: ModelSpec) -> nn.Module:
        *body, head = self.layers(spec)
        return _HeadFirst(head, nn.Sequential(*body))


class _HeadFirst(nn.Module):
    def __init__(self, head: nn.Module, body: nn.Module) -> None:
        super().__init__()
        self.head, self.body = head, body

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.body(x))
        return y


class Misspelt(Net):
    def recipe(self, dataset: str) -> Mapping[str, Any]:
        return {"learning_rate": 0.1}


# activations


def activating(build: Callable[[], Any]) -> type[Activation]:
    class Activating(Leaky):
        def build(self) -> Any:
            return build()

    return Activating


ONE = nn.ReLU()


# data sets, trainers, metrics


def loading(change: Callable[[ImageSet], ImageSet], which: int = 0) -> type[Dataset]:
    class Loading(Stripes):
        def load(self) -> tuple[ImageSet, ImageSet]:
            parts = list(super().load())
            parts[which] = change(parts[which])
            return parts[0], parts[1]

    return Loading


class TwoMeans(Stripes):
    def info(self) -> DatasetInfo:
        return replace(super().info(), mean=(0.2, 0.2))


class Restless(Stripes):
    def fingerprint(self) -> str:
        return str(np.random.rand())


def fitting(fit: Callable[[FitTask, Context], History]) -> type[Trainer]:
    class Fitting(Centralized):
        def fit(self, task: FitTask, context: Context) -> History:
            return fit(task, context)

    return Fitting


def does_not_train(task: FitTask, context: Context) -> History:
    return History([1.0] * task.recipe.epochs)


def trains_one_epoch(task: FitTask, context: Context) -> History:
    recipe = task.recipe.model_copy(update={"epochs": 1})
    return Centralized().fit(replace(task, recipe=recipe), context)


def stays_in_training(task: FitTask, context: Context) -> History:
    trains_one_epoch(task, context)
    task.model.train()
    return does_not_train(task, context)


def reseeds(task: FitTask, context: Context) -> History:
    torch.manual_seed(context.seed)
    return trains_one_epoch(task, context)


def computing(result: Callable[[Evaluation], Any]) -> type[Metric]:
    class Computing(Share):
        def compute(self, evaluation: Evaluation, context: Context) -> Any:
            return result(evaluation)

    return Computing


#: check, a component it catches, and what it says
CAUGHT: list[tuple[str, type[Component], str]] = [
    ("documented", Undocumented, "the class has no docstring; `bbn show` prints it"),
    ("documented", NoSentence, "docstring does not begin with a sentence: 'stamps something'"),
    ("fields_described", Bare, r"no description of power; write Field"),
    ("unknown_parameter_refused", Lenient, "an unknown parameter is accepted; keep extra='forbid'"),
    ("frozen", Changeable, "its parameters can be changed; keep frozen=True"),
    ("pickles", Unpicklable, "(PicklingError|AttributeError): Can't pickle"),
    ("pickles", building(hard_coded), "Can't pickle local object"),
    ("identity", Drifting, r"made again from its parameters as JSON it differs: Drifting\(size=3\)"),
    ("identity", Stateful, "two equal components have different identities"),
    ("identity", NotJson, "TypeError: .*not JSON serializable"),
    ("identity", Unrevised, "revision is 0, not a whole number from 1"),
    ("logits", building(lambda x, spec: [*x[:-1], nn.Linear(16, 3)]), r"logits have shape \(4, 3\) for 1 channels"),
    ("logits", building(lambda x, spec: [nn.Conv2d(3, 8, 3), *x[1:]]), "RuntimeError: .* but got 1 channels"),
    ("logits", building(lambda x, spec: [TupleOutput(*x)]), "returns tuple for 1 channels in training mode"),
    ("logits", building(lambda x, spec: [*x, nn.Threshold(9e9, float("inf"))]), "logits are not finite for 1 channels"),
    ("activation_used", building(hard_coded), "does not use spec.activation"),
    ("activation_used", building(mixed), r"also has ELU; use spec.activation\(\) everywhere"),
    ("activation_used", building(shared), r"is used several times, or never; call spec"),
    ("seeded", OwnSeed, "networks of different torch seeds have equal weights"),
    ("seeded", NumpySeed, "two networks of one torch seed have different weights"),
    ("width", IgnoresWidth, r"half the width leaves (\d+) of \1 parameters; use self.scale"),
    ("trains", building(lambda x, spec: [Unused(x, nn.BatchNorm2d(2), True)]), "without gradient: 0.idle.weight"),
    ("trains", building(pooled_head), r"does not \w+ the logits"),
    ("recipe", Misspelt, "ValidationError: .*learning_rate"),
    ("activation", activating(lambda: nn.ReLU(inplace=True)), "RuntimeError: .*in-place|writes into its input"),
    ("activation", activating(lambda: ONE), "build returns one module twice"),
    ("activation", activating(lambda: torch.relu), "build returned builtin_function_or_method"),
    ("activation", activating(lambda: nn.GLU()), r"shape \(2, 4, 8\) becomes \(2, 4, 4\)"),
    ("activation", activating(lambda: nn.Threshold(0, float("nan"))), "values or gradients are not finite"),
    ("dataset", loading(lambda s: s.take(torch.arange(9))), "there are 9 training images, info says 240"),
    ("dataset", loading(lambda s: replace(s, images=s.images / 255), 1), "test.images is torch.float32, not uint8"),
    ("dataset", loading(lambda s: replace(s, labels=s.labels.int())), "training.labels is torch.int32, not int64"),
    ("dataset", loading(lambda s: replace(s, labels=s.labels + 1), 1), "test.labels is not within 0 to 2"),
    ("dataset", loading(lambda s: s.take(torch.randperm(240))), "two calls of load return different images"),
    ("dataset", TwoMeans, "has 3 channels, 2 means and 3 deviations"),
    ("dataset", Restless, "the fingerprint changes from call to call"),
    ("trainer", fitting(does_not_train), "fit does not change the network"),
    ("trainer", fitting(trains_one_epoch), "1 losses, 4 epochs"),
    ("trainer", fitting(stays_in_training), "the network is left in training mode"),
    ("trainer", fitting(reseeds), "changes the state of torch's global generator"),
    ("metric", computing(lambda e: {"share": "high"}), "share is str, not a number"),
    ("metric", computing(lambda e: {1: 1.0}), "names are not strings"),
    ("metric", computing(lambda e: {"worst": float(e.triggered_predictions.max())}), "RuntimeError|IndexError"),
]  # fmt: skip


@pytest.mark.parametrize("index", range(len(CAUGHT)), ids=lambda index: f"{CAUGHT[index][0]}-{index}")
def test_what_is_wrong_is_caught_and_named(index: int, fault: Fault) -> None:
    check, component, reason = CAUGHT[index]
    assert re.search(reason, fault(check, component()), re.DOTALL)


GOOD: Mapping[str, Component] = {
    "architecture": Net(), "activation": Leaky(), "dataset": Stripes(), "trainer": Centralized(), "metric": Share(),
}  # fmt: skip
GENERAL = {name_of(check) for check in COMPONENT_CHECKS}
CHECKS = [
    (kind, name) for kind in GOOD for name in [*sorted(GENERAL), *(name_of(check) for check in checks_of_kind(kind))]
]


@pytest.mark.parametrize(("kind", "check"), CHECKS)
def test_the_well_behaved_pass(kind: str, check: str, fault: Fault) -> None:
    assert fault(check, GOOD[kind]) == ""


def test_there_is_a_wrong_one_for_every_check() -> None:
    assert {check for check, _, _ in CAUGHT} == {check for _, check in CHECKS}


def test_a_fixed_width_is_allowed(fault: Fault) -> None:
    class Rigid(Net):
        """Comes in one width."""

        width: float = Field(1.0, ge=1, le=1, description="always 1")

    assert fault("width", Rigid()) == ""


def test_named_layers_and_batch_normalisation_pass(fault: Fault) -> None:
    class Named(Net):
        def build(self, spec: ModelSpec) -> nn.Module:
            body, norm = self.layers(spec), nn.BatchNorm2d(self.scale(16))
            return nn.Sequential(OrderedDict(body=nn.Sequential(*body[:4], norm, *body[4:-1]), head=body[-1]))

    for check in ("logits", "activation_used", "seeded", "width", "trains"):
        assert fault(check, Named()) == ""


def test_the_order_in_which_layers_are_defined_does_not_matter(fault: Fault) -> None:
    for check in ("logits", "activation_used", "seeded", "width", "trains"):
        assert fault(check, HeadFirst()) == ""
