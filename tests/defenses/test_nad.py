"""NAD: attention by hand, the blocks it finds, a frozen teacher, and fine-tuning as its own control."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from bbn_defenses.fine_tune import FineTune
from bbn_defenses.nad import NAD, attention, attention_loss, find_blocks, require_attention
from pydantic import PrivateAttr
from torch import Tensor, nn

from backdoor_bench_none.api import (
    Architecture,
    Context,
    DefenseTask,
    FitTask,
    History,
    ImageSet,
    ModelSpec,
    Recipe,
    Trainer,
)
from backdoor_bench_none.errors import ConfigError, TrainingError
from backdoor_bench_none.inspection.hooks import record_outputs
from backdoor_bench_none.models.nin import NiN
from backdoor_bench_none.models.resnet import ResNet18
from backdoor_bench_none.models.vgg import VGG11, VGG16
from backdoor_bench_none.planning.plan import make_plan
from backdoor_bench_none.planning.stage_table import record_key
from backdoor_bench_none.registry.components import Registry
from backdoor_bench_none.registry.plugins import Plugins
from backdoor_bench_none.results.store import Store
from backdoor_bench_none.run.stages import Stages
from backdoor_bench_none.trainers.centralized import Centralized

CPU = Context(torch.device("cpu"), 0)
Make = Callable[..., Any]
SHORT = {"teacher_epochs": 2, "epochs": 3, "batch_size": 16, "lr": 0.02}

# Attention maps.


def test_the_loss_by_hand() -> None:
    here, there = (torch.tensor(x)[None, None] for x in ([[1.0, 0], [0, 0]], [[0.0, 1], [0, 0]]))
    assert float(attention_loss(here, there)) == pytest.approx(0.5, rel=1e-5)
    assert float(attention_loss(here, here)) == 0


def test_the_map_by_hand() -> None:
    features = torch.tensor([[[1.0, 0], [2, 0]], [[0, 2], [1, 0]]])[None]  # energies 1, 4, 5, 0
    expected = torch.tensor([[1.0, 4, 5, 0]]) / 42**0.5
    torch.testing.assert_close(attention(features), expected)


@pytest.mark.parametrize(
    "change",
    [lambda f: f[:, torch.randperm(6)], lambda f: f * (torch.randint(2, (6, 1, 1)) * 2 - 1), lambda f: 3.7 * f],
    ids=["permuted channels", "flipped signs", "scaled"],
)
def test_a_map_has_norm_1_and_is_invariant(change: Callable[[Tensor], Tensor]) -> None:
    features = torch.randn(5, 6, 4, 3)
    torch.testing.assert_close(torch.linalg.vector_norm(attention(features), dim=1), torch.ones(5))
    torch.testing.assert_close(attention(change(features)), attention(features))


def test_the_loss_is_the_squared_distance_over_places() -> None:
    one, other = torch.randn(5, 6, 4, 3), torch.randn(5, 6, 4, 3)
    distances = (attention(one) - attention(other)).square().sum(1)
    torch.testing.assert_close(12 * attention_loss(one, other), distances.mean())
    assert 0 < distances.mean() < 2


# Maps that say nothing.


@pytest.mark.parametrize(
    ("output", "said"),
    [(torch.rand(4, 8, 1, 1), "at least 2x2"), (torch.rand(4, 8), "at least 2x2"), (torch.rand(4, 8, 3, 1), "2x2"),
     (torch.rand(4, 8, 1, 1).expand(4, 8, 7, 7), "constant"), (torch.zeros(4, 8, 7, 7), "constant")],
)  # fmt: skip
def test_maps_without_attention_are_refused(output: Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=rf"'blocks\.3'.*{said}"):
        require_attention("blocks.3", output)


def test_maps_of_2x2_are_accepted() -> None:
    require_attention("blocks.3", torch.rand(4, 8, 2, 2))


@pytest.mark.parametrize(
    ("layers", "said"),
    [(("avgpool",), r"'avgpool' is \(51, 1, 1\)"), (("layer2", "flatten"), "'flatten'"), (("nothing",), "no module")],
)
def test_layers_that_cannot_be_compared_are_an_error_before_training(
    make_task: Make, stripes: Any, layers: tuple[str, ...], said: str
) -> None:
    tiny = make_task(weights=fresh_weights(), clean=stripes(20, 0)[0])
    with pytest.raises(ValueError, match=said):
        NAD(layers=layers).run(tiny.task, CPU)
    assert tiny.calls == []


def fresh_weights() -> dict[str, Tensor]:
    return ResNet18(width=0.1).build(ModelSpec(3, 1, 8, nn.ReLU)).state_dict()


class Dense(Architecture):
    def build(self, spec: ModelSpec) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))


def test_a_users_network_without_convolutions_is_an_error(make_task: Make, stripes: Any) -> None:
    tiny = make_task(
        architecture=Dense(), weights=Dense().build(ModelSpec(3, 1, 8, nn.ReLU)).state_dict(), clean=stripes(20, 0)[0]
    )
    with pytest.raises(ValueError, match="no map of at least 2x2"):
        NAD().run(tiny.task, CPU)


# Blocks.

BLOCKS = [
    (ResNet18(width=0.1), 32, ("layer2.1.act2", "layer3.1.act2", "layer4.1.act2")),
    (ResNet18(width=0.1), 16, ("layer2.1.act2", "layer3.1.act2", "layer4.1.act2")),
    (ResNet18(width=0.1), 8, ("layer1.1.act2", "layer2.1.act2", "layer3.1.act2")),
    (VGG16(width=0.1), 32, ("features.15", "features.22", "features.29")),
    (VGG16(width=0.1), 16, ("features.8", "features.15", "features.22")),
    (VGG11(width=0.1), 32, ("features.9", "features.14", "features.19")),
    (NiN(width=0.1), 32, ("features.5", "features.13", "features.19")),
    (NiN(width=0.1), 16, ("features.5", "features.13", "features.19")),
]


@pytest.mark.parametrize(("architecture", "side", "expected"), BLOCKS, ids=lambda x: getattr(x, "name", str(x)[:8]))
@pytest.mark.parametrize("activation", [nn.ReLU, nn.PReLU, nn.Softplus])
def test_blocks_are_the_last_three_before_pooling(
    architecture: Architecture, side: int, expected: tuple[str, ...], activation: type[nn.Module]
) -> None:
    model = architecture.build(ModelSpec(10, 3, side, activation)).eval()
    batch = torch.randn(4, 3, side, side)
    assert find_blocks(model, batch) == expected
    with record_outputs(model, {name: name for name in expected}) as outputs, torch.no_grad():
        model(batch)
    for name in expected:
        require_attention(name, outputs[name])


class FewMaps(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 8), nn.ReLU(),
            nn.Linear(8, 3),
        )  # fmt: skip


class Few(Architecture):
    def build(self, spec: ModelSpec) -> nn.Module:
        return FewMaps()


def test_a_users_network_with_one_block_is_compared_on_it(make_task: Make, stripes: Any) -> None:
    """The last of the three betas belongs to the last block."""
    options = {"architecture": Few(), "weights": FewMaps().state_dict(), "clean": stripes(20, 0)[0]}
    results = [
        NAD(betas=betas, **SHORT).run(make_task(**options).task, CPU) for betas in ((0, 0, 9), (7, 8, 9), (7, 8, 0))
    ]
    assert results[0].extras["attention_layers"] == ["1"]
    same, equal, other = (result.model[0].weight for result in results)
    assert torch.equal(same, equal)
    assert not torch.equal(same, other)


# Teacher and student.


class Snapshots(Trainer):
    """Trains, and keeps the network, its weights right after each training and the images."""

    _seen: list[tuple[nn.Module, dict[str, Tensor], ImageSet, Recipe]] = PrivateAttr(default_factory=list)

    def fit(self, task: FitTask, context: Context) -> History:
        history = Centralized().fit(task, context)
        weights = {name: x.clone() for name, x in task.model.state_dict().items()}
        self._seen.append((task.model, weights, task.data.images, task.recipe))
        return history


@pytest.fixture
def repair(make_task: Make, stripes: Any) -> tuple[DefenseTask, Snapshots]:
    """A task with a real victim and 30 clean images, and the trainer's record."""
    trainer = Snapshots()
    return replace(make_task(clean=stripes(30, 0, seed=1)[0]).task, trainer=trainer), trainer


def test_the_teacher_is_frozen_once_it_is_trained(repair: tuple[DefenseTask, Snapshots]) -> None:
    task, trainer = repair
    result = NAD(**SHORT).run(task, CPU)
    (teacher, after_training, *_), (student, _, _, _) = trainer._seen
    assert result.model is student
    assert student is not teacher
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not teacher.training
    assert all(torch.equal(after_training[name], x) for name, x in teacher.state_dict().items())
    assert any("running_mean" in name for name in after_training)
    moved = [not torch.equal(after_training[n], x) for n, x in task.victim().state_dict().items() if "weight" in n]
    assert all(moved)  # it was really trained


def test_both_are_trained_on_the_clean_images_by_the_same_schedule(repair: tuple[DefenseTask, Snapshots]) -> None:
    task, trainer = repair
    NAD(**SHORT).run(task, CPU)
    recipes = [recipe for *_, recipe in trainer._seen]
    assert [recipe.epochs for recipe in recipes] == [2, 3]
    for (_, _, images, _), recipe in zip(trainer._seen, recipes, strict=True):
        assert torch.equal(images.images, task.clean.images)
        rates = [recipe.lr_at(epoch, 1) for epoch in range(3)]
        assert rates == pytest.approx([0.02, 0.02, 0.002])


def test_without_attention_it_is_fine_tuning(repair: tuple[DefenseTask, Snapshots]) -> None:
    task, _ = repair
    student = NAD(betas=(0, 0, 0), **SHORT).run(task, CPU).model.state_dict()
    options = {name: value for name, value in SHORT.items() if name != "teacher_epochs"}
    tuned = FineTune(**options).run(task, CPU).model.state_dict()
    assert all(torch.equal(student[name], tuned[name]) for name in student)
    drawn = NAD(**SHORT).run(task, CPU).model.state_dict()
    assert any(not torch.equal(drawn[name], tuned[name]) for name in drawn)


@pytest.mark.slow
def test_attention_draws_the_student_to_its_teacher(repair: tuple[DefenseTask, Snapshots]) -> None:
    task, trainer = repair
    images = task.training_data(task.clean, CPU)
    batch = images.pixels.normalize(images.images.images)

    def distance(betas: tuple[float, float, float], seed: int) -> float:
        """Of the student's attention maps from its teacher's."""
        defense = NAD(betas=betas, teacher_epochs=10, epochs=20, batch_size=16, lr=0.0005)
        result = defense.run(task, Context(CPU.device, seed))
        teacher = trainer._seen[-2][0]
        named = {name: name for name in result.extras["attention_layers"]}
        with torch.no_grad(), record_outputs(result.model, named) as ours, record_outputs(teacher, named) as taught:
            result.model(batch), teacher(batch)
        return sum(float(attention_loss(ours[name], taught[name])) for name in named)

    ratios = [distance((8000, 16000, 16000), seed) / distance((0, 0, 0), seed) for seed in range(5)]
    assert median(ratios) < 0.5  # measured: 0.09 to 0.43, median 0.21


def test_no_hook_is_left_behind(repair: tuple[DefenseTask, Snapshots]) -> None:
    task, trainer = repair
    NAD(**SHORT).run(task, CPU)
    assert not any(module._forward_hooks for model, *_ in trainer._seen for module in model.modules())


def test_a_seed_determines_the_student(repair: tuple[DefenseTask, Snapshots]) -> None:
    first, again = (NAD(**SHORT).run(repair[0], CPU).model.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


# The clean images, and bad input.

BENCHMARK = """
version: 1
name: repair
seeds: [2]
matrix:
  dataset: [digits]
  attack: [{{name: badnets, params: {{poison_rate: 0.2}}}}]
  defense: [{{name: nad, params: {{clean_fraction: {fraction}, epochs: 1, teacher_epochs: 1}}}}]
  architecture: [{architecture}]
"""
RESNET = "{name: resnet18, params: {width: 0.05}, recipe: {epochs: 1}}"


def make_stages(folder: Path, fraction: float = 0.05, architecture: str = RESNET) -> tuple[Any, Stages]:
    (folder / "benchmark.yaml").write_text(BENCHMARK.format(fraction=fraction, architecture=architecture))
    store = Store(folder / "results")
    store.create()
    plan = make_plan(folder / "benchmark.yaml", Registry(Plugins(external=False)))
    return plan, Stages(plan.cells[0], store, CPU)


def identify(images: ImageSet, index: int) -> tuple[bytes, int]:
    return images.images[index].numpy().tobytes(), int(images.labels[index])


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.7])
def test_exactly_the_declared_share_of_distinct_clean_images_is_granted(tmp_path: Path, fraction: float) -> None:
    _, stages = make_stages(tmp_path, fraction)
    clean = stages.clean_holdout()
    train = stages.data()[0]
    known = {identify(train, index): index for index in range(len(train))}
    indices = [known[identify(clean, index)] for index in range(len(clean))]
    assert len(known) == len(train) == 1297
    assert len(set(indices)) == len(indices) == int(fraction * 1297)
    assert not stages.poisoned()[indices].any()


def test_a_network_without_convolutions_is_skipped_with_a_reason(tmp_path: Path) -> None:
    plan, _ = make_stages(tmp_path, architecture="mlp")
    assert plan.skipped == {record_key(plan.cells[0]): "nad: a network without convolutions has no attention map"}


@pytest.mark.parametrize("defense", [NAD, FineTune])
@pytest.mark.parametrize("fraction", [0, 1, -0.1])
def test_a_clean_fraction_of_nothing_is_refused(defense: Any, fraction: float) -> None:
    with pytest.raises(ValueError, match="clean_fraction"):
        defense(clean_fraction=fraction)


@pytest.mark.parametrize("fraction", [0.0001, 0.9])
def test_a_clean_fraction_that_cannot_be_granted_is_refused(tmp_path: Path, fraction: float) -> None:
    """No image, or more than are left by a fifth of poison."""
    with pytest.raises(ConfigError, match="clean_fraction"):
        make_stages(tmp_path, fraction)[1].evaluate()


def test_a_loss_that_is_not_finite_is_an_error(repair: tuple[DefenseTask, Snapshots]) -> None:
    with pytest.raises(TrainingError, match="not finite"):
        NAD(**{**SHORT, "lr": 1e30}).run(repair[0], CPU)
