"""A tiny defense task: three classes of striped 8x8 images, some of them poisoned, learnt within a second."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from pydantic import PrivateAttr
from torch import Tensor, nn

from backdoor_bench_none.api import (
    Context,
    DatasetInfo,
    DefenseTask,
    FitOptions,
    History,
    ImageSet,
    ModelSpec,
    Recipe,
    Trainer,
    TrainingData,
)
from backdoor_bench_none.models.resnet import ResNet18
from backdoor_bench_none.training import Centralized

CLASSES, SIDE, TARGET = 3, 8, 0
CPU = Context(torch.device("cpu"), 0)
INFO = DatasetInfo("stripes", (1, SIDE, SIDE), CLASSES, 150, (0.0,), (1.0,))
RECIPE = Recipe(epochs=4, batch_size=16, lr=0.05)
TRIGGER = torch.tensor([[255, 0, 255], [0, 255, 0], [255, 0, 255]], dtype=torch.uint8)


@dataclass(frozen=True)
class FitCall:
    """What a defense asked of the trainer."""

    model: nn.Module
    data: TrainingData
    recipe: Recipe
    options: FitOptions


class RecordingTrainer(Trainer):
    """Trains as usual, or not at all, and writes down what it was asked."""

    really: bool = True
    _calls: list[FitCall] = PrivateAttr(default_factory=list)

    @property
    def calls(self) -> list[FitCall]:
        return self._calls

    def fit(
        self, model: nn.Module, data: TrainingData, recipe: Recipe, context: Context, options: FitOptions
    ) -> History:
        self._calls.append(FitCall(model, data, recipe, options))
        return Centralized().fit(model, data, recipe, context, options) if self.really else History([0.0])


@dataclass
class TinyTask:
    """A task, the truth that it hides, and its trainer's record."""

    task: DefenseTask
    poisoned: Tensor  # (N,) bool
    victim: nn.Module
    trainer: RecordingTrainer
    context: Context = CPU
    new_models: list[int] = field(default_factory=list)

    @property
    def calls(self) -> list[FitCall]:
        """Every call of the trainer."""
        return self.trainer.calls

    def state(self) -> Mapping[str, Tensor]:
        """A copy of the victim's weights."""
        return {name: tensor.clone() for name, tensor in self.victim.state_dict().items()}


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


def build_small(draw: int = 0) -> nn.Module:
    """A small residual network with batch norm."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw)
        return ResNet18(width=0.1).build(ModelSpec(CLASSES, 1, SIDE, nn.ReLU))


MakeTask = Callable[..., TinyTask]


@pytest.fixture
def make_task() -> MakeTask:
    """Builds a task; keywords: `train` and `poisoned` (N,) bool, `victim`, `build`, `clean`, `trains` (False: the
    trainer only records), and fields of the recipe.
    """

    def make(
        train: ImageSet | None = None,
        poisoned: Tensor | None = None,
        victim: nn.Module | None = None,
        build: Callable[[int], nn.Module] = build_small,
        clean: ImageSet | None = None,
        trains: bool = True,
        **recipe: Any,
    ) -> TinyTask:
        if train is None:
            train, poisoned = draw_stripes(150, 15)
        assert poisoned is not None
        trainer = RecordingTrainer(really=trains)
        changed = Recipe(**{**RECIPE.model_dump(), **recipe})
        data = TrainingData.of(train, INFO, CPU.device)
        if victim is None:
            victim = build(0)
            Centralized().fit(victim, data, changed, CPU, FitOptions())
        drawn: list[int] = []

        def build_and_note(draw: int) -> nn.Module:
            drawn.append(draw)
            return build(draw)

        task = DefenseTask(train, clean, INFO, changed, trainer, build_and_note, lambda: victim)
        return TinyTask(task, poisoned, victim, trainer, new_models=drawn)

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
