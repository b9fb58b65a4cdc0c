"""The paper's recipe trains every network and activation function of the paper's tables, on real images of CIFAR-10."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch

from backdoor_bench_none.api import Context, FitTask, ImageSet, ModelSpec, Recipe, TrainingData
from backdoor_bench_none.contracts.architecture import Activation, Architecture
from backdoor_bench_none.contracts.builder import ModelBuilder
from backdoor_bench_none.data.torchvision_sets import CIFAR10
from backdoor_bench_none.registry.components import Registry
from backdoor_bench_none.registry.plugins import Plugins
from backdoor_bench_none.trainers.centralized import Centralized

REAL = Path(os.environ.get("BBN_TEST_DATA", "nowhere"))
CPU = Context(torch.device("cpu"), 0)
#: 78 steps of 128 images an epoch
IMAGES, EPOCHS = 10_000, 4
#: a loss that is not chance: 95 % of that of guessing among ten classes
LEARNED = 0.95 * math.log(10)
#: network, width, activation function: all of Tables 1 to 12
TRAINED = [
    ("nin", 1.0, "relu"), ("vgg11", 0.5, "relu"), ("vgg16", 0.5, "relu"),
    *(("resnet18", 0.5, name) for name in ("relu", "leaky_relu", "elu", "softplus")),
]  # fmt: skip
#: those that do not, with the mean losses of the epochs of a run (AMD EPYC, float32); 2.303 is chance
UNTRAINED = [
    ("alexnet", 1.0, "relu", (5.681, 2.304, 2.304, 2.304)),
    ("resnet18", 0.5, "tanhshrink", (2.442, 2.298, 2.251, 2.200)),
]
needs_cifar10 = pytest.mark.skipif(
    not (REAL / "cifar-10-batches-py").is_dir(), reason="BBN_TEST_DATA names no folder with cifar-10-batches-py"
)


@pytest.fixture(scope="module")
def cifar10() -> ImageSet:
    """The first 10,000 training images."""
    return CIFAR10(root=REAL, download=False).load()[0].take(torch.arange(IMAGES))


def train(network: str, width: float, activation: str, images: ImageSet) -> list[float]:
    """The mean losses of the epochs with the paper's recipe."""
    registry = Registry(Plugins(external=False))
    architecture = registry.create_as(Architecture, network, {"width": width})
    named = architecture.named_recipe("paper", activation)
    architecture = architecture.model_copy(update=dict(named.params))
    spec = ModelSpec(10, 3, 32, registry.create_as(Activation, activation, {}).build)
    model = ModelBuilder(architecture, spec, "initial", CPU.device)(0)
    recipe = Recipe(**{**named.fields, "epochs": EPOCHS})
    data = TrainingData.of(images, CIFAR10().info(), CPU.device)
    return Centralized().fit(FitTask(model, data, recipe), CPU).losses


@pytest.mark.slow
@needs_cifar10
@pytest.mark.parametrize(("network", "width", "activation"), TRAINED)
def test_300_steps_learn(network: str, width: float, activation: str, cifar10: ImageSet) -> None:
    losses = train(network, width, activation, cifar10)
    assert losses[-1] < LEARNED, losses


@pytest.mark.slow
@needs_cifar10
@pytest.mark.parametrize(("network", "width", "activation", "measured"), UNTRAINED)
def test_300_steps_are_not_enough(
    network: str, width: float, activation: str, measured: tuple[float, ...], cifar10: ImageSet
) -> None:
    """The last loss is that of the run noted above to 0.1, as far as CPUs differ, and finite."""
    losses = train(network, width, activation, cifar10)
    assert losses[-1] == pytest.approx(measured[-1], abs=0.1)
