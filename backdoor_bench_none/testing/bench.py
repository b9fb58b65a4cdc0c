"""A bench that runs one component in core's own stages, on three classes of striped images that are learned quickly.

The data are synthetic on purpose: each training image occurs twice, and a defense must treat both alike.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from backdoor_bench_none.contracts.attack import TriggerAttack
from backdoor_bench_none.contracts.cell import Cell
from backdoor_bench_none.contracts.component import Choice, Component
from backdoor_bench_none.contracts.context import Context
from backdoor_bench_none.contracts.dataset import Dataset, DatasetInfo, ImageSet
from backdoor_bench_none.contracts.defense import Defense, DefenseResult, DefenseTask, Stage
from backdoor_bench_none.contracts.recipe import Recipe
from backdoor_bench_none.contracts.trigger import Trigger, place, solid_tile
from backdoor_bench_none.models.activations import ReLU
from backdoor_bench_none.models.resnet import ResNet18
from backdoor_bench_none.results.store import Store
from backdoor_bench_none.run.devices import prepare_device
from backdoor_bench_none.run.stages import Stages
from backdoor_bench_none.seeds import derive_seed
from backdoor_bench_none.trainers.centralized import Centralized
from backdoor_bench_none.trainers.federated import Federated
from backdoor_bench_none.trainers.transfer import Transfer

CLASSES, SIDE, PAIRS, TESTS = 3, 16, 120, 60
RECIPE = Recipe(epochs=4, batch_size=32, lr=0.1)


class Stripes(Dataset):
    """Three classes of noisy colour images, told apart by the height of bright rows; training images occur twice."""

    def info(self) -> DatasetInfo:
        """240 training and 60 test images (3, 16, 16)."""
        return DatasetInfo(
            "stripes", (3, SIDE, SIDE), CLASSES, 2 * PAIRS, (0.2,) * 3, (0.25,) * 3, paper_trigger="static"
        )

    def files(self) -> list[Path]:
        """None, since the images are generated."""
        return []

    def fingerprint(self) -> str:
        """The sha256 of the images."""
        digest = hashlib.sha256()
        for part in self.load():
            digest.update(part.images.numpy().tobytes())
            digest.update(part.labels.numpy().tobytes())
        return digest.hexdigest()

    def load(self) -> tuple[ImageSet, ImageSet]:
        """The training set in a mixed order, and the test set."""
        return draw_stripes(PAIRS).take(mixed_order()), draw_stripes(TESTS, "test")


def draw_stripes(count: int, purpose: str = "train") -> ImageSet:
    """`count` different images, whose classes alternate."""
    generator = torch.Generator().manual_seed(derive_seed("stripes", purpose))
    labels = torch.arange(count) % CLASSES
    images = torch.randint(0, 60, (count, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    for row in range(4):
        images[torch.arange(count), :, 5 * labels + row, :8] += 150
    return ImageSet(images, labels)


def mixed_order() -> Tensor:
    """(240,) int64: the image at each position of the training set, in which each of the 120 images occurs twice."""
    generator = torch.Generator().manual_seed(derive_seed("stripes", "order"))
    return torch.randperm(2 * PAIRS, generator=generator) % PAIRS


class Patch(TriggerAttack):
    """A white 4x4 patch in the lower right corner; poisons pairs of equal images."""

    def trigger(self, info: DatasetInfo) -> Trigger:
        """The patch."""
        return place(info.shape, solid_tile(4, (255, 255, 255), info.shape[0]), -1, -1)

    def select(self, labels: Tensor, seed: int) -> Tensor:
        """Both positions of some images."""
        drawn = torch.randperm(PAIRS, generator=torch.Generator().manual_seed(seed))
        return torch.nonzero(torch.isin(mixed_order(), drawn[: round(self.poison_rate * PAIRS)])).flatten()


class Undefended(Defense):
    """The network as the attack left it."""

    stage: ClassVar[Stage] = Stage.POST_TRAINING
    starts_from_victim: ClassVar[bool] = True

    def run(self, task: DefenseTask, context: Context) -> DefenseResult:
        """The victim."""
        return DefenseResult(task.victim())


class Bench:
    """Makes cells with one component under test; the others are from core or this module.

    Stages are kept in a temporary folder, which is removed with the bench.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = torch.device(device)
        prepare_device(self.device)
        self._folder = tempfile.mkdtemp(prefix="bbn-bench-")
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._kept: dict[tuple[str, type, str], Any] = {}
        self._classes: dict[str, list[type]] = {}

    @cached_property
    def context(self) -> Context:
        """The device in float32, seed 0, no deadline."""
        return Context(self.device, 0)

    def cell(self, **under_test: Component) -> Cell:
        """A cell with these components by axis, and a trainer that fits the attack."""
        chosen: dict[str, Component] = {
            "dataset": Stripes(), "attack": Patch(poison_rate=0.15), "defense": Undefended(),
            "architecture": ResNet18(width=0.125), "activation": ReLU(), **under_test,
        }  # fmt: skip
        dataset = cast("Dataset", chosen["dataset"])
        attack = cast("Any", chosen["attack"])
        if "trainer" not in chosen:
            chosen["trainer"] = Centralized()
            if attack.needs_backbone:
                chosen["trainer"] = Transfer(pretraining_epochs=1)
            elif attack.needs_clients:
                chosen["trainer"] = Federated(clients=4)
        chosen["attack"] = attack.resolve(dataset.info())
        choices: dict[str, Any] = {
            axis: Choice(axis, self._name_of(type(component)), axis, component) for axis, component in chosen.items()
        }
        return Cell(**choices, seed=0, recipe=RECIPE, info=dataset.info(), fingerprint=dataset.fingerprint())

    def stages(self, kind: type[Stages] = Stages, **under_test: Component) -> Stages:
        """The stages of such a cell, whose artifacts are shared by all checks."""
        return kind(self.cell(**under_test), Store(Path(self._folder)), self.context)

    def keep(self, name: str, component: Component, compute: Any) -> Any:  # noqa: ANN401
        """The result of `compute()`, which is called once for each `name` and `component`."""
        key = (name, type(component), repr(component))
        if key not in self._kept:
            self._kept[key] = compute()
        return self._kept[key]

    def _name_of(self, component: type) -> str:
        """A name for keys: that of the class, numbered if an earlier class had it, as when one is defined again."""
        name = f"{component.__module__}:{component.__qualname__}"
        classes = self._classes.setdefault(name, [])
        if component not in classes:
            classes.append(component)
        index = classes.index(component)
        return f"{name}#{index}" if index else name


def weights_of(model: torch.nn.Module) -> Mapping[str, Tensor]:
    """A copy of all parameters and buffers, on the CPU."""
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
