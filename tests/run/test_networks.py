"""Networks that people bring: trained, or refused with a sentence that names what is in the way."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from bbn_defenses.dp_sgd import DPSGD
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from backdoor_bench_none.api import Architecture, ModelSpec, TrainingError
from backdoor_bench_none.testing.bench import Bench


def inputs(spec: ModelSpec) -> int:
    return spec.channels * spec.image_size**2


def perceptron(spec: ModelSpec, *, hidden: Callable[[nn.Module], nn.Module] = lambda layer: layer) -> nn.Sequential:
    layers = nn.Flatten(), hidden(nn.Linear(inputs(spec), 32)), spec.activation(), nn.Linear(32, spec.num_classes)
    return nn.Sequential(*layers)


class Twice(nn.Module):
    """Two layers that share their weights, or are one."""

    def __init__(self, spec: ModelSpec, *, one_layer: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(inputs(spec), 32), nn.Linear(32, 32), nn.Linear(32, 32)
        if one_layer:
            self.third = self.second
        self.third.weight = self.second.weight
        self.last = nn.Linear(32, spec.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.first(images.flatten(1)).relu()
        out: Tensor = self.last(self.third(self.second(hidden).relu()).relu())
        return out


class Members(nn.Module):
    """Has members that are no modules, and defines its last layer first."""

    def __init__(self, spec: ModelSpec, **members: Any) -> None:
        super().__init__()
        self.last, self.first = nn.Linear(32, spec.num_classes), nn.Linear(inputs(spec), 32)
        self.members = members

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.last(self.first(images.flatten(1)).relu())
        return out


def returning(change: Callable[[Tensor], Any]) -> Callable[[ModelSpec], nn.Module]:
    class Returning(Members):
        def forward(self, images: Tensor) -> Any:
            return change(super().forward(images))

    return Returning


def small_batches(spec: ModelSpec) -> nn.Module:
    """BatchNorm1d, which refuses a batch of one in training."""
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs(spec), 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3))


TRAINED: dict[str, Callable[[ModelSpec], nn.Module]] = {
    "tied weights": Twice,
    "a layer under two names": lambda spec: Twice(spec, one_layer=True),
    "weight norm": lambda spec: perceptron(spec, hidden=parametrizations.weight_norm),
    "spectral norm": lambda spec: perceptron(spec, hidden=parametrizations.spectral_norm),
    "orthogonal": lambda spec: nn.Sequential(
        nn.Flatten(), nn.Linear(inputs(spec), 32), nn.ReLU(), parametrizations.orthogonal(nn.Linear(32, 32)), nn.ReLU(),
        nn.Linear(32, spec.num_classes),
    ),
    "old spectral norm": lambda spec: perceptron(spec, hidden=nn.utils.spectral_norm),
    "a lambda": lambda spec: Members(spec, function=lambda x: x),
    "in place": lambda spec: nn.Sequential(
        nn.Flatten(), nn.Linear(inputs(spec), 32), nn.ReLU(inplace=True), nn.Linear(32, spec.num_classes)
    ),
    "dropout only": lambda spec: nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(inputs(spec), 3)),
    "the last layer first": Members,
    "BatchNorm1d": small_batches,
    "parallel": lambda spec: nn.DataParallel(Members(spec)),
    "compiled": lambda spec: torch.compile(Members(spec)),  # type: ignore[return-value]
}  # fmt: skip

REFUSED: dict[str, tuple[Callable[[ModelSpec], Any], str]] = {
    "a mapping": (returning(lambda logits: {"logits": logits}), "it returns a dict; return the logits alone"),
    "a tuple": (returning(lambda logits: (logits, logits)), "it returns a tuple; return the logits alone"),
    "a list": (returning(lambda logits: [logits]), "it returns a list"),
    "maps": (returning(lambda logits: logits[:, :, None, None]), r"\(2, 3, 1, 1\) for 2 images, not logits \(2, 3\)"),
    "one output": (returning(lambda logits: logits[:, :1]), r"returns \(2, 1\)"),
    "too many outputs": (lambda spec: perceptron(replace(spec, num_classes=1000)), r"\(2, 1000\)"),
    "nothing to train": (lambda spec: perceptron(spec).requires_grad_(False), "nothing can be trained"),
    "no module": (lambda spec: None, "build returned NoneType, not a torch"),
    "a lazy layer": (lambda spec: nn.Sequential(nn.Flatten(), nn.LazyLinear(3)), "its layer '1' is lazy"),
    "float64": (lambda spec: perceptron(spec).double(), r"its layer '1' is torch\.float64"),
    "half": (lambda spec: perceptron(spec).half(), r"its layer '1' is torch\.float16"),
}  # fmt: skip


def architecture(build: Callable[[ModelSpec], Any]) -> Architecture:
    class Brought(Architecture):
        """A network of the test."""

        def build(self, spec: ModelSpec) -> nn.Module:
            made: nn.Module = build(spec)
            return made

    return Brought()


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench()


@pytest.mark.parametrize("name", TRAINED)
def test_it_is_trained(name: str, bench: Bench) -> None:
    stages = bench.stages(architecture=architecture(TRAINED[name]))
    record = stages.evaluate()
    assert record.counts is not None
    assert record.counts.benign_accuracy.rate > 0.6  # of three classes
    again = stages.network().state_dict()
    victim = stages.victim().tensors
    assert {key: tensor.tolist() for key, tensor in again.items()} == {k: t.tolist() for k, t in victim.items()}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_before_it_is_trained(name: str, bench: Bench) -> None:
    build, reason = REFUSED[name]
    with pytest.raises(TrainingError, match=reason):
        bench.stages(architecture=architecture(build)).victim()


def test_what_cannot_be_copied(bench: Bench) -> None:
    stages = bench.stages(architecture=architecture(lambda spec: Members(spec, lock=threading.Lock())))
    with pytest.raises(TrainingError, match="the network cannot be copied: cannot pickle"):
        stages.defense()


@pytest.mark.parametrize("name", ["tied weights", "weight norm", "a lambda", "BatchNorm1d", "in place"])
def test_dp_sgd_trains_it_too(name: str, bench: Bench) -> None:
    record = bench.stages(architecture=architecture(TRAINED[name]), defense=DPSGD(epochs=1)).evaluate()
    assert record.counts is not None


def test_dp_sgd_refuses_a_layer_under_two_names(bench: Bench) -> None:
    twice = architecture(TRAINED["a layer under two names"])
    with pytest.raises(TrainingError, match="the layer 'second', also 'third', is used under two names"):
        bench.stages(architecture=twice, defense=DPSGD(epochs=1)).defense()
    assert bench.stages(architecture=twice, defense=DPSGD(epochs=1, method="loop")).evaluate().counts is not None
