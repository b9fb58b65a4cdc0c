"""From a benchmark file to the list of its cells: everything is checked here, before any work starts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import ValidationError

from backdoor_bench_none.api import Architecture, Attack, Dataset, DatasetInfo, Trainer
from backdoor_bench_none.cell import AXES, Cell, Choice
from backdoor_bench_none.component import Component
from backdoor_bench_none.config import Config, Entry, Exclude, Fault, Location, Matrix, Source, read_config
from backdoor_bench_none.errors import BenchError, ConfigError, DatasetError, did_you_mean
from backdoor_bench_none.recipe import NAMED_RECIPES, Recipe, named_recipe
from backdoor_bench_none.registry import Registry, explain


@dataclass(frozen=True)
class Plan:
    """All cells in the order of tables; `skipped` says by key why a cell is not run."""

    config: Config
    cells: list[Cell]
    skipped: Mapping[str, str]
    excluded: int
    absent: tuple[str, ...] = ()

    def select(self, wanted: Callable[[Cell], bool]) -> Plan:
        """The same plan with only the wanted cells."""
        return Plan(
            self.config, [cell for cell in self.cells if wanted(cell)], self.skipped, self.excluded, self.absent
        )


T = TypeVar("T")
#: axes whose entries and defaults may have a recipe
RECIPE_AXES = ("dataset", "architecture", "trainer")


@dataclass(frozen=True)
class Made:
    """A choice, the entry it was made of, and where that stands."""

    choice: Choice
    entry: Entry
    at: Location


@dataclass
class _Planner:
    config: Config
    source: Source
    registry: Registry
    faults: list[Fault] = field(default_factory=list)
    _recipes: dict[tuple[int, int, int], Recipe] = field(default_factory=dict)

    def choices(self, kind: str, entries: list[Entry], location: Location) -> list[Made]:
        """One choice per entry and sweep value; faults are kept."""
        made: list[Made] = []
        for index, entry in enumerate(entries):
            at = (*location, index)
            if entry.recipe is not None and kind not in RECIPE_AXES:
                self.faults.append(((*at, "recipe"), f"a recipe goes with {' or '.join(RECIPE_AXES)}, not {kind}"))
            for params, label, positions in _swept(entry):
                places: dict[str, Location]
                places = {name: ("defaults", kind, entry.name, name) for name in self.defaults(kind, entry.name)}
                places |= {name: (*at, "params", name) for name in entry.params}
                places |= {name: (*at, "sweep", name, position) for name, position in positions.items()}
                given = {**self.defaults(kind, entry.name), **entry.params, **params}
                if component := self.create(kind, entry.name, given, at, places):
                    if any(other.choice.label == label for other in made):
                        self.faults.append((at, f"there are two entries '{label}'; name one of them with 'as'"))
                    made.append(Made(Choice(kind, entry.name, label, component), entry, at))
        return made

    def create(
        self, kind: str, name: str, params: Mapping[str, Any], at: Location, places: Mapping[str, Location]
    ) -> Component | None:
        """The component, or None with its faults noted: each at the place of its parameter."""
        try:
            loaded = self.registry.load(kind, name)
        except BenchError as error:
            self.faults.append(((*at, "name"), _one_line(error)))
            return None
        try:
            return loaded(**params)
        except ValidationError as error:
            for path, message in dict.fromkeys(explain(error, loaded)):
                place = places.get(path.split(".")[0], at)
                self.faults.append((place, f"{kind} '{name}': {path}: {message}"))
        return None

    def defaults(self, kind: str, name: str) -> dict[str, Any]:
        """The parameters `defaults` gives to a component, without its recipe."""
        return {k: v for k, v in self.config.defaults.get(kind, {}).get(name, {}).items() if k != "recipe"}

    def recipe(self, dataset: Made, architecture: Made, trainer: Made) -> Recipe:
        """The recipe of a data set, an architecture and a trainer.

        Later ones win: their own in this order, then `defaults` of each, then the entry of each.
        """
        cache_key = (id(dataset.choice), id(architecture.choice), id(trainer.choice))
        if cache_key not in self._recipes:
            self._recipes[cache_key] = self._make_recipe(dataset, architecture, trainer)
        return self._recipes[cache_key]

    def _make_recipe(self, dataset: Made, architecture: Made, trainer: Made) -> Recipe:
        network = cast("Architecture", architecture.choice.component)
        own = {
            **(_check(dataset, self, cast("Dataset", dataset.choice.component).recipe) or {}),
            **(_check(architecture, self, partial(network.recipe, dataset.choice.name)) or {}),
            **(_check(trainer, self, cast("Trainer", trainer.choice.component).recipe) or {}),
        }
        given: list[tuple[Any, Location]] = []
        for choice in (dataset.choice, architecture.choice, trainer.choice):
            found = self.config.defaults.get(choice.kind, {}).get(choice.name, {}).get("recipe")
            given.append((found, ("defaults", choice.kind, choice.name, "recipe")))
        given += [(made.entry.recipe, (*made.at, "recipe")) for made in (dataset, architecture, trainer)]
        fields, places = dict(own), dict[str, Location]()
        for recipe, place in given:
            found = self._given_recipe(recipe, architecture.choice.name, place)
            fields.update(found)
            places.update({name: (*place, name) for name in found})
        try:
            return Recipe(**fields)
        except ValidationError as error:
            for path, message in explain(error, Recipe):
                self.faults.append((places.get(path.split(".")[0], architecture.at), f"recipe: {path}: {message}"))
            return Recipe()

    def _given_recipe(self, given: object, architecture: str, place: Location) -> dict[str, Any]:
        """A recipe's name, or its fields, of which `base` names a recipe to start from."""
        fields: dict[str, Any] = (
            {"base": given} if isinstance(given, str) else dict(cast("dict[str, Any]", given or {}))
        )
        base = fields.pop("base", "default")
        if base not in NAMED_RECIPES:
            self.faults.append((place, f"unknown recipe '{base}', {did_you_mean(str(base), NAMED_RECIPES)}"))
            return {}
        return {**named_recipe(base, architecture), **fields}


def _swept(entry: Entry) -> Iterator[tuple[dict[str, Any], str, dict[str, int]]]:
    """The parameters, the label and the positions in their lists of every combination of an entry's sweep."""
    label = entry.label or entry.name
    for values in itertools.product(*map(enumerate, entry.sweep.values())):
        swept = {name: value for name, (_, value) in zip(entry.sweep, values, strict=True)}
        positions = {name: position for name, (position, _) in zip(entry.sweep, values, strict=True)}
        shown = ",".join(f"{name}={value}" for name, value in swept.items())
        yield swept, f"{label}[{shown}]" if shown else label, positions


def _one_line(error: BenchError) -> str:
    return str(error).replace("\nhint: ", "; ")


def make_plan(path: Path, registry: Registry, *, need_data: bool = False) -> Plan:
    """The plan of the benchmark file at `path`; `need_data` downloads
    what is absent, and fails where that is not possible.
    """
    config, source = read_config(path)
    return plan_config(config, source, registry, need_data=need_data)


def plan_config(config: Config, source: Source, registry: Registry, *, need_data: bool = False) -> Plan:
    """As `make_plan`, for a parsed file."""
    planner = _Planner(config, source, registry)
    _check_defaults(planner)
    metrics = tuple(made.choice for made in planner.choices("metric", config.metrics, ("metrics",)))
    executor, at = config.executor, ("executor",)
    written = (source.value or {}).get("executor")
    below: Location = (*at, "params") if isinstance(written, dict) and "params" in written else at
    planner.create("executor", executor.name, executor.params, at, {name: (*below, name) for name in executor.params})
    blocks: list[tuple[Matrix, Location]] = [(config.matrix, ("matrix",))]
    blocks += [(block, ("include", index)) for index, block in enumerate(config.include)]
    axes = [{axis: planner.choices(axis, getattr(m, axis), (*here, axis)) for axis in AXES} for m, here in blocks]
    if planner.faults:
        raise source.fail(planner.faults)
    data = _DataFacts(need_data)
    cells = [cell for block in axes for cell in _expand(block, planner, data, metrics)]
    if planner.faults:
        raise source.fail(planner.faults)
    faults = [*_twins(cells), *_idle_exclusions(config, cells), *_empty_holdouts(cells)]
    if faults:
        raise source.fail(faults)
    kept = [cell for cell in cells if not any(_excludes(rule, cell) for rule in config.exclude)]
    if not kept:
        raise ConfigError(f"{source.name}: the matrix is empty: 'exclude' leaves no cell")
    unique = list({cell.key: cell for cell in kept}.values())
    registry.plugins.modify_plan(config, unique)
    if not unique:
        raise ConfigError(f"{source.name}: the matrix is empty: a plugin's bbn_modify_plan leaves no cell")
    skipped = {cell.key: reason for cell in unique if (reason := _skip_reason(cell, registry)) is not None}
    return Plan(config, unique, skipped, len(cells) - len(kept), tuple(data.absent))


def _twins(cells: list[Cell]) -> list[Fault]:
    """Different cells of one title would be averaged as if they were
    seeds; one cell of two titles would be shown once.
    """
    keys, titles, faults = dict[str, str](), dict[str, str](), list[Fault]()
    for cell in cells:
        if keys.setdefault(cell.title, cell.key) != cell.key:
            faults.append((("include",), f"two entries make different cells {cell.title}; name one with 'as'"))
        if titles.setdefault(cell.key, cell.title) != cell.title:
            faults.append((("matrix",), f"{titles[cell.key]} and {cell.title} are the same cell; leave one out"))
    return faults[:10]


def _empty_holdouts(cells: list[Cell]) -> list[Fault]:
    """Defenses that ask for clean data and would get none."""
    found = {
        (cell.defense.label, cell.dataset.label): cell.info.train_size
        for cell in cells
        if (fraction := cell.the_defense.clean_fraction) > 0 and int(fraction * cell.info.train_size) == 0
    }
    return [
        (("matrix", "defense"), f"clean_fraction of {defense} selects none of the {size} training images of {dataset}")
        for (defense, dataset), size in found.items()
    ]


def _idle_exclusions(config: Config, cells: list[Cell]) -> list[Fault]:
    """Names in `exclude` that no cell has: a rule with one of them would exclude nothing, silently."""
    faults: list[Fault] = []
    for axis in AXES:
        names = {name for cell in cells for name in (getattr(cell, axis).label, getattr(cell, axis).name)}
        for index, rule in enumerate(config.exclude):
            for name in getattr(rule, axis) or ():
                if name not in names:
                    message = f"no cell has the {axis} '{name}', {did_you_mean(name, names)}"
                    faults.append((("exclude", index, axis), message))
    return faults


def _check_defaults(planner: _Planner) -> None:
    for kind, components in planner.config.defaults.items():
        if kind not in AXES:
            planner.faults.append((("defaults", kind), f"unknown axis, {did_you_mean(kind, AXES)}"))
            continue
        known = planner.registry.names(kind)
        for name, values in components.items():
            if name not in known:
                planner.faults.append((("defaults", kind, name), f"unknown {kind}, {did_you_mean(name, known)}"))
            if "recipe" in values and kind not in RECIPE_AXES:
                place = ("defaults", kind, name, "recipe")
                planner.faults.append((place, f"a recipe goes with {' or '.join(RECIPE_AXES)}, not {kind}"))


@dataclass
class _DataFacts:
    """The facts and the fingerprint of every data set, each looked up once."""

    need_data: bool
    absent: list[str] = field(default_factory=list)
    _known: dict[int, tuple[DatasetInfo, str | None]] = field(default_factory=dict)

    def of(self, choice: Choice) -> tuple[DatasetInfo, str | None]:
        if id(choice) not in self._known:
            self._known[id(choice)] = self._look_up(choice)
        return self._known[id(choice)]

    def _look_up(self, choice: Choice) -> tuple[DatasetInfo, str | None]:
        dataset = cast("Dataset", choice.component)
        if self.need_data:
            dataset.prepare()
        try:
            fingerprint = dataset.fingerprint()
        except DatasetError:
            if self.need_data:
                raise
            self.absent.append(choice.label)
            fingerprint = None
        return dataset.info(), fingerprint


def _expand(
    axes: Mapping[str, list[Made]], planner: _Planner, data: _DataFacts, metrics: tuple[Choice, ...]
) -> Iterator[Cell]:
    for dataset in axes["dataset"]:
        try:
            info, fingerprint = data.of(dataset.choice)
        except BenchError as error:
            planner.faults.append((dataset.at, _one_line(error)))
            continue
        for made in axes["trainer"]:
            _check(made, planner, partial(cast("Trainer", made.choice.component).check, info))
        trainers = [cast("Trainer", made.choice.component) for made in axes["trainer"]]
        attacks = [resolved for attack in axes["attack"] if (resolved := _resolve(attack, info, trainers, planner))]
        rest = (
            attacks,
            axes["architecture"],
            axes["activation"],
            axes["trainer"],
            axes["defense"],
            planner.config.seeds,
        )
        for attack, architecture, activation, trainer, defense, seed in itertools.product(*rest):
            yield Cell(
                dataset.choice, attack, defense.choice, architecture.choice, activation.choice, trainer.choice,
                seed, planner.recipe(dataset, architecture, trainer), info, fingerprint, metrics,
            )  # fmt: skip


def _resolve(made: Made, info: DatasetInfo, trainers: list[Trainer], planner: _Planner) -> Choice | None:
    """The attack with the data set's defaults filled in, checked against it and against the trainers."""

    def resolve() -> Attack:
        resolved = cast("Attack", made.choice.component).resolve(info)
        resolved.check(info)
        for trainer in trainers:
            resolved.check_trainer(trainer)
        return resolved

    resolved = _check(made, planner, resolve)
    return None if resolved is None else replace(made.choice, component=resolved)


def _check(made: Made, planner: _Planner, check: Callable[[], T]) -> T | None:
    """What `check` returns; None with the fault noted if it raises."""
    try:
        return check()
    except BenchError as error:
        planner.faults.append((made.at, _one_line(error)))
    except Exception as error:  # a stranger's component
        kind, name = made.choice.kind, made.choice.name
        provider = planner.registry.entry(kind, name).provider
        planner.faults.append((made.at, f"{kind} '{name}' of {provider}: {type(error).__name__}: {error}"))
    return None


def _excludes(rule: Exclude, cell: Cell) -> bool:
    named = {axis: wanted for axis in AXES if (wanted := getattr(rule, axis)) is not None}
    if rule.seed is not None and cell.seed not in rule.seed:
        return False
    return bool(named or rule.seed) and all(
        {getattr(cell, axis).label, getattr(cell, axis).name} & set(wanted) for axis, wanted in named.items()
    )


def _skip_reason(cell: Cell, registry: Registry) -> str | None:
    reasons = (_reason_of(getattr(cell, axis), cell, registry) for axis in AXES)
    return next((reason for reason in reasons if reason is not None), None) or registry.plugins.cell_skip(cell)


def _reason_of(choice: Choice, cell: Cell, registry: Registry) -> str | None:
    try:
        return choice.component.skip(cell)
    except Exception as error:  # a stranger's component
        provider = registry.entry(choice.kind, choice.name).provider
        return f"{choice.kind} '{choice.name}' of plugin {provider}: skip raised {type(error).__name__}: {error}"
