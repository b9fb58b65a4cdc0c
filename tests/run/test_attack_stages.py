"""Stages that only some attacks have: who waits for whom, what is shared, which key depends on what, who is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from bbn_attacks.label_consistent import RobustCrafter
from torch import Tensor

from backdoor_bench_none.api import Attack, Context, DefenseTask, FitTask, History, PoisonedSamples, Trigger
from backdoor_bench_none.contracts.cell import Cell
from backdoor_bench_none.contracts.job import Job, Settings
from backdoor_bench_none.errors import ConfigError
from backdoor_bench_none.planning.plan import Plan
from backdoor_bench_none.planning.stage_table import (
    backbone_key,
    benign_key,
    crafter_key,
    data_key,
    has_stage,
    poison_key,
    record_key,
    victim_key,
)
from backdoor_bench_none.results.store import Artifact, Store
from backdoor_bench_none.run.jobs import run_job
from backdoor_bench_none.run.runner import pack_jobs
from backdoor_bench_none.run.stages import Stages
from backdoor_bench_none.trainers.centralized import Centralized

#: `everything` has a crafter and starts from the benign network; the others return other networks than they say
BBNFILE = """
from typing import ClassVar
import torch
from pydantic import Field
from torch import nn
from backdoor_bench_none.api import Crafter, History, Trigger, TriggerAttack, hookimpl
from backdoor_bench_none.models.mlp import MLP

class Small(Crafter):
    hidden: int = Field(8, ge=1)

    def architecture(self):
        return MLP(hidden=self.hidden, depth=1)

    def train(self, task, context):
        model = task.new_model()
        task.fit(model, context, epochs=1)
        return model

class Corner(TriggerAttack):
    def trigger(self, info):
        mask = torch.zeros(1, *info.shape[1:])
        mask[:, -2:, -2:] = 1
        return Trigger(mask, torch.ones(info.shape))

class Everything(Corner):
    controls_training: ClassVar[bool] = True
    starts_from_benign: ClassVar[bool] = True
    crafter: Small = Small()
    strength: float = 1.0

    def crafted_with(self):
        return self.crafter

    def poison(self, task, context):
        assert task.network is not None and not task.network.training
        return super().poison(task, context)

    def train(self, task, context):
        model = task.benign()
        return model, task.fit(model, context, epochs=1)

class Reshaped(Corner):
    controls_training: ClassVar[bool] = True

    def train(self, task, context):
        return nn.Sequential(task.new_model()), History([0.1])

class Adapted(Reshaped):
    def adapt(self, model, info):
        return nn.Sequential(model)

class Undeclared(Corner):
    controls_training: ClassVar[bool] = True

    def train(self, task, context):
        return task.benign(), History([0.1])

@hookimpl
def bbn_attacks():
    return {"everything": Everything, "reshaped": Reshaped, "adapted": Adapted, "undeclared": Undeclared}
"""
TRANSFER = "{name: transfer, params: {pretraining_epochs: 1}}"
FEDERATED = "{name: federated, params: {clients: 5}}"
DBA = {"attack": "{name: dba, params: {malicious_epochs: 1}}", "dataset": "{name: digits, params: {image_size: 16}}"}
HIDDEN = "{name: hidden_trigger, params: {steps: 2, class_rate: 0.1}}"


class Said(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "results")


@pytest.fixture
def cells(tiny_plan: Callable[..., Plan], tmp_path: Path) -> Callable[..., list[Cell]]:
    (tmp_path / "bbnfile.py").write_text(BBNFILE)
    return lambda **keywords: tiny_plan(**keywords).cells


@pytest.fixture
def one(cells: Callable[..., list[Cell]]) -> Callable[..., Cell]:
    """The one cell of a plan."""
    return lambda **keywords: cells(**{"defense": "no_defense", **keywords})[0]


def stages(cell: Cell, store: Store) -> Stages:
    return Stages(cell, store, Context(torch.device("cpu"), 0))


def graph(jobs: list[Job]) -> dict[str, set[str]]:
    """What each job waits for, by kind."""
    kinds = {job.id: job.kind for job in jobs}
    return {job.kind: {kinds[need] for need in job.needs} for job in jobs}


# the graph of jobs

GRAPHS: dict[str, tuple[dict[str, str], dict[str, set[str]]]] = {
    "clean": (
        {"attack": "clean"},
        {"poison": {"data"}, "victim": {"data", "poison"}, "cell": {"data", "poison", "victim"}},
    ),
    "crafter": (
        {"attack": "label_consistent"},
        {"crafter": {"data"}, "poison": {"data", "crafter"}, "victim": {"data", "poison"},
         "cell": {"data", "poison", "victim"}},
    ),
    "benign": (
        {"attack": "adaptive"},
        {"poison": {"data"}, "benign": {"data"}, "victim": {"data", "poison", "benign"},
         "cell": {"data", "poison", "victim"}},
    ),
    "search": (
        {"attack": "natural"},
        {"poison": {"data"}, "victim": {"data", "poison"}, "cell": {"data", "poison", "victim"}},
    ),
    "backbone unknown to the attack": (
        {"trainer": TRANSFER},
        {"poison": {"data"}, "backbone": {"data"}, "victim": {"data", "poison", "backbone"},
         "cell": {"data", "poison", "backbone", "victim"}},
    ),
    "backbone known to the attack": (
        {"attack": HIDDEN, "trainer": TRANSFER},
        {"backbone": {"data"}, "poison": {"data", "backbone"}, "victim": {"data", "poison", "backbone"},
         "cell": {"data", "poison", "backbone", "victim"}},
    ),
    "backbone without a victim": (
        {"trainer": TRANSFER, "defense": "oracle_filter"},
        {"poison": {"data"}, "backbone": {"data"}, "cell": {"data", "poison", "backbone"}},
    ),
    "benign without a victim": (
        {"attack": "adaptive", "defense": "oracle_filter"},
        {"poison": {"data"}, "cell": {"data", "poison"}},
    ),
    "all of them": (
        {"attack": "everything", "trainer": TRANSFER},
        {"backbone": {"data"}, "crafter": {"data"}, "poison": {"data", "crafter"}, "benign": {"data", "backbone"},
         "victim": {"data", "poison", "backbone", "benign"}, "cell": {"data", "poison", "backbone", "victim"}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", GRAPHS)
def test_who_waits_for_whom(case: str, cells: Callable[..., list[Cell]], store: Store) -> None:
    axes, expected = GRAPHS[case]
    jobs = pack_jobs(cells(**{"defense": "no_defense", **axes}), store)
    assert graph(jobs) == {"data": set(), **expected}
    assert len({job.id for job in jobs}) == len(jobs)
    places = {job.id: place for place, job in enumerate(jobs)}
    assert all(places[need] < places[job.id] for job in jobs for need in job.needs)


@pytest.mark.parametrize("order", ["clean, adaptive, everything", "adaptive, everything, clean"])
def test_clean_and_whoever_starts_from_it_share_one_network(
    order: str, cells: Callable[..., list[Cell]], store: Store
) -> None:
    by_name = {cell.attack.name: cell for cell in cells(attack=order, defense="no_defense")}
    benign = victim_key(by_name["clean"])
    assert {benign_key(cell) for cell in by_name.values()} == {benign}
    assert len({victim_key(cell) for cell in by_name.values()}) == 3
    jobs = pack_jobs(list(by_name.values()), store)
    trained = [job.id for job in jobs if job.kind in ("victim", "benign")]
    assert len(trained) == len(set(trained)) == 3
    needs = {job.id: job.needs for job in jobs}
    assert f"victim:{benign}" in needs[f"victim:{victim_key(by_name['adaptive'])}"]


def test_nothing_is_waited_for_that_is_there(one: Callable[..., Cell], store: Store) -> None:
    cell = one(attack="everything", trainer=TRANSFER)
    nothing = Artifact({"x": torch.zeros(1)}, {})
    for stage, key in (("data", data_key(cell)), ("backbone", backbone_key(cell)), ("crafter", crafter_key(cell))):
        store.save_artifact(stage, str(key), nothing)
    assert graph(pack_jobs([cell], store)) == {
        "poison": set(), "benign": set(), "victim": {"poison", "benign"}, "cell": {"poison", "victim"}
    }  # fmt: skip


def run_here(jobs: list[Job], store: Store) -> None:
    """In this process, one after the other."""
    settings = Settings(store.root, "cpu", bbnfile=store.root.parent / "bbnfile.py")
    outcomes = [run_job(job, settings, "cpu", None, lambda done, total: None) for job in jobs]
    assert [outcome for outcome in outcomes if outcome.status != "done"] == []


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of weights of every network that is trained."""
    sizes: list[int] = []
    fit = Centralized.fit

    def counted(self: Centralized, task: FitTask, context: Context) -> History:
        sizes.append(sum(parameter.numel() for parameter in task.model.parameters()))
        return fit(self, task, context)

    monkeypatch.setattr(Centralized, "fit", counted)
    return sizes


def test_shared_networks_are_trained_once_in_a_whole_run(
    cells: Callable[..., list[Cell]], store: Store, trainings: list[int]
) -> None:
    chosen = cells(attack="clean, adaptive, everything, {name: everything, as: other, params: {strength: 2}}",
                   defense="no_defense")  # fmt: skip
    jobs = pack_jobs(chosen, store)
    run_here(jobs, store)
    crafter, network = 8 * 65 + 90, 16 * 65 + 170
    assert sorted(trainings) == [crafter] + [network] * 4  # the benign network, and three made of it
    assert {record.status for record in store.records()} == {"done"}
    assert len(store.records()) == 4


def test_costs_do_not_depend_on_who_computed_a_stage(one: Callable[..., Cell], store: Store) -> None:
    cell = one(attack="everything", trainer=TRANSFER)
    first, again = (stages(cell, store).evaluate() for _ in range(2))
    assert {"backbone", "crafter", "benign", "poison", "victim"} <= set(first.costs)
    assert set(again.costs) == set(first.costs)


# keys

KEYS = {
    "crafter": crafter_key, "backbone": backbone_key, "poison": poison_key, "benign": benign_key, "victim": victim_key
}  # fmt: skip
EVERYTHING = {"attack": "everything", "trainer": TRANSFER}
CRAFTED = {"attack": "{name: label_consistent, params: {steps: 5}}"}
OTHER_CRAFTER = {"attack": "{name: label_consistent, params: {steps: 5, crafter: {epochs: 3}}}"}
OTHER_CRAFTING = {"attack": "{name: label_consistent, params: {steps: 6}}"}
FEATURES = {"attack": HIDDEN, "trainer": TRANSFER}
MLP = "{name: mlp, params: {hidden: 16, depth: 1}, recipe: {lr: 0.07}}"
#: a cell, what is changed in it, and which keys change
CHANGES: dict[str, tuple[dict[str, str], dict[str, str], str]] = {
    "crafter": (CRAFTED, OTHER_CRAFTER, "crafter poison victim"),
    "crafting": (CRAFTED, OTHER_CRAFTING, "poison victim"),
    "recipe": (EVERYTHING, {"architecture": MLP}, "benign victim"),
    "architecture": (EVERYTHING, {"architecture": "mlp"}, "backbone benign victim"),
    "backbone": (EVERYTHING, {"trainer": "transfer"}, "backbone benign victim"),
    "backbone that the attack knows": (FEATURES, {"trainer": "transfer"}, "backbone poison benign victim"),
    "clients": ({"trainer": FEDERATED}, {"trainer": "federated"}, "benign victim"),
    "clients that the attack knows": ({**DBA, "trainer": FEDERATED}, {"trainer": "federated"}, "poison benign victim"),
    "training of the attacker": (
        {"attack": "adaptive"}, {"attack": "{name: adaptive, params: {alpha: 0.1}}"}, "poison victim"
    ),
    "training of an attacker who does not poison": (
        {"attack": "trojannet"}, {"attack": "{name: trojannet, params: {steps: 7}}"}, "poison victim"
    ),
    "search": ({"attack": "natural"}, {"attack": "{name: natural, params: {epochs: 7}}"}, "poison"),
    "seed": (EVERYTHING, {"seeds": "1"}, "crafter backbone poison benign victim"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_which_keys_change_with(change: str, one: Callable[..., Cell]) -> None:
    before, changed, expected = CHANGES[change]
    first, second = one(**before), one(**{**before, **changed})
    assert [stage for stage, key in KEYS.items() if key(first) != key(second)] == expected.split()
    assert record_key(first) != record_key(second)


def test_attacks_and_networks_share_the_crafter(cells: Callable[..., list[Cell]]) -> None:
    attacks = "label_consistent, {name: label_consistent, as: other, params: {norm: l2, target: 3}}"
    chosen = cells(attack=attacks, architecture="{name: mlp}, nin", trainer=f"centralized, {TRANSFER}")
    assert len({crafter_key(cell) for cell in chosen}) == 1
    assert len({poison_key(cell) for cell in chosen}) == 2


def test_a_crafter_of_another_revision_makes_other_poison(
    one: Callable[..., Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = one(attack="label_consistent")
    keys = (crafter_key, poison_key, victim_key, record_key)
    old = {key: key(before) for key in keys}
    monkeypatch.setattr(RobustCrafter, "revision", RobustCrafter.revision + 1)
    after = one(attack="label_consistent")
    assert [key for key in keys if key(after) == old[key]] == []


# what a defender is told


@pytest.mark.parametrize(
    "axes",
    [
        {"attack": "{name: adaptive, params: {epochs: 1}}"},
        {"attack": "{name: trojannet, params: {steps: 500}}"},
        {**DBA, "trainer": FEDERATED},
        {"attack": "everything", "trainer": TRANSFER},
    ],
    ids=str,
)
def test_a_defense_is_not_told_by_attackers_who_train(
    axes: dict[str, str],
    one: Callable[..., Cell],
    store: Store,
    reachable: Callable[[object], list[object]],
    given_tasks: list[DefenseTask],
) -> None:
    made = stages(one(**axes), store)
    made.evaluate()
    things = reachable(given_tasks[0])
    assert [each for each in things if isinstance(each, (Stages, Store, Cell, Attack, PoisonedSamples, Trigger))] == []
    tensors = [each for each in things if isinstance(each, Tensor) and each.ndim]
    assert len(tensors) >= 4
    secrets = {len(indices) for part in made.poison() if len(indices := part.indices) > 16}
    assert not {len(tensor) for tensor in tensors} & secrets
    assert [tensor for tensor in tensors if len(tensor) == 1297 and tensor.dtype == torch.bool] == []


def test_time_of_the_benign_network_is_no_cost_of_a_victim_outside_the_cell(
    one: Callable[..., Cell], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = one(attack="everything", defense="abl")
    assert not has_stage(cell, "benign")
    made, running = stages(cell, store), []
    train_victim = made._train_victim

    def watched() -> Artifact:
        running.append(made.store.load_artifact("victim", benign_key(cell)))
        return train_victim()

    monkeypatch.setattr(made, "_train_victim", watched)
    made.victim()
    assert running[0] is not None


# what an attacker who trains may return


def test_another_structure_is_refused_unless_the_attack_says_which(one: Callable[..., Cell], store: Store) -> None:
    with pytest.raises(TypeError, match=r"not of the cell's architecture; override Attack\.adapt"):
        stages(one(attack="reshaped"), store).evaluate()
    record = stages(one(attack="adapted"), store).evaluate()
    assert record.status == "done"
    assert not list((store.root / "artifacts" / "victim").rglob(f"{victim_key(one(attack='reshaped'))}*"))


def test_the_benign_network_is_for_those_who_ask(one: Callable[..., Cell], store: Store) -> None:
    with pytest.raises(ConfigError, match=r"(?s)without declaring it.*starts_from_benign"):
        stages(one(attack="undeclared"), store).evaluate()


# all again


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axes", "kept"),
    [
        (EVERYTHING, ["backbone", "crafter", "data", "defense", "poison", "victim", "victim"]),
        ({"attack": "{name: natural, params: {epochs: 1}}"}, ["data", "defense", "poison", "search", "victim"]),
    ],
    ids=["every shared stage", "search"],
)
def test_all_again_means_every_stage_but_the_data(
    axes: dict[str, str], kept: list[str], one: Callable[..., Cell], bbn: Callable[..., Said], store: Store
) -> None:
    def written() -> dict[tuple[str, str], int]:
        paths = (store.root / "artifacts").rglob("*.safetensors")
        return {(path.parts[-3], path.name.partition(".")[0]): path.stat().st_mtime_ns for path in paths}

    run_here(pack_jobs([one(**axes)], store), store)
    before = written()
    assert sorted(stage for stage, _ in before) == kept
    said = bbn("run", "-j", "1", "--only", "all")
    assert (said.code, "1 done" in said.out) == (0, True)
    after = written()
    assert before.keys() == after.keys()
    assert {stage for stage, key in before if after[stage, key] == before[stage, key]} == {"data"}
