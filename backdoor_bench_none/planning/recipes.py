"""Combines the training recipe of a cell from its data set, architecture and trainer and from the benchmark file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pydantic import ValidationError

from backdoor_bench_none.contracts.architecture import Architecture
from backdoor_bench_none.contracts.component import Component
from backdoor_bench_none.contracts.config import Config, Location
from backdoor_bench_none.contracts.dataset import Dataset
from backdoor_bench_none.contracts.recipe import NAMED_RECIPES, Recipe, named_recipe
from backdoor_bench_none.contracts.trainer import Trainer
from backdoor_bench_none.errors import did_you_mean
from backdoor_bench_none.planning.faults import Faults, Selected
from backdoor_bench_none.registry.components import explain


@dataclass
class RecipeMaker:
    """Makes each recipe once; their faults go into `faults`."""

    config: Config
    faults: Faults
    _made: dict[tuple[int, int, int], Recipe] = field(default_factory=dict)

    def make(
        self, dataset: Selected[Dataset], architecture: Selected[Architecture], trainer: Selected[Trainer]
    ) -> Recipe:
        """The recipe of a data set, an architecture and a trainer.

        Later ones win: those of the components in this order, then the `defaults` of each, then the entry of each.
        """
        key = (id(dataset.choice), id(architecture.choice), id(trainer.choice))
        if key not in self._made:
            self._made[key] = self._combine(dataset, architecture, trainer)
        return self._made[key]

    def _combine(
        self, dataset: Selected[Dataset], architecture: Selected[Architecture], trainer: Selected[Trainer]
    ) -> Recipe:
        network = architecture.choice.component
        own: list[Mapping[str, Any] | None] = [
            self.faults.call(dataset, dataset.choice.component.recipe),
            self.faults.call(architecture, partial(network.recipe, dataset.choice.name)),
            self.faults.call(trainer, trainer.choice.component.recipe),
        ]
        fields: dict[str, Any] = {}
        for values in own:
            fields |= values or {}
        locations: dict[str, Location] = {}
        for recipe, location in self._written((dataset, architecture, trainer)):
            written = self._expand(recipe, architecture.choice.name, location)
            fields |= written
            locations |= {name: (*location, name) for name in written}
        try:
            return Recipe(**fields)
        except ValidationError as error:
            for path, message in explain(error, Recipe):
                location = locations.get(path.split(".")[0], architecture.location)
                self.faults.add(location, f"recipe: {path}: {message}")
            return Recipe()

    def _written(self, selected: tuple[Selected[Component], ...]) -> list[tuple[Any, Location]]:
        """The recipes in the file with their locations: those of `defaults` first, then those of the entries."""
        written: list[tuple[Any, Location]] = []
        for choice in (one.choice for one in selected):
            recipe = self.config.defaults.get(choice.kind, {}).get(choice.name, {}).get("recipe")
            written.append((recipe, ("defaults", choice.kind, choice.name, "recipe")))
        return written + [(one.entry.recipe, (*one.location, "recipe")) for one in selected]

    def _expand(self, recipe: str | Mapping[str, Any] | None, architecture: str, location: Location) -> dict[str, Any]:
        """The fields of a recipe given by its name, or by fields, of which `base` names the recipe to start from."""
        if isinstance(recipe, str):
            recipe = {"base": recipe}
        fields = dict(recipe or {})
        base = fields.pop("base", "default")
        if base not in NAMED_RECIPES:
            self.faults.add(location, f"unknown recipe '{base}', {did_you_mean(str(base), NAMED_RECIPES)}")
            return {}
        return {**named_recipe(base, architecture), **fields}
