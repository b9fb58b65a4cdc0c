"""Transfer: which weights are read, what a backbone is trained on, what stays frozen, and whose recipe wins."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from backdoor_bench_none.api import Batch, Context, DatasetInfo, FitTask, History, ImageSet, Loss, Recipe, TrainingData
from backdoor_bench_none.contracts.trainer import cross_entropy
from backdoor_bench_none.data.image_files import Imagenette
from backdoor_bench_none.errors import ConfigError
from backdoor_bench_none.planning.plan import Plan, plan_config
from backdoor_bench_none.planning.reading import parse_config
from backdoor_bench_none.planning.stage_table import backbone_key, record_key, victim_key
from backdoor_bench_none.registry.components import Registry
from backdoor_bench_none.registry.plugins import Plugins
from backdoor_bench_none.results.store import Store
from backdoor_bench_none.run.stages import Stages
from backdoor_bench_none.trainers.centralized import Centralized
from backdoor_bench_none.trainers.transfer import Transfer

CONTEXT = Context(torch.device("cpu"), seed=0)
REAL = Path(os.environ.get("BBN_TEST_DATA", "nowhere"))
REGISTRY = Registry(Plugins(external=False))
#: a multilayer perceptron for digits of 8 pixels with 16 hidden units
SHAPES = {
    "features.0.weight": (16, 64),
    "features.0.bias": (16,),
    "classifier.weight": (7, 16),
    "classifier.bias": (7,),
}
COLOURS = {"blue": (0, 0, 250), "green": (0, 250, 0), "red": (250, 0, 0), "white": (250, 250, 250)}


def weights(**other: Tensor) -> dict[str, Tensor]:
    """Pretrained on seven classes."""
    generator = torch.Generator().manual_seed(4)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()} | other


def save(path: Path, tensors: dict[str, Tensor]) -> Path:
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return path


@pytest.fixture
def make_stages(tiny_plan: Callable[..., Plan], tmp_path: Path) -> Callable[..., Stages]:
    def make(trainer: str, **axes: str) -> Stages:
        (cell,) = tiny_plan(**{"defense": "no_defense", "trainer": trainer, **axes}).cells
        return Stages(cell, Store(tmp_path / "results"), CONTEXT)

    return make


def reading(path: Path) -> str:
    return f"{{name: transfer, params: {{weights: {path}}}}}"


# files of weights


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "pt"])
def test_the_backbone_is_that_of_the_file_and_the_head_is_new(
    suffix: str, make_stages: Callable[..., Stages], tmp_path: Path
) -> None:
    stages = make_stages(reading(save(tmp_path / f"w.{suffix}", weights())))
    victim, given = stages.victim().tensors, weights()
    for name in ("features.0.weight", "features.0.bias"):
        assert torch.equal(victim[name], given[name])
        assert torch.equal(stages.builder(0).state_dict()[name], given[name])
        assert torch.equal(stages.builder(5).state_dict()[name], given[name])
    assert victim["classifier.weight"].shape == (10, 16)
    assert not torch.equal(victim["classifier.weight"], stages.builder(0).state_dict()["classifier.weight"])
    assert not torch.equal(*(stages.builder(draw).state_dict()["classifier.weight"] for draw in (0, 5)))


class Malicious:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("writer", ["pickle", "torch", "torch beside tensors", "torch of old"])
def test_a_pickle_that_runs_commands_is_named_and_not_run(writer: str, tmp_path: Path) -> None:
    path, mark = tmp_path / "evil.pth", tmp_path / "pwned"
    if writer == "pickle":
        path.write_bytes(pickle.dumps(Malicious(mark)))
    else:
        content = {**weights(), "x": Malicious(mark)} if "beside" in writer else Malicious(mark)
        torch.save(content, path, _use_new_zipfile_serialization="old" not in writer)
    with pytest.raises(ConfigError, match=r"evil\.pth' holds more than tensors, and is not unpickled"):
        Transfer(weights=path).check(DatasetInfo("toy", (1, 8, 8), 10, 100, (0.0,), (1.0,)))
    assert not mark.exists()
    pickle.loads(pickle.dumps(Malicious(mark)))
    assert mark.exists()  # it would have


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.pth", None, "cannot be read"),
        ("absent.safetensors", None, "cannot be read"),
        ("empty.pth", b"", "cannot be read"),
        ("text.safetensors", b"hello", "cannot be read"),
        ("list.pth", [torch.zeros(1)], "is not a state dictionary"),
        ("nested.pth", {"state_dict": {"x": torch.zeros(1)}}, "is not a state dictionary"),
        ("model.pth", nn.Linear(2, 2), "holds more than tensors"),
    ],
)
def test_what_is_no_state_dictionary_is_a_fault_of_the_plan(
    name: str, content: object, message: str, tiny_plan: Callable[..., Plan], tmp_path: Path
) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ConfigError) as caught:
        tiny_plan(trainer=reading(path))
    assert "benchmark.yaml" in caught.value.message
    assert str(path) in caught.value.message
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("tensors", "first"),
    [
        (weights(**{"features.0.weight": torch.zeros(17, 64)}), r"1 of 2 .* features\.0\.weight"),
        ({name: tensor for name, tensor in weights().items() if "features.0.b" not in name}, r"features\.0\.bias"),
        ({f"module.{name}": tensor for name, tensor in weights().items()}, r"2 of 2 .* features\.0\.bias"),
        ({}, "2 of 2"),
    ],
)
def test_weights_of_another_network_are_refused(
    tensors: dict[str, Tensor], first: str, make_stages: Callable[..., Stages], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"do not fit: .*{first}"):
        make_stages(reading(save(tmp_path / "w.safetensors", tensors))).backbone()


def test_the_content_of_the_file_is_in_the_key_and_its_place_is_not(
    tiny_plan: Callable[..., Plan], tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    files = [save(tmp_path / "a.safetensors", weights()), save(tmp_path / "elsewhere" / "b.safetensors", weights())]
    files.append(save(tmp_path / "c.safetensors", weights(**{"features.0.bias": torch.zeros(16)})))
    one, same, other = (tiny_plan(trainer=reading(path)).cells[0] for path in files)
    plain = tiny_plan(trainer="transfer").cells[0]
    for key in (record_key, backbone_key, victim_key):
        assert key(one) == key(same)
        assert len({key(cell) for cell in (one, other, plain)}) == 3


def test_a_file_in_the_home_folder_is_found(
    tiny_plan: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the folders of data sets are."""
    save(tmp_path / "w.safetensors", weights())
    monkeypatch.setenv("HOME", str(tmp_path))
    assert backbone_key(tiny_plan(trainer=reading(Path("~/w.safetensors"))).cells[0])


# what is frozen


class Network(nn.Module):
    """With BatchNorm, dropout, and a convolution that was frozen before."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        self.dropout, self.head = nn.Dropout(0.5), nn.Linear(4 * 16, 3)
        self.frozen.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.dropout(self.norm(self.conv(self.frozen(images))).relu().flatten(1)))


def fit(loss: Loss = cross_entropy) -> tuple[nn.Module, dict[str, Tensor]]:
    """A network, and its state before it was trained."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = ImageSet(torch.randint(256, (32, 1, 8, 8), generator=generator).byte(), torch.arange(32) % 3)
    info = DatasetInfo("toy", (1, 8, 8), 3, 32, (0.5,), (0.5,))
    recipe = Recipe(epochs=2, batch_size=8, lr=0.1)
    grads = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    task = FitTask(model, TrainingData.of(images, info, CONTEXT.device), recipe, loss=loss)
    try:
        Transfer().fit(task, CONTEXT)
    finally:
        assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == grads
    return model, before


def test_only_the_last_layer_moves_and_statistics_stay() -> None:
    model, before = fit()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {"head.weight", "head.bias"}
    assert not model.training


def test_dropout_is_active_and_batchnorm_is_not() -> None:
    seen: list[tuple[bool, bool, bool]] = []

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        differ = not torch.equal(model(batch.images), model(batch.images))
        seen.append((model.get_submodule("dropout").training, model.get_submodule("norm").training, differ))
        return cross_entropy(model, batch)

    fit(loss)
    assert seen == [(True, False, True)] * 8


def test_gradients_are_asked_for_again_whatever_happens() -> None:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == [
            "head.weight", "head.bias"
        ]  # fmt: skip
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(loss)  # it looks at requires_grad in the end


# what the backbone is trained on


@pytest.fixture
def pretrained_on(monkeypatch: pytest.MonkeyPatch) -> list[tuple[ImageSet, int, int]]:
    """Images, outputs and epochs of every training."""
    trainings: list[tuple[ImageSet, int, int]] = []
    plain = Centralized.fit

    def fit(self: Centralized, task: FitTask, context: Context) -> History:
        outputs = task.model(torch.zeros(1, *task.data.info.shape)).shape[1]
        trainings.append((task.data.images, outputs, task.recipe.epochs))
        return plain(self, task, context)

    monkeypatch.setattr(Centralized, "fit", fit)
    return trainings


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten pictures of each of four colours."""
    for name, colour in COLOURS.items():
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for index in range(10):
            pixels = np.full((8, 8, 3), colour, dtype=np.uint8)
            pixels[0, 0] = index
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{index}.png")
    return tmp_path / "pictures"


def colours(images: ImageSet) -> dict[int, tuple[int, ...]]:
    """The colour of each label."""
    return {int(y): tuple(x[:, 4, 4].tolist()) for x, y in zip(images.images, images.labels, strict=True)}


@pytest.mark.parametrize(
    ("kept", "pretrained"),
    [
        (["white", "green"], ["blue", "red"]),
        (["red", "blue", "white"], ["green"]),
        (None, ["blue", "green", "red", "white"]),
        (["white", "red", "green", "blue"], ["blue", "green", "red", "white"]),
    ],
)
def test_the_backbone_is_trained_on_the_classes_left_out(
    kept: list[str] | None, pretrained: list[str], folder: Path, make_stages: Callable[..., Stages],
    pretrained_on: list[tuple[ImageSet, int, int]],
) -> None:  # fmt: skip
    classes = "" if kept is None else f", classes: [{', '.join(kept)}]"
    dataset = f"{{name: image_folder, params: {{root: {folder}, image_size: 8{classes}}}}}"
    stages = make_stages("{name: transfer, params: {pretraining_epochs: 3}}", dataset=dataset)
    assert colours(stages.data()[0]) == {i: COLOURS[name] for i, name in enumerate(kept or COLOURS)}
    backbone = stages.backbone()
    ((images, outputs, epochs),) = pretrained_on
    assert colours(images) == {i: COLOURS[name] for i, name in enumerate(pretrained)}
    assert (len(images), outputs, epochs) == (8 * len(pretrained), len(pretrained), 3)
    assert torch.equal(stages.builder(0).state_dict()["features.0.weight"], backbone.tensors["features.0.weight"])


def test_digits_leave_out_no_class(
    make_stages: Callable[..., Stages], pretrained_on: list[tuple[ImageSet, int, int]]
) -> None:
    stages = make_stages("{name: transfer, params: {pretraining_epochs: 1}}", attack="badnets")
    stages.victim()
    first, second = pretrained_on
    assert torch.equal(first[0].images, stages.data()[0].images)  # clean, while the victim's are not
    assert not torch.equal(second[0].images, first[0].images)


def test_a_backbone_is_trained_once_for_all_attacks(tiny_plan: Callable[..., Plan]) -> None:
    cells = tiny_plan(attack="clean, badnets, wanet", trainer="transfer", seeds="0, 1").cells
    assert len({(cell.seed, backbone_key(cell)) for cell in cells}) == len({backbone_key(cell) for cell in cells}) == 2


@pytest.mark.parametrize("classes", [["red"], ["red", "red"], ["red", "pink"]])
def test_classes_that_make_no_data_set_are_refused(
    classes: list[str], folder: Path, tiny_plan: Callable[..., Plan]
) -> None:
    with pytest.raises(ConfigError, match=r"classes: |no class 'pink'|class appears twice"):
        tiny_plan(dataset=f"{{name: image_folder, params: {{root: {folder}, classes: {classes}}}}}")


@pytest.mark.skipif(not (REAL / "imagenette2").is_dir(), reason="BBN_TEST_DATA names no folder with imagenette2")
@pytest.mark.filterwarnings("ignore::backdoor_bench_none.data.image_files.SmallerThanPublishedWarning")
def test_imagenette_classes() -> None:
    whole = Imagenette(root=REAL, download=False, image_size=16)
    pair = Imagenette(root=REAL, download=False, image_size=16, classes=(7, 2))
    (train, test), (all_train, _), (rest, count) = pair.load(), whole.load(), pair.load_for_pretraining()
    assert (pair.info().num_classes, pair.info().train_size, count) == (2, len(train), 8)
    for label, original in ((0, 7), (1, 2)):
        assert torch.equal(train.images[train.labels == label], all_train.images[all_train.labels == original])
    left = [0, 1, 3, 4, 5, 6, 8, 9]
    assert torch.equal(
        torch.tensor(left)[rest.labels], all_train.labels[torch.isin(all_train.labels, torch.tensor(left))]
    )
    assert sorted(set(test.labels.tolist())) == [0, 1]
    assert len(rest) + len(train) == len(all_train)


# whose recipe wins

LAYERS = {"dataset": "digits", "architecture": "mlp", "trainer": "transfer"}


def recipe_of(defaults: dict[str, Any], entries: dict[str, Any]) -> Recipe:
    """With these recipes below `defaults` and in the entries."""
    matrix = {axis: [{"name": name, **({"recipe": entries[axis]} if axis in entries else {})}]
              for axis, name in LAYERS.items()}  # fmt: skip
    below = {axis: {LAYERS[axis]: {"recipe": recipe}} for axis, recipe in defaults.items()}
    text = yaml.safe_dump(
        {"version": 1, "name": "t", "defaults": below, "matrix": {"attack": "clean", "defense": "none", **matrix}}
    )
    (cell,) = plan_config(*parse_config(text, "b.yaml"), REGISTRY).cells
    return cell.recipe


def test_the_trainers_own_recipe_wins_over_the_others_own() -> None:
    recipe = recipe_of({}, {})
    assert (recipe.epochs, recipe.lr, recipe.augment, recipe.clip_norm) == (20, 0.05, False, 1)


#: later ones win
LEVELS = [(level, axis) for level in ("defaults", "entries") for axis in LAYERS]


@pytest.mark.parametrize("place", range(len(LEVELS)))
def test_own_below_defaults_below_entries_and_trainers_last(place: int) -> None:
    given: dict[str, dict[str, Any]] = {"defaults": {}, "entries": {}}
    for value, (level, axis) in enumerate(LEVELS[: place + 1], start=1):
        given[level][axis] = {"lr": float(value)}
    recipe = recipe_of(**given)
    assert (recipe.lr, recipe.epochs) == (place + 1, 20)


def test_a_fault_of_a_trainers_recipe_is_told() -> None:
    with pytest.raises(ConfigError, match=r"b\.yaml:\d+:\d+: .*recipe: lr"):
        recipe_of({}, {"trainer": {"lr": -1}})
