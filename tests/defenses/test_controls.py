"""The controls, and every defense on every architecture and activation."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from bbn_defenses.ac import AC
from bbn_defenses.dp_sgd import DPSGD
from bbn_defenses.fine_pruning import FinePruning, prune_inputs
from bbn_defenses.fine_tune import FineTune
from bbn_defenses.nad import find_blocks
from bbn_defenses.oracle_filter import OracleFilter
from bbn_defenses.spectral_signatures import SpectralSignatures, outlier_scores
from torch import Tensor, nn

from backdoor_bench_none.api import (
    Architecture,
    Batch,
    Context,
    Defense,
    DefenseTask,
    FitTask,
    ImageSet,
    ModelSpec,
    OracleTask,
    PoisonedSamples,
)
from backdoor_bench_none.contracts.defense import Stage
from backdoor_bench_none.contracts.record import Record
from backdoor_bench_none.errors import BenchError, TrainingError
from backdoor_bench_none.inspection.features import collect_features
from backdoor_bench_none.models.mlp import MLP
from backdoor_bench_none.planning.plan import make_plan
from backdoor_bench_none.planning.stage_table import record_key
from backdoor_bench_none.registry.components import Registry
from backdoor_bench_none.registry.plugins import Plugins
from backdoor_bench_none.results.store import Store
from backdoor_bench_none.run.stages import Stages
from backdoor_bench_none.testing.pretend_cuda import pretend_cuda
from backdoor_bench_none.trainers.centralized import Centralized

CPU = Context(torch.device("cpu"), 0)
NAMES = (
    "no_defense", "none", "none_robust", "none_retrain", "dp_sgd", "nad", "ac", "abl", "group_norm", "fine_tune",
    "fine_pruning", "spectral_signatures", "oracle_filter",
)  # fmt: skip
ARCHITECTURES = ("nin", "vgg11", "vgg16", "resnet18", "alexnet", "mlp")
ACTIVATIONS = ("relu", "leaky_relu", "elu", "prelu", "tanhshrink", "softplus", "gelu", "silu")
Make = Callable[..., Any]

# Fine-pruning.


class Dozing(Architecture):
    """Six features: 0 to 2 see the kinds of stripe, 3 the trigger, 4 and 5 sleep."""

    def build(self, spec: ModelSpec) -> nn.Module:
        model = nn.Sequential(nn.Conv2d(1, 6, 8), nn.ReLU(), nn.Flatten(), nn.Linear(6, 3))
        conv, head = model[0], model[3]
        with torch.no_grad():
            conv.weight.zero_()
            conv.bias.copy_(torch.tensor([-2.0, -2, -2, -2, -1, -1]))
            for label in range(3):
                conv.weight[label, 0, 2 * label : 2 * label + 2, :4] = 1.0
            pattern = torch.tensor([[1.0, -1, 1], [-1, 1, -1], [1, -1, 1]])
            conv.weight[3, 0, -3:, -3:] = 5 * pattern
            head.weight.copy_(torch.full((3, 6), 0.5))
            head.weight[:, :3] += 3 * torch.eye(3)
            head.weight[0, 3] = 20
            head.bias.zero_()
        return model


@pytest.fixture
def dozing(make_task: Make, stripes: Any) -> Make:
    def make(**options: Any) -> Any:
        weights = Dozing().build(ModelSpec(3, 1, 8, nn.ReLU)).state_dict()
        clean = stripes(60, 0, seed=1)[0]
        return make_task(**{"architecture": Dozing(), "weights": weights, "clean": clean, **options})

    return make


@pytest.mark.parametrize("epochs", [0, 3])
def test_sleeping_channels_are_pruned_and_stay_pruned(dozing: Make, epochs: int) -> None:
    """The trigger's channel among them: on clean images it sleeps too."""
    result = FinePruning(steps=6, epochs=epochs, lr=0.05).run(dozing().task, CPU)
    assert result.extras == {"pruned": 3, "channels": 6}
    weight = result.model[3].weight
    assert torch.equal(weight[:, 3:], torch.zeros(3, 3))
    assert weight[:, :3].all()
    before = Dozing().build(ModelSpec(3, 1, 8, nn.ReLU))[3].weight
    assert torch.equal(weight[:, :3], before[:, :3]) == (epochs == 0)


def test_pruning_disarms_the_trigger(dozing: Make) -> None:
    tiny = dozing()
    some = tiny.task.train.take(torch.nonzero(tiny.poisoned).flatten())
    assert (tiny.task.predict(tiny.task.victim(), CPU, some).argmax(1) == 0).all()
    model = FinePruning(steps=6, epochs=0).run(tiny.task, CPU).model
    assert len(tiny.task.predict(model, CPU, some).argmax(1).unique()) == 3


@pytest.mark.parametrize(("tolerance", "pruned"), [(0.0, 3), (0.2, 3), (0.5, 4), (0.99, 5)])
def test_pruning_stops_by_tolerance(dozing: Make, tolerance: float, pruned: int) -> None:
    """Each of the three last channels is worth a third of the accuracy; one is always left."""
    task = dozing().task
    result = FinePruning(tolerance=tolerance, steps=6, epochs=0).run(task, CPU)
    assert result.extras["pruned"] == pruned
    accuracy, before = (
        float((task.predict(model, CPU, task.clean).argmax(1) == task.clean.labels).float().mean())
        for model in (result.model, task.victim())
    )
    assert before == 1
    assert accuracy >= before - tolerance


def test_pruning_goes_by_steps(dozing: Make) -> None:
    assert FinePruning(steps=3, epochs=0).run(dozing().task, CPU).extras["pruned"] == 2


def test_a_channel_of_a_flattened_map_has_a_block_of_columns() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.Flatten(), nn.Linear(12, 2))
    prune_inputs(model[2], torch.tensor([1]), 3)
    assert torch.nonzero((model[2].weight == 0).all(0)).flatten().tolist() == [4, 5, 6, 7]


def test_the_fine_tuning_is_on_the_clean_images(dozing: Make) -> None:
    tiny = dozing(trains=False, lr=0.3)
    FinePruning(epochs=7, batch_size=9).run(tiny.task, CPU)
    (call,) = tiny.calls
    assert torch.equal(call.data.images.images, tiny.task.clean.images)
    assert (call.recipe.epochs, call.recipe.batch_size, call.recipe.schedule) == (7, 9, "constant")
    assert call.recipe.lr == pytest.approx(0.03)


# Fine-tuning.


def test_fine_tuning_trains_the_victim_on_the_clean_images(dozing: Make) -> None:
    tiny = dozing(lr=0.3, clip_norm=2.0)
    result = FineTune(epochs=4, batch_size=9).run(tiny.task, CPU)
    (call,) = tiny.calls
    assert call.model is result.model
    assert torch.equal(call.data.images.images, tiny.task.clean.images)
    assert (call.recipe.epochs, call.recipe.batch_size, call.recipe.weight_decay) == (4, 9, 1e-4)
    assert call.recipe.clip_norm == 2.0
    assert [call.recipe.lr_at(epoch, 1) for epoch in range(4)] == pytest.approx([0.3, 0.3, 0.03, 0.03])
    victim = tiny.task.victim()
    Centralized().fit(FitTask(victim, call.data, call.recipe), CPU)
    assert all(torch.equal(a, b) for a, b in zip(victim.parameters(), result.model.parameters(), strict=True))


# Spectral signatures.


@pytest.mark.parametrize("shape", [(50, 8), (5, 20)])
def test_outlier_scores_are_the_same_on_a_gpu(shape: tuple[int, int]) -> None:
    features = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = outlier_scores(features).numpy()
    with pretend_cuda() as gpu:
        scores = outlier_scores(features.to("cuda")).cpu().numpy()
        assert [kind for kind, _ in gpu.waits] == ["linalg_eigh", "copy to the host"]
    np.testing.assert_allclose(scores, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [(40, 7), (5, 30), (2, 3)])
def test_outlier_scores_are_those_of_numpy(shape: tuple[int, int]) -> None:
    features = torch.randn(shape) * torch.linspace(1, 4, shape[1]) + 3
    centred = features.double().numpy() - features.double().numpy().mean(0)
    _, _, directions = np.linalg.svd(centred)
    np.testing.assert_allclose(outlier_scores(features).numpy(), (centred @ directions[0]) ** 2, rtol=1e-9, atol=1e-12)


def test_a_distant_minority_has_the_highest_scores() -> None:
    features = torch.randn(100, 20)
    features[:8, 3] += 20
    assert sorted(outlier_scores(features).argsort(descending=True)[:8].tolist()) == list(range(8))


@pytest.mark.parametrize(
    ("fraction", "size", "count"), [(0.1, 100, 15), (0.1, 6, 0), (0.1, 7, 1), (0.05, 97, 7), (0.6, 10, 9)]
)
def test_one_and_a_half_times_the_fraction_is_dropped(fraction: float, size: int, count: int) -> None:
    assert SpectralSignatures(expected_fraction=fraction).count(size) == count


def test_every_class_loses_its_share_and_the_rest_is_trained_on(dozing: Make) -> None:
    tiny = dozing(trains=False)
    result = SpectralSignatures(expected_fraction=0.2).run(tiny.task, CPU)
    labels = tiny.task.train.labels
    data = tiny.task.training_data(None, CPU)
    features = collect_features(tiny.task.victim(), data.images.images, data.pixels, CPU)
    for k in range(3):
        members = torch.nonzero(labels == k).flatten()
        worst = outlier_scores(features[members]).argsort(descending=True, stable=True)[: int(0.3 * len(members))]
        assert torch.nonzero(result.flagged & (labels == k)).flatten().tolist() == sorted(members[worst].tolist())
        assert result.scores[members].median() == pytest.approx(1)
    (call,) = tiny.calls
    assert torch.equal(call.keep, torch.nonzero(~result.flagged).flatten())
    assert int(result.flagged[tiny.poisoned].sum()) >= 14


@pytest.mark.parametrize("counts", [(20, 1, 0), (20, 2, 3)])
def test_small_and_absent_classes_lose_nothing(dozing: Make, stripes: Any, counts: tuple[int, int, int]) -> None:
    train, truth = stripes(150, 0)
    kept = torch.cat([torch.nonzero(train.labels == k).flatten()[:n] for k, n in enumerate(counts)])
    tiny = dozing(train=train.take(kept), poisoned=truth[kept], trains=False)
    result = SpectralSignatures().run(tiny.task, CPU)
    assert int(result.flagged.sum()) == 3
    assert torch.isfinite(result.scores).all()


def test_equal_images_have_finite_scores(dozing: Make) -> None:
    train = ImageSet(torch.full((30, 1, 8, 8), 7, dtype=torch.uint8), torch.arange(30) % 3)
    result = SpectralSignatures().run(dozing(train=train, poisoned=torch.zeros(30).bool(), trains=False).task, CPU)
    assert torch.isfinite(result.scores).all()


@pytest.mark.parametrize("defense", [SpectralSignatures(), FinePruning(epochs=0), AC()])
def test_a_network_whose_activations_are_not_finite_is_an_error(dozing: Make, defense: Defense) -> None:
    weights = Dozing().build(ModelSpec(3, 1, 8, nn.ReLU)).state_dict()
    weights["0.bias"][:] = torch.nan
    with pytest.raises((ValueError, BenchError), match="finite"):
        defense.run(dozing(weights=weights, trains=False).task, CPU)


# The oracle.


def as_oracle(tiny: Any) -> OracleTask:
    values = {field.name: getattr(tiny.task, field.name) for field in fields(tiny.task)}
    train = tiny.task.train
    nothing = PoisonedSamples.nothing(train)  # the filter asks for the truth about training samples alone
    return OracleTask(
        **values, poisoned=tiny.poisoned, original=train, poisoned_samples=nothing, test=train,
        triggered_samples=nothing,
    )  # fmt: skip


def test_the_oracle_trains_on_exactly_the_benign_samples(dozing: Make) -> None:
    tiny = dozing(trains=False)
    result = OracleFilter().run(as_oracle(tiny), CPU)
    assert torch.equal(result.flagged, tiny.poisoned)
    assert torch.equal(tiny.calls[0].keep, torch.nonzero(~tiny.poisoned).flatten())


def test_a_plain_task_does_not_know_the_truth(dozing: Make) -> None:
    tiny = dozing(trains=False)
    assert not hasattr(tiny.task, "poisoned")
    with pytest.raises(AssertionError):
        OracleFilter().run(tiny.task, CPU)
    assert tiny.calls == []


def test_if_everything_is_poisoned_nothing_is_left_to_train_on(dozing: Make) -> None:
    tiny = dozing()
    task = replace(as_oracle(tiny), poisoned=torch.ones(150, dtype=torch.bool))
    with pytest.raises(TrainingError, match="no sample is left"):
        OracleFilter().run(task, CPU)


def test_only_the_oracle_declares_that_it_is_told() -> None:
    registry = Registry(Plugins(external=False))
    told = {name: registry.load("defense", name).sees_ground_truth for name in NAMES}  # type: ignore[attr-defined]
    assert told == {name: name == "oracle_filter" for name in NAMES}
    assert "told which samples are poisoned" in OracleFilter.facts()["caution"]
    assert "beware" not in AC.facts()


# All of them, all the way.

BENCHMARK = """
version: 1
name: everything
seeds: [0]
matrix:
  dataset: [{{name: digits, params: {{image_size: {side}}}}}]
  attack: [{{name: badnets, params: {{poison_rate: 0.1}}}}]
  defense: [{defenses}]
  architecture: [{architecture}]
  activation: [relu, prelu]
defaults:
  defense:
    none: {{epochs: 1}}
    nad: {{epochs: 1, teacher_epochs: 1}}
    fine_tune: {{epochs: 1}}
    fine_pruning: {{epochs: 1, steps: 3}}
    abl: {{unlearning_epochs: 1}}
"""
SMALL = {
    "mlp": (8, "{name: mlp, params: {hidden: 16, depth: 1}, recipe: {epochs: 1}}", NAMES),
    "resnet18": (16, "{name: resnet18, params: {width: 0.05}, recipe: {epochs: 1}}", ("nad", "dp_sgd", "group_norm")),
}


@pytest.mark.parametrize("architecture", ["mlp", pytest.param("resnet18", marks=pytest.mark.slow)])
def test_every_defense_ends_with_a_record(architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    side, text, defenses = SMALL[architecture]
    algorithm1 = "{name: none, params: {procedure: algorithm1}, as: algorithm1}"
    listed = ", ".join([*defenses, algorithm1] if "none" in defenses else defenses)
    (tmp_path / "b.yaml").write_text(BENCHMARK.format(side=side, architecture=text, defenses=listed))
    store = Store(tmp_path / "results")
    store.create()
    plan = make_plan(tmp_path / "b.yaml", Registry(Plugins(external=False)))
    tasks: dict[str, DefenseTask] = {}
    make = Stages.defense_task

    def spy(stages: Stages) -> DefenseTask:
        tasks[stages.cell.defense.name] = task = make(stages)
        return task

    monkeypatch.setattr(Stages, "defense_task", spy)
    records: list[Record] = []
    for cell in plan.cells:
        if record_key(cell) in plan.skipped:
            assert plan.skipped[record_key(cell)] == "nad: a network without convolutions has no attention map"
            continue
        record = Stages(cell, store, CPU).evaluate()
        store.write_record(record)
        assert store.read_record(record_key(cell)) == record
        records.append(record)
        assert record.status == "done"
        assert record.counts is not None
        assert record.defense_stage in set(Stage)
        assert record.clean_fraction == cell.defense.component.clean_fraction
        assert record.sees_ground_truth == (cell.defense.name == "oracle_filter")
        assert (record.detection is not None) == ("flagged" in cell.defense.component.returns)
        assert (record.infected is not None) == ("infected" in cell.defense.component.returns)
    expected = 2 * (len(defenses) + ("none" in defenses)) - 2 * (architecture == "mlp")
    assert len(records) == expected
    assert {name for name, task in tasks.items() if hasattr(task, "poisoned")} == {"oracle_filter"} & set(defenses)
    perfect = [record.detection for record in records if record.sees_ground_truth]
    assert all(detection.false_positive == detection.false_negative == 0 for detection in perfect if detection)
    for name, task in tasks.items():
        assert (task.clean is not None) == (name in ("nad", "fine_tune", "fine_pruning"))
        assert (task.victim_network is None) == (name in ("dp_sgd", "group_norm", "abl", "oracle_filter"))


QUICK: dict[str, dict[str, Any]] = {
    "fine_pruning": {"steps": 3},
    "dp_sgd": {"epochs": 1},
    "abl": {"isolation_fraction": 0.1},
}


@pytest.fixture(scope="module")
def registry() -> Registry:
    return Registry(Plugins(external=False))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_defense_takes_every_network(
    make_task: Make, registry: Registry, architecture: str, activation: str
) -> None:
    """All but the training: inspection, clustering, pruning, conversion, isolation, one private step."""
    made = registry.create("architecture", architecture, {"width": 0.05})
    function = registry.create("activation", activation, {})
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (30, 1, 16, 16), dtype=torch.uint8, generator=generator)
    train, truth = ImageSet(images, torch.arange(30) % 3), torch.arange(30) < 3
    tiny = make_task(train, truth, weights={}, clean=train, trains=False)
    spec = ModelSpec(3, 1, 16, function.build)  # type: ignore[attr-defined]
    build = replace(tiny.task.build, architecture=made, spec=spec)
    victim = build(0).eval()
    tiny = replace(tiny, task=replace(tiny.task, build=build, victim_network=victim))
    for name in NAMES:
        defense = registry.create("defense", name, QUICK.get(name, {}))
        if name == "nad" and (architecture == "mlp" or activation == "tanhshrink"):
            continue  # an untrained network with tanhshrink is zero all over, which is refused
        task = as_oracle(tiny) if name == "oracle_filter" else tiny.task
        with warnings.catch_warnings(record=True):
            result = defense.run(task, CPU)  # type: ignore[attr-defined]
        assert task.predict(result.model, CPU).shape == (30, 3)
        for verdicts in (result.flagged, result.scores):
            assert verdicts is None or (verdicts.shape == (30,) and torch.isfinite(verdicts).all())
    model, batch = DPSGD().adapt(build(0)).eval(), batch_of(tiny.task)
    vmap, loop = private_gradients(model, batch, "vmap"), private_gradients(model, batch, "loop")
    for one, other in zip(vmap, loop, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    algorithm1 = registry.create("defense", "none", {"procedure": "algorithm1", "epochs": 0, "max_removed": 1.0})
    assert algorithm1.run(tiny.task, CPU).flagged.shape == (30,)  # type: ignore[attr-defined]
    if architecture != "mlp":
        assert len(find_blocks(build(0).eval(), batch.images)) == 3


def private_gradients(model: nn.Module, batch: Batch, method: Literal["vmap", "loop"]) -> list[Tensor]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")  # vmap of VGG with PReLU
        DPSGD(noise=0.0, method=method).step(model, batch, CPU, torch.Generator())
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def batch_of(task: DefenseTask) -> Batch:
    data = task.training_data(task.train.take(torch.arange(2)), CPU)
    return Batch(data.pixels.normalize(data.images.images), data.images.labels, torch.arange(2))


def test_a_network_of_one_layer_has_nothing_to_inspect(make_task: Make) -> None:
    class Single(Architecture):
        def build(self, spec: ModelSpec) -> nn.Module:
            return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))

    weights: dict[str, Tensor] = Single().build(ModelSpec(3, 1, 8, nn.ReLU)).state_dict()
    none = Registry(Plugins(external=False)).create("defense", "none", {})
    with pytest.raises(ValueError, match="no hidden layer matches anything; there are: none"):
        none.run(make_task(architecture=Single(), weights=weights).task, CPU)  # type: ignore[attr-defined]


def test_the_same_seed_gives_the_same_control(make_task: Make, stripes: Any) -> None:
    for name in ("fine_tune", "fine_pruning", "spectral_signatures"):
        task = make_task(architecture=MLP(hidden=8), clean=stripes(30, 0)[0], epochs=2).task
        defense = Registry(Plugins(external=False)).create("defense", name, {})
        first, again = (defense.run(task, CPU).model.state_dict() for _ in range(2))  # type: ignore[attr-defined]
        assert all(torch.equal(first[key], again[key]) for key in first)
