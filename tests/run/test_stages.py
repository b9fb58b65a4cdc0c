"""Stages on real digits: computed once, the same for whom they should be, and the ground truth kept from defenses."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backdoor_bench_none.api import (
    Attack,
    Context,
    DefenseResult,
    DefenseTask,
    FitTask,
    History,
    PoisonedSamples,
)
from backdoor_bench_none.contracts.cell import Cell
from backdoor_bench_none.contracts.record import Record
from backdoor_bench_none.planning.plan import Plan
from backdoor_bench_none.planning.stage_table import poison_key, stage_key
from backdoor_bench_none.results.store import DamagedArtifactWarning, Store
from backdoor_bench_none.run.checks import check_result
from backdoor_bench_none.run.provenance import installed_libraries
from backdoor_bench_none.run.stages import Stages
from backdoor_bench_none.trainers.centralized import Centralized

TRAIN, POISONED, TEST = 1297, 65, 500
#: a defense that is granted clean data, and shows what it was given
BBNFILE = """
from typing import ClassVar
from pydantic import Field
from backdoor_bench_none.api import Defense, DefenseResult, Stage, hookimpl

class Granted(Defense):
    stage: ClassVar[Stage] = Stage.POST_TRAINING
    starts_from_victim: ClassVar[bool] = True
    clean_fraction: float = Field(0.05, ge=0, lt=1)

    def run(self, task, context):
        return DefenseResult(task.victim())

@hookimpl
def bbn_defenses():
    return {"granted": Granted}
"""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "results")


@pytest.fixture
def cells(tiny_plan: Callable[..., Plan], tmp_path: Path) -> Callable[..., list[Cell]]:
    (tmp_path / "bbnfile.py").write_text(BBNFILE)
    return lambda **keywords: tiny_plan(**keywords).cells


def stages(cell: Cell, store: Store) -> Stages:
    return Stages(cell, store, Context(torch.device("cpu"), 0))


def files(store: Store) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (store.root / "artifacts").rglob("*.safetensors")}


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every training."""
    trainings: list[int] = []
    fit = Centralized.fit

    def counted(self: Centralized, task: FitTask, context: Context) -> History:
        trainings.append(1)
        return fit(self, task, context)

    monkeypatch.setattr(Centralized, "fit", counted)
    return trainings


def without_evaluation(record: Record) -> dict[str, Any]:
    dumped = record.model_dump(mode="json")
    del dumped["costs"]["evaluate"]
    return dumped


def numbers(record: Record) -> tuple[object, ...]:
    return record.key, record.counts, record.detection, record.extras, record.victim_losses


# shared stages


def test_stages_are_computed_once_and_loaded_after(
    cells: Callable[..., list[Cell]], store: Store, trainings: list[int]
) -> None:
    chosen = cells(attack="badnets", defense="no_defense, none")
    first = [stages(cell, store).evaluate() for cell in chosen]
    assert len(trainings) == 2  # one victim for both, one fine-tuning
    written = files(store)
    assert len(written) == 5  # data, poison, victim, two defenses
    again = [stages(cell, store).evaluate() for cell in chosen]
    assert len(trainings) == 2
    assert files(store) == written
    assert list(map(without_evaluation, again)) == list(map(without_evaluation, first))


@pytest.mark.parametrize("stage", ["data", "poison", "victim", "defense"])
def test_a_damaged_artifact_is_reported_and_recomputed_with_an_equal_result(
    stage: str, cells: Callable[..., list[Cell]], store: Store
) -> None:
    (cell,) = cells(defense="none")
    before = stages(cell, store).evaluate()
    key = stage_key(cell, stage)
    path = store.find_artifact(stage, key)
    assert path is not None
    damaged = path.read_bytes()
    path.write_bytes(damaged[:-3] + bytes([damaged[-3] ^ 4]) + damaged[-2:])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        after = stages(cell, store).evaluate()
    assert numbers(after) == numbers(before)
    assert store.load_artifact(stage, key) is not None  # warnings are errors here
    assert [w for w in caught if w.category is DamagedArtifactWarning and key in str(w.message)], "nobody was told"


def test_equal_seeds_give_equal_records_in_two_folders(cells: Callable[..., list[Cell]], tmp_path: Path) -> None:
    for cell in cells(attack="badnets", defense="no_defense, none", seeds="3"):
        one, other = (stages(cell, Store(tmp_path / name)).evaluate() for name in ("one", "other"))
        assert numbers(one) == numbers(other)


def test_seeds_differ(cells: Callable[..., list[Cell]], store: Store) -> None:
    one, other = (stages(cell, store).evaluate() for cell in cells(defense="no_defense", seeds="0, 1"))
    assert one.victim_losses != other.victim_losses


# what is poisoned, and who knows


def test_the_poisoned_set_is_the_same_for_all_defenses(cells: Callable[..., list[Cell]], store: Store) -> None:
    chosen = cells(defense="no_defense, none, granted")
    sets = [stages(cell, store).poisoned_train() for cell in chosen]
    assert len({poison_key(cell) for cell in chosen}) == 1
    assert all(torch.equal(each.images, sets[0].images) and torch.equal(each.labels, sets[0].labels) for each in sets)


def test_poison_differs_between_seeds(cells: Callable[..., list[Cell]], store: Store) -> None:
    one, other = (stages(cell, store).poison()[0].indices for cell in cells(defense="none", seeds="0, 1"))
    assert len(one) == len(other) == POISONED
    assert not torch.equal(one, other)


FRACTIONS = "{name: granted, sweep: {clean_fraction: [0.01, 0.05, 0.2]}}"


def test_the_clean_holdout_is_distinct_clean_and_nested(cells: Callable[..., list[Cell]], store: Store) -> None:
    smaller: list[bytes] = []
    for cell, fraction in zip(cells(defense=FRACTIONS), (0.01, 0.05, 0.2), strict=True):
        made = stages(cell, store)
        held = made.clean_holdout()
        assert held is not None
        assert len(held) == int(fraction * TRAIN)
        train, poisoned = made.data()[0], made.poison()[0].indices
        images = [image.numpy().tobytes() for image in held.images]
        places = {image.numpy().tobytes(): index for index, image in enumerate(train.images)}
        indices = [places[image] for image in images]
        assert len(set(indices)) == len(indices)
        assert not set(indices) & set(poisoned.tolist())
        assert torch.equal(train.labels[indices], held.labels)
        assert images[: len(smaller)] == smaller
        smaller = images


@pytest.mark.parametrize("attack", ["clean", "badnets"])
def test_the_clean_holdout_differs_between_seeds(attack: str, cells: Callable[..., list[Cell]], store: Store) -> None:
    """Also where nothing is poisoned, and the training set is the same for all seeds."""
    one, other = (stages(cell, store).clean_holdout() for cell in cells(attack=attack, defense="granted", seeds="0, 1"))
    assert one is not None
    assert other is not None
    assert len(one) == len(other) == int(0.05 * TRAIN)
    assert not torch.equal(one.images, other.images)


def test_no_clean_data_without_asking(cells: Callable[..., list[Cell]], store: Store) -> None:
    assert stages(cells(defense="none")[0], store).clean_holdout() is None


def test_a_defense_is_not_told_what_is_poisoned(
    cells: Callable[..., list[Cell]],
    store: Store,
    reachable: Callable[[object], list[object]],
    given_tasks: list[DefenseTask],
) -> None:
    stages(cells(defense="no_defense")[0], store).evaluate()
    things = reachable(given_tasks[0])
    secrets = (Stages, Store, Cell, Attack, PoisonedSamples)
    assert [thing for thing in things if isinstance(thing, secrets)] == []
    tensors = [thing for thing in things if isinstance(thing, Tensor)]
    assert len(tensors) >= 4  # the walk went somewhere: images, labels, weights
    sizes = {len(tensor) for tensor in tensors if tensor.ndim}
    assert not sizes & {POISONED, TEST, TRAIN - POISONED}
    assert [tensor for tensor in tensors if len(tensor) == TRAIN and tensor.dtype == torch.bool] == []


# initial weights


def flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_initial_weights_are_shared_within_a_seed(cells: Callable[..., list[Cell]], store: Store) -> None:
    chosen = cells(attack="clean, badnets", defense="no_defense, none", seeds="0, 1")
    weights = {cell.title: flat(stages(cell, store).builder(0)) for cell in chosen}
    for seed in ("s0", "s1"):
        first, *others = (value for title, value in weights.items() if title.endswith(seed))
        assert len(others) == 3
        assert all(torch.equal(first, other) for other in others)
    assert not torch.equal(*(flat(stages(cell, store).builder(0)) for cell in (chosen[0], chosen[1])))


def test_draws_differ_and_leave_the_global_generator_alone(cells: Callable[..., list[Cell]], store: Store) -> None:
    build = stages(cells(defense="none")[0], store).builder
    state = torch.random.get_rng_state()
    zero, one, zero_again = (flat(build(draw)) for draw in (0, 1, 0))
    assert torch.equal(zero, zero_again)
    assert not torch.equal(zero, one)
    assert torch.equal(torch.random.get_rng_state(), state)


# costs


def test_costs_name_every_stage(cells: Callable[..., list[Cell]], store: Store) -> None:
    record = stages(cells(defense="none")[0], store).evaluate()
    assert {"data", "poison", "victim", "defense", "evaluate"} == set(record.costs)
    assert all(cost.seconds > 0 for cost in record.costs.values())
    assert record.upstream["poisoned_samples"] == POISONED
    assert record.detection is not None
    assert record.detection.true_positive + record.detection.false_negative == POISONED


# what a defense may return

NETWORK = nn.Linear(2, 2)
FLAGS, SCORES = torch.zeros(4, dtype=torch.bool), torch.zeros(4)


def test_good_results_pass() -> None:
    check_result(DefenseResult(NETWORK), 4)
    check_result(DefenseResult(NETWORK, FLAGS, SCORES.double(), infected=False), 4)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (NETWORK, "a defense returns a DefenseResult, not Linear"),
        (None, "a defense returns a DefenseResult, not NoneType"),
        (DefenseResult(NETWORK, FLAGS[:3]), "flagged has shape"),
        (DefenseResult(NETWORK, FLAGS[:, None]), "flagged has shape"),
        (DefenseResult(NETWORK, FLAGS, SCORES[:3]), "scores has shape"),
        (DefenseResult(NETWORK, FLAGS.int()), "flagged is torch.int32, not bool"),
        (DefenseResult(NETWORK, None, SCORES / 0), "scores are not all finite"),
        (DefenseResult(NETWORK, [True] * 4), "flagged"),  # type: ignore[arg-type]
        (DefenseResult(NETWORK, None, [0.5] * 4), "scores"),  # type: ignore[arg-type]
        (DefenseResult(None), "model"),  # type: ignore[arg-type]
        (DefenseResult({"weight": SCORES}), "model"),  # type: ignore[arg-type]
    ],
)
def test_faulty_results_are_named(result: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        check_result(result, 4)


def test_versions_of_the_installed_libraries_are_known() -> None:
    assert installed_libraries() == {
        name: version(name) for name in ("torch", "torchvision", "numpy", "scikit-learn", "opencv-python-headless")
    }
