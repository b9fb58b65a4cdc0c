"""A tiny defense task: three classes of striped 8x8 images, some of them poisoned, learnt within a second."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from pydantic import PrivateAttr
from torch import Tensor, nn

from backdoor_bench_none.api import (
    Architecture,
    Context,
    DatasetInfo,
    DefenseTask,
    FitTask,
    History,
    ImageSet,
    ModelSpec,
    Recipe,
    Trainer,
    TrainingData,
)
from backdoor_bench_none.contracts.builder import ModelBuilder
from backdoor_bench_none.models.resnet import ResNet18
from backdoor_bench_none.trainers.centralized import Centralized

CLASSES, SIDE, TARGET = 3, 8, 0
CPU = Context(torch.device("cpu"), 0)
INFO = DatasetInfo("stripes", (1, SIDE, SIDE), CLASSES, 150, (0.0,), (1.0,))
RECIPE = Recipe(epochs=4, batch_size=16, lr=0.05)
TRIGGER = torch.tensor([[255, 0, 255], [0, 255, 0], [255, 0, 255]], dtype=torch.uint8)


class RecordingTrainer(Trainer):
    """Trains as usual, or not at all, and writes down what it was asked."""

    really: bool = True
    _calls: list[FitTask] = PrivateAttr(default_factory=list)

    @property
    def calls(self) -> list[FitTask]:
        return self._calls

    def fit(self, task: FitTask, context: Context) -> History:
        self._calls.append(task)
        return Centralized().fit(task, context) if self.really else History([0.0])


@dataclass(frozen=True)
class TinyTask:
    """A task, the truth that it hides, and its trainer's record."""

    task: DefenseTask
    poisoned: Tensor  # (N,) bool
    calls: list[FitTask]


def draw_stripes(count: int, poisoned: int, seed: int = 0) -> tuple[ImageSet, Tensor]:
    """Images with two bright rows that tell their class, dim noise elsewhere; some bear the trigger and label 0."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    images = torch.randint(0, 40, (count, 1, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    for row in (0, 1):
        images[torch.arange(count), 0, 2 * labels + row, :4] += 180
    truth = torch.zeros(count, dtype=torch.bool)
    truth[torch.randperm(count, generator=generator)[:poisoned]] = True
    images[truth, :, -3:, -3:] = TRIGGER
    return ImageSet(images, torch.where(truth, TARGET, labels)), truth


MakeTask = Callable[..., TinyTask]


@pytest.fixture
def make_task() -> MakeTask:
    """Builds a task; by default the victim is a small residual network with batch norm, trained on poisoned stripes.

    Keywords: `train` and `poisoned` (N,) bool, `architecture`, `weights` of the victim, `clean`, `trains` (False: the
    trainer only records), and fields of the recipe.
    """

    def make(
        train: ImageSet | None = None,
        poisoned: Tensor | None = None,
        architecture: Architecture | None = None,
        weights: Mapping[str, Tensor] | None = None,
        clean: ImageSet | None = None,
        trains: bool = True,
        **recipe: Any,
    ) -> TinyTask:
        if train is None:
            train, poisoned = draw_stripes(150, 15)
        assert poisoned is not None
        trainer = RecordingTrainer(really=trains)
        changed = Recipe(**{**RECIPE.model_dump(), **recipe})
        spec = ModelSpec(CLASSES, 1, SIDE, nn.ReLU)
        builder = ModelBuilder(architecture or ResNet18(width=0.1), spec, "tiny", CPU.device)
        if weights is None:
            victim = builder(0)
            data = TrainingData.of(train, INFO, CPU.device)
            Centralized().fit(FitTask(victim, data, changed), CPU)
            weights = victim.state_dict()
        task = DefenseTask(
            train=train,
            clean=clean,
            info=INFO,
            recipe=changed,
            trainer=trainer,
            build=builder,
            victim_network=builder.load(weights) if weights else None,
        )
        return TinyTask(task, poisoned, trainer.calls)

    return make


@pytest.fixture
def stripes() -> Callable[..., tuple[ImageSet, Tensor]]:
    """Draws images and the truth about them: `stripes(count, poisoned, seed=0)`."""
    return draw_stripes


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
