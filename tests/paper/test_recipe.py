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
    ("nin", 1.0, "relu"), ("vgg11", 0.5, "relu"), ("vgg16", 0.5, "relu"), ("alexnet", 1.0, "relu"),
    *(("resnet18", 0.5, name) for name in ("relu", "leaky_relu", "elu", "tanhshrink", "softplus")),
]  # fmt: skip


@pytest.fixture(scope="module")
def cifar10() -> ImageSet:
    """The first 10,000 training images."""
    return CIFAR10(root=REAL, download=False).load()[0].take(torch.arange(IMAGES))


@pytest.mark.slow
@pytest.mark.skipif(
    not (REAL / "cifar-10-batches-py").is_dir(), reason="BBN_TEST_DATA names no folder with cifar-10-batches-py"
)
@pytest.mark.parametrize(("network", "width", "activation"), TRAINED)
def test_300_steps_learn(network: str, width: float, activation: str, cifar10: ImageSet) -> None:
    registry = Registry(Plugins(external=False))
    architecture = registry.create_as(Architecture, network, {"width": width})
    named = architecture.named_recipe("paper", activation)
    architecture = architecture.model_copy(update=dict(named.params))
    spec = ModelSpec(10, 3, 32, registry.create_as(Activation, activation, {}).build)
    model = ModelBuilder(architecture, spec, "initial", CPU.device)(0)
    recipe = Recipe(**{**named.fields, "epochs": EPOCHS})
    data = TrainingData.of(cifar10, CIFAR10().info(), CPU.device)
    history = Centralized().fit(FitTask(model, data, recipe), CPU)
    assert history.losses[-1] < LEARNED, history.losses
