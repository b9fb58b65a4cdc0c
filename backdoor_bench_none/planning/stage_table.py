"""The table of stages between a data set and a record: their names, folders, content keys, and what they read.

Jobs, costs, progress, blame, verification and reports are loops over this table; `run/stages.py` has one method for
each row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import TypeVar, cast

from backdoor_bench_none.contracts.cell import AXES, Cell
from backdoor_bench_none.seeds import canonical_json, content_key

#: bumped when the evaluation changes results: part of every record's key
EVALUATION_REVISION = 1
T = TypeVar("T")


@dataclass(frozen=True)
class Stage:
    """One row of the table."""

    #: its name in jobs, costs and tables, and that of its method
    name: str
    #: the folder of its artifact below `artifacts`; None for the last, whose result is the record
    folder: str | None
    #: its content key; None for a cell without this stage
    key: Callable[[Cell], str | None]
    #: the names of the stages it reads, including those that a cell may lack
    needs: Callable[[Cell], tuple[str, ...]]
    #: the name of its result in messages, in the singular
    words: str
    #: whether one job computes it for all cells with this key; other stages are part of a cell's own job
    shared: bool
    #: the axes whose components are at work in it
    axes: tuple[str, ...]
    #: whether it trains a network that cells share, and so takes long
    trains: bool = False


def _once(make: Callable[[Cell], T]) -> Callable[[Cell], T]:
    """Decorates a function of a cell, which is then computed once for each."""
    name = make.__name__

    @wraps(make)
    def look_up(cell: Cell) -> T:
        if name not in cell.memo:
            cell.memo[name] = make(cell)
        return cast("T", cell.memo[name])

    return look_up


# The keys. Seeds are derived from them, so that equal stages draw equal random numbers.


@_once
def data_key(cell: Cell) -> str:
    """The decoded data set."""
    return content_key("data", cell.dataset.identity, cell.fingerprint)


@_once
def crafter_key(cell: Cell) -> str | None:
    """The network that the attack crafts with; None if it needs none."""
    crafter = cell.attack.component.crafted_with()
    if crafter is None:
        return None
    name = f"{type(crafter).__module__}:{type(crafter).__qualname__}"
    return content_key("crafter", data_key(cell), name, canonical_json(crafter.identity()), cell.seed)


@_once
def backbone_key(cell: Cell) -> str | None:
    """The frozen backbone that every network starts from; None if the trainer has none."""
    if not cell.trainer.component.has_backbone:
        return None
    return content_key("backbone", data_key(cell), initial_key(cell), cell.trainer.identity)


@_once
def poison_key(cell: Cell) -> str:
    """The poisoned training samples and the triggered test samples."""
    attack = cell.attack.component
    backbone, clients = None, None
    if attack.needs_backbone:
        backbone = backbone_key(cell)
    if attack.needs_clients:
        clients = cell.trainer.identity
    parts = (crafter_key(cell), backbone, clients)
    return content_key("poison", data_key(cell), cell.attack.identity, cell.seed, *parts)


@_once
def train_key(cell: Cell) -> str:
    """The training set as a defender gets it."""
    if cell.attack.component.poisons:
        return poison_key(cell)
    return data_key(cell)


@_once
def initial_key(cell: Cell) -> str:
    """The initial weights: equal for all attacks and defenses of a seed."""
    parts = (cell.dataset.identity, cell.architecture.identity, cell.activation.identity)
    return content_key("initial", *parts, cell.seed)


@_once
def victim_key(cell: Cell) -> str:
    """The network trained on the poisoned data without a defense."""
    attacker = cell.attack.identity if cell.attack.component.controls_training else None
    return _trained_key(cell, train_key(cell), attacker)


@_once
def benign_key(cell: Cell) -> str:
    """The network trained on clean data: the victim of the attack `clean`."""
    return _trained_key(cell, data_key(cell), None)


def _trained_key(cell: Cell, data: str, attacker: str | None) -> str:
    parts = (cell.architecture.identity, cell.activation.identity, cell.trainer.identity)
    return content_key("victim", data, attacker, *parts, cell.recipe.identity, cell.seed)


@_once
def defense_key(cell: Cell) -> str:
    """The defended network and what the defense reports."""
    return content_key("defense", victim_key(cell), cell.defense.identity)


@_once
def search_key(cell: Cell) -> str:
    """The triggers that the attack finds in the defended network."""
    return content_key("search", defense_key(cell), cell.attack.identity)


@_once
def record_key(cell: Cell) -> str:
    """The cell's record."""
    metrics = [metric.identity for metric in cell.metrics]
    return content_key("cell", defense_key(cell), poison_key(cell), EVALUATION_REVISION, metrics)


# The keys of stages that only some cells have.


def _victim_key_if_used(cell: Cell) -> str | None:
    if cell.defense.component.starts_from_victim:
        return victim_key(cell)
    return None


def _benign_key_if_used(cell: Cell) -> str | None:
    if cell.defense.component.starts_from_victim and cell.attack.component.starts_from_benign:
        return benign_key(cell)
    return None


def _search_key_if_used(cell: Cell) -> str | None:
    if cell.attack.component.searches:
        return search_key(cell)
    return None


def _needs_of_poison(cell: Cell) -> tuple[str, ...]:
    if cell.attack.component.needs_backbone:
        return ("data", "crafter", "backbone")
    return ("data", "crafter")


def _always(*names: str) -> Callable[[Cell], tuple[str, ...]]:
    return lambda cell: names


NETWORK = ("architecture", "activation", "trainer")

#: all stages, each after those it needs
STAGES: tuple[Stage, ...] = (
    Stage("data", "data", data_key, _always(), "data set", True, ("dataset",)),
    Stage("crafter", "crafter", crafter_key, _always("data"), "crafting network", True, ("attack", "dataset"), True),
    Stage("backbone", "backbone", backbone_key, _always("data"), "backbone", True, (*NETWORK, "dataset"), True),
    Stage("poison", "poison", poison_key, _needs_of_poison, "poisoned set", True, ("attack",)),
    Stage("benign", "victim", _benign_key_if_used, _always("data", "backbone"), "benign network", True, NETWORK, True),
    Stage(
        "victim", "victim", _victim_key_if_used, _always("data", "poison", "backbone", "benign"), "victim", True,
        ("attack", *NETWORK), True,
    ),
    Stage(
        "defense", "defense", defense_key, _always("data", "poison", "backbone", "victim"), "defended network", False,
        AXES,
    ),
    Stage("search", "search", _search_key_if_used, _always("data", "defense"), "trigger search", False, AXES),
    Stage("evaluate", None, record_key, _always("data", "poison", "defense", "search"), "record", False, AXES),
)  # fmt: skip


def find_stage(name: str) -> Stage:
    """The stage with this name; `KeyError` if there is none."""
    for stage in STAGES:
        if stage.name == name:
            return stage
    raise KeyError(name)


@_once
def stage_keys(cell: Cell) -> Mapping[str, str]:
    """The content keys of the stages of a cell, by name, each after those it needs."""
    keys = ((stage.name, stage.key(cell)) for stage in STAGES)
    return {name: key for name, key in keys if key is not None}


def stages_of(cell: Cell) -> tuple[Stage, ...]:
    """The stages of a cell, each after those it needs."""
    return tuple(map(find_stage, stage_keys(cell)))


def has_stage(cell: Cell, name: str) -> bool:
    """Whether a cell has the stage with this name; `KeyError` if no cell has."""
    return find_stage(name).name in stage_keys(cell)


def stage_key(cell: Cell, name: str) -> str:
    """The content key of a stage of the cell; `ValueError` if the cell does not have it."""
    if not has_stage(cell, name):
        raise ValueError(f"{cell.title} has no stage {name}")
    return stage_keys(cell)[name]


def needs_of(stage: Stage, cell: Cell) -> tuple[Stage, ...]:
    """The stages of the cell that a stage reads."""
    return tuple(find_stage(name) for name in stage.needs(cell) if has_stage(cell, name))


def uses_device(cell: Cell, name: str) -> bool:
    """Whether a stage of the cell computes with networks: not reading data, nor poisoning that only stamps."""
    if name == "poison":
        return cell.attack.component.needs_backbone or has_stage(cell, "crafter")
    return name != "data"


def artifact_keys(cell: Cell) -> dict[str, str]:
    """The content keys of all artifacts of a cell, by the name of the stage."""
    return {name: key for name, key in stage_keys(cell).items() if find_stage(name).folder is not None}


def in_order(names: Iterable[str]) -> list[str]:
    """Names of stages in the order of the table; names that are not in it come last, sorted."""
    order = [stage.name for stage in STAGES]
    listed = set(names)
    return [*(name for name in order if name in listed), *sorted(listed.difference(order))]
