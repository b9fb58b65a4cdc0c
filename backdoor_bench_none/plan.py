"""From a benchmark file to the list of its cells: everything is checked here, before any work starts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from backdoor_bench_none.api import Architecture, Attack, Dataset, DatasetInfo
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


@dataclass
class _Planner:
    config: Config
    source: Source
    registry: Registry
    faults: list[Fault] = field(default_factory=list)
    _recipes: dict[tuple[int, int], Recipe] = field(default_factory=dict)

    def choices(self, kind: str, entries: list[Entry], location: Location) -> list[tuple[Choice, Entry, Location]]:
        """One choice per entry and sweep value; faults are kept."""
        made: list[tuple[Choice, Entry, Location]] = []
        for index, entry in enumerate(entries):
            at = (*location, index)
            for params, label in _swept(entry):
                with_defaults = {**self.defaults(kind, entry.name), **entry.params, **params}
                if component := self.create(kind, entry.name, with_defaults, at):
                    choice = Choice(kind, entry.name, label, component)
                    if any(other.label == label for other, _, _ in made):
                        self.faults.append((at, f"there are two entries '{label}'; name one of them with 'as'"))
                    made.append((choice, entry, at))
        return made

    def create(self, kind: str, name: str, params: Mapping[str, Any], at: Location) -> Component | None:
        """The component, or None with its faults noted: each at the parameter where it stands."""
        try:
            loaded = self.registry.load(kind, name)
            return loaded(**params)
        except ValidationError as error:
            for path, message in explain(error, loaded):
                head = path.split(".")[0]
                self.faults.append((self.where(kind, name, head, at), f"{kind} '{name}': {path}: {message}"))
        except BenchError as error:
            self.faults.append(((*at, "name"), str(error).replace("\nhint: ", "; ")))
        return None

    def where(self, kind: str, name: str, parameter: str, at: Location) -> Location:
        """The place of a parameter: in the entry, or in `defaults`."""
        in_defaults = parameter in self.config.defaults.get(kind, {}).get(name, {})
        return ("defaults", kind, name, parameter) if in_defaults else (*at, "params", parameter)

    def defaults(self, kind: str, name: str) -> dict[str, Any]:
        """The parameters `defaults` gives to a component, without its recipe."""
        return {k: v for k, v in self.config.defaults.get(kind, {}).get(name, {}).items() if k != "recipe"}

    def recipe(self, dataset: tuple[Choice, Entry, Location], architecture: tuple[Choice, Entry, Location]) -> Recipe:
        """The recipe of a data set and an architecture: theirs, then `defaults`, then the entries, the later
        winning.
        """
        cache_key = (id(dataset[0]), id(architecture[0]))
        if cache_key not in self._recipes:
            self._recipes[cache_key] = self._make_recipe(dataset, architecture)
        return self._recipes[cache_key]

    def _make_recipe(
        self, dataset: tuple[Choice, Entry, Location], architecture: tuple[Choice, Entry, Location]
    ) -> Recipe:
        network = cast("Architecture", architecture[0].component)
        fields = {**cast("Dataset", dataset[0].component).recipe(), **network.recipe(dataset[0].name)}
        for choice, entry, at in (dataset, architecture):
            in_defaults = self.config.defaults.get(choice.kind, {}).get(choice.name, {}).get("recipe")
            places: list[tuple[Any, Location]] = [
                (in_defaults, ("defaults", choice.kind, choice.name, "recipe")),
                (entry.recipe, (*at, "recipe")),
            ]
            for given, place in places:
                fields.update(self._given_recipe(given, architecture[0].name, place))
        try:
            return Recipe(**fields)
        except ValidationError as error:
            self.faults += [((*place, *path.split(".")), message) for path, message in explain(error, Recipe)]
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


def _swept(entry: Entry) -> Iterator[tuple[dict[str, Any], str]]:
    """The parameters and the label of every combination of an entry's sweep."""
    label = entry.label or entry.name
    for values in itertools.product(*entry.sweep.values()):
        swept = dict(zip(entry.sweep, values, strict=True))
        shown = ",".join(f"{name}={value}" for name, value in swept.items())
        yield swept, f"{label}[{shown}]" if shown else label


def make_plan(path: Path, registry: Registry, *, need_data: bool = False) -> Plan:
    """The plan of the benchmark file at `path`; `need_data` downloads what is absent, and fails where that is not
    possible.
    """
    config, source = read_config(path)
    return plan_config(config, source, registry, need_data=need_data)


def plan_config(config: Config, source: Source, registry: Registry, *, need_data: bool = False) -> Plan:
    """As `make_plan`, for a parsed file."""
    planner = _Planner(config, source, registry)
    _check_defaults(planner)
    metrics = tuple(choice for choice, _, _ in planner.choices("metric", config.metrics, ("metrics",)))
    planner.create("executor", config.executor.name, config.executor.params, ("executor",))
    blocks: list[tuple[Matrix, Location]] = [(config.matrix, ("matrix",))]
    blocks += [(block, ("include", index)) for index, block in enumerate(config.include)]
    axes = [{axis: planner.choices(axis, getattr(m, axis), (*at, axis)) for axis in AXES} for m, at in blocks]
    if planner.faults:
        raise source.fail(planner.faults)
    data = _DataFacts(need_data)
    cells = [cell for block in axes for cell in _expand(block, planner, data, metrics)]
    if planner.faults:
        raise source.fail(planner.faults)
    kept = [cell for cell in cells if not any(_excludes(rule, cell) for rule in config.exclude)]
    unique = list({cell.key: cell for cell in kept}.values())
    registry.plugins.modify_plan(config, unique)
    if not unique:
        raise ConfigError(f"{source.name}: the matrix is empty: 'exclude' leaves no cell")
    skipped = {cell.key: reason for cell in unique if (reason := _skip_reason(cell, registry)) is not None}
    return Plan(config, unique, skipped, len(cells) - len(kept), tuple(data.absent))


def _check_defaults(planner: _Planner) -> None:
    for kind, components in planner.config.defaults.items():
        if kind not in AXES:
            planner.faults.append((("defaults", kind), f"unknown axis, {did_you_mean(kind, AXES)}"))
            continue
        known = planner.registry.names(kind)
        for name in components:
            if name not in known:
                planner.faults.append((("defaults", kind, name), f"unknown {kind}, {did_you_mean(name, known)}"))


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
    axes: Mapping[str, list[tuple[Choice, Entry, Location]]],
    planner: _Planner,
    data: _DataFacts,
    metrics: tuple[Choice, ...],
) -> Iterator[Cell]:
    for dataset in axes["dataset"]:
        try:
            info, fingerprint = data.of(dataset[0])
        except BenchError as error:
            planner.faults.append((dataset[2], str(error).replace("\nhint: ", "; ")))
            continue
        attacks = [resolved for attack in axes["attack"] if (resolved := _resolve(attack, info, planner))]
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
                dataset[0], attack, defense[0], architecture[0], activation[0], trainer[0],
                seed, planner.recipe(dataset, architecture), info, fingerprint, metrics,
            )  # fmt: skip


def _resolve(attack: tuple[Choice, Entry, Location], info: DatasetInfo, planner: _Planner) -> Choice | None:
    """The attack with the data set's defaults filled in and checked against it."""
    choice, _, at = attack
    resolved = cast("Attack", choice.component).resolve(info)
    try:
        resolved.check(info)
    except ConfigError as error:
        planner.faults.append((at, str(error).replace("\nhint: ", "; ")))
        return None
    return Choice(choice.kind, choice.name, choice.label, resolved)


def _excludes(rule: Exclude, cell: Cell) -> bool:
    named = {axis: wanted for axis in AXES if (wanted := getattr(rule, axis)) is not None}
    if rule.seed is not None and cell.seed not in rule.seed:
        return False
    return bool(named or rule.seed) and all(
        {getattr(cell, axis).label, getattr(cell, axis).name} & set(wanted) for axis, wanted in named.items()
    )


def _skip_reason(cell: Cell, registry: Registry) -> str | None:
    reasons = (getattr(cell, axis).component.skip(cell) for axis in AXES)
    return next((reason for reason in reasons if reason is not None), None) or registry.plugins.cell_skip(cell)
