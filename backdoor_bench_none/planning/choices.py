"""Makes components from the entries of a benchmark file, or from the JSON of a job."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import ValidationError

from backdoor_bench_none.contracts.architecture import Activation, Architecture
from backdoor_bench_none.contracts.attack import Attack
from backdoor_bench_none.contracts.cell import Cell
from backdoor_bench_none.contracts.component import Choice, Component
from backdoor_bench_none.contracts.config import Config, Entry, Location
from backdoor_bench_none.contracts.dataset import Dataset
from backdoor_bench_none.contracts.defense import Defense
from backdoor_bench_none.contracts.executor import Executor
from backdoor_bench_none.contracts.metric import Metric
from backdoor_bench_none.contracts.recipe import Recipe
from backdoor_bench_none.contracts.trainer import Trainer
from backdoor_bench_none.errors import BenchError
from backdoor_bench_none.planning.faults import Faults, Selected, one_line
from backdoor_bench_none.registry.components import Registry, explain, kind_of
from backdoor_bench_none.seeds import canonical_json

C = TypeVar("C", bound=Component)
#: axes whose entries and defaults may have a recipe
RECIPE_AXES = ("dataset", "architecture", "trainer")


@dataclass
class ChoiceMaker:
    """Makes the components of a benchmark file; their faults go into `faults`."""

    config: Config
    registry: Registry
    faults: Faults
    #: the choices made so far, by base class, name, label and parameters
    _made: dict[tuple[type, str, str, str], Choice[Any]] = field(default_factory=dict)

    def make(self, base: type[C], entries: list[Entry], location: Location) -> list[Selected[C]]:
        """One choice per entry and sweep value."""
        kind = kind_of(base)
        choices: list[Selected[C]] = []
        for index, entry in enumerate(entries):
            where = (*location, index)
            if entry.recipe is not None and kind not in RECIPE_AXES:
                self.faults.add((*where, "recipe"), f"a recipe goes with {' or '.join(RECIPE_AXES)}, not {kind}")
            for params, label, positions in _swept(entry):
                defaults = parameter_defaults(self.config, kind, entry.name)
                locations: dict[str, Location]
                locations = {name: ("defaults", kind, entry.name, name) for name in defaults}
                locations |= {name: (*where, "params", name) for name in entry.params}
                locations |= {name: (*where, "sweep", name, position) for name, position in positions.items()}
                choice = self._choose(base, entry.name, label, {**defaults, **entry.params, **params}, where, locations)
                if choice is None:
                    continue
                if any(other.choice.label == label for other in choices):
                    self.faults.add(where, f"there are two entries '{label}'; name one of them with 'as'")
                choices.append(Selected(choice, entry, where))
        return choices

    def _choose(
        self, base: type[C], name: str, label: str, params: Mapping[str, Any], where: Location,
        locations: Mapping[str, Location],
    ) -> Choice[C] | None:  # fmt: skip
        """The choice, made once however many blocks of the file have it; None if it has faults."""
        key = (base, name, label, repr(params))
        if key not in self._made:
            component = self.create(base, name, params, where, locations)
            if component is None:
                return None
            self._made[key] = Choice(kind_of(base), name, label, component)
        return self._made[key]

    def create(
        self, base: type[C], name: str, params: Mapping[str, Any], where: Location, locations: Mapping[str, Location]
    ) -> C | None:
        """The component; None if it has faults.

        Each fault is noted at the location of its parameter, and at `where` if that has none.
        """
        try:
            loaded = self.registry.load_as(base, name)
        except BenchError as error:
            self.faults.add((*where, "name"), one_line(error))
            return None
        try:
            component = loaded(**params)
        except ValidationError as error:
            for path, message in dict.fromkeys(explain(error, loaded)):
                location = locations.get(path.split(".")[0], where)
                self.faults.add(location, f"{kind_of(base)} '{name}': {path}: {message}")
            return None
        try:
            canonical_json(component.model_dump(mode="json"))
        except (TypeError, ValueError) as error:
            self.faults.add(where, f"{kind_of(base)} '{name}': a parameter that JSON cannot hold: {error}")
            return None
        return component

    def check_executor(self) -> None:
        """Note the faults of the executor's entry."""
        entry, where = self.config.executor, ("executor",)
        written = (self.faults.source.value or {}).get("executor")
        parent: Location = where
        if isinstance(written, dict) and "params" in written:
            parent = (*where, "params")
        self.create(Executor, entry.name, entry.params, where, {name: (*parent, name) for name in entry.params})


def parameter_defaults(config: Config, kind: str, name: str) -> dict[str, Any]:
    """The parameters of a component in the section `defaults`, without its recipe."""
    values = config.defaults.get(kind, {}).get(name, {})
    return {key: value for key, value in values.items() if key != "recipe"}


def _swept(entry: Entry) -> Iterator[tuple[dict[str, Any], str, dict[str, int]]]:
    """The parameters of each combination of an entry's sweep, its label, and the positions of its values by name."""
    label = entry.label or entry.name
    for values in itertools.product(*map(enumerate, entry.sweep.values())):
        swept = {name: value for name, (_, value) in zip(entry.sweep, values, strict=True)}
        positions = {name: position for name, (position, _) in zip(entry.sweep, values, strict=True)}
        if swept:
            values_text = ",".join(f"{name}={value}" for name, value in swept.items())
            yield swept, f"{label}[{values_text}]", positions
        else:
            yield swept, label, positions


def cell_from_spec(spec: Mapping[str, Any], registry: Registry) -> Cell:
    """The cell of a `Cell.spec`."""
    dataset = choice_from_spec(Dataset, spec["dataset"], registry)
    return Cell(
        dataset=dataset,
        attack=choice_from_spec(Attack, spec["attack"], registry),
        defense=choice_from_spec(Defense, spec["defense"], registry),
        architecture=choice_from_spec(Architecture, spec["architecture"], registry),
        activation=choice_from_spec(Activation, spec["activation"], registry),
        trainer=choice_from_spec(Trainer, spec["trainer"], registry),
        seed=spec["seed"],
        recipe=Recipe(**spec["recipe"]),
        info=dataset.component.info(),
        fingerprint=spec["fingerprint"],
        metrics=tuple(choice_from_spec(Metric, metric, registry) for metric in spec["metrics"]),
        recipe_deviation=spec["recipe_deviation"],
    )


def choice_from_spec(base: type[C], spec: Mapping[str, Any], registry: Registry) -> Choice[C]:
    """The choice of a `Choice.spec`."""
    component = registry.create_as(base, spec["name"], spec["params"])
    return Choice(kind_of(base), spec["name"], spec["label"], component)
