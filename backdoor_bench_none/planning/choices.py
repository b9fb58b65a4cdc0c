"""From the entries of a benchmark file, or from a job's JSON, to components."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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

C = TypeVar("C", bound=Component)
#: axes whose entries and defaults may have a recipe
RECIPE_AXES = ("dataset", "architecture", "trainer")


@dataclass
class ChoiceMaker:
    """Makes the components that a benchmark file asks for; their faults are noted in `faults`."""

    config: Config
    registry: Registry
    faults: Faults

    def make(self, base: type[C], entries: list[Entry], location: Location) -> list[Selected[C]]:
        """One choice per entry and sweep value."""
        kind = kind_of(base)
        made: list[Selected[C]] = []
        for index, entry in enumerate(entries):
            place = (*location, index)
            if entry.recipe is not None and kind not in RECIPE_AXES:
                self.faults.add((*place, "recipe"), f"a recipe goes with {' or '.join(RECIPE_AXES)}, not {kind}")
            for params, label, positions in _swept(entry):
                defaults = parameter_defaults(self.config, kind, entry.name)
                places: dict[str, Location]
                places = {name: ("defaults", kind, entry.name, name) for name in defaults}
                places |= {name: (*place, "params", name) for name in entry.params}
                places |= {name: (*place, "sweep", name, position) for name, position in positions.items()}
                component = self.create(base, entry.name, {**defaults, **entry.params, **params}, place, places)
                if component is None:
                    continue
                if any(other.choice.label == label for other in made):
                    self.faults.add(place, f"there are two entries '{label}'; name one of them with 'as'")
                made.append(Selected(Choice(kind, entry.name, label, component), entry, place))
        return made

    def create(
        self, base: type[C], name: str, params: Mapping[str, Any], place: Location, places: Mapping[str, Location]
    ) -> C | None:
        """The component, or None with its faults noted: each at the place of its parameter, or at `place`."""
        try:
            loaded = self.registry.load_as(base, name)
        except BenchError as error:
            self.faults.add((*place, "name"), one_line(error))
            return None
        try:
            return loaded(**params)
        except ValidationError as error:
            for path, message in dict.fromkeys(explain(error, loaded)):
                where = places.get(path.split(".")[0], place)
                self.faults.add(where, f"{kind_of(base)} '{name}': {path}: {message}")
        return None

    def check_executor(self) -> None:
        """Note the faults of the executor's entry."""
        entry, place = self.config.executor, ("executor",)
        written = (self.faults.source.value or {}).get("executor")
        has_params_level = isinstance(written, dict) and "params" in written
        below: Location = (*place, "params") if has_params_level else place
        self.create(Executor, entry.name, entry.params, place, {name: (*below, name) for name in entry.params})


def parameter_defaults(config: Config, kind: str, name: str) -> dict[str, Any]:
    """The parameters that the section `defaults` gives to a component, without its recipe."""
    values = config.defaults.get(kind, {}).get(name, {})
    return {key: value for key, value in values.items() if key != "recipe"}


def _swept(entry: Entry) -> Iterator[tuple[dict[str, Any], str, dict[str, int]]]:
    """The parameters, the label and the positions in their lists of every combination of an entry's sweep."""
    label = entry.label or entry.name
    for values in itertools.product(*map(enumerate, entry.sweep.values())):
        swept = {name: value for name, (_, value) in zip(entry.sweep, values, strict=True)}
        positions = {name: position for name, (position, _) in zip(entry.sweep, values, strict=True)}
        shown = ",".join(f"{name}={value}" for name, value in swept.items())
        yield swept, f"{label}[{shown}]" if shown else label, positions


def cell_from_spec(spec: Mapping[str, Any], registry: Registry) -> Cell:
    """The cell that `Cell.spec` wrote down."""
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
    )


def choice_from_spec(base: type[C], spec: Mapping[str, Any], registry: Registry) -> Choice[C]:
    """The choice that `Choice.spec` wrote down."""
    component = registry.create_as(base, spec["name"], spec["params"])
    return Choice(kind_of(base), spec["name"], spec["label"], component)
