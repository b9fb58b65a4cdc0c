"""Combines the training recipe of a cell from its data set, architecture and trainer and from the benchmark file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from pydantic import ValidationError

from backdoor_bench_none.contracts.architecture import Activation, Architecture
from backdoor_bench_none.contracts.component import Choice, Component
from backdoor_bench_none.contracts.config import Config, Location
from backdoor_bench_none.contracts.dataset import Dataset
from backdoor_bench_none.contracts.recipe import NAMED_RECIPES, NamedRecipe, Recipe
from backdoor_bench_none.contracts.trainer import Trainer
from backdoor_bench_none.errors import did_you_mean
from backdoor_bench_none.planning.faults import Faults, Selected
from backdoor_bench_none.registry.components import explain


@dataclass(frozen=True)
class Training:
    """The recipe of a cell, its architecture with the initial weights that the recipe brings, and its deviation.

    `deviation` says how the recipe differs from the publication that it is named after; "" if it does not.
    """

    recipe: Recipe
    architecture: Choice[Architecture]
    deviation: str


@dataclass
class RecipeMaker:
    """Makes each recipe once; their faults go into `faults`."""

    config: Config
    faults: Faults
    #: by the identity of the selected entries, which the plan keeps
    _made: dict[tuple[int, ...], Training] = field(default_factory=dict)

    def make(
        self,
        dataset: Selected[Dataset],
        architecture: Selected[Architecture],
        activation: Selected[Activation],
        trainer: Selected[Trainer],
    ) -> Training:
        """The recipe of a data set, an architecture, an activation function and a trainer.

        Later ones win: those of data set, architecture and trainer in this order, then the `defaults` of each, then the
        entry of each.
        """
        key = (id(dataset), id(architecture), id(activation), id(trainer))
        if key not in self._made:
            self._made[key] = self._combine(dataset, architecture, activation, trainer)
        return self._made[key]

    def _combine(
        self,
        dataset: Selected[Dataset],
        architecture: Selected[Architecture],
        activation: Selected[Activation],
        trainer: Selected[Trainer],
    ) -> Training:
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
        base = "default"
        named = self._named(architecture, base, activation)
        for recipe, location in self._written((dataset, architecture, trainer)):
            written = _as_fields(recipe)
            if "base" in written:
                base = str(written.pop("base"))
                named = self._named(architecture, base, activation, location)
                fields |= named.fields
                locations |= dict.fromkeys(named.fields, location)
            fields |= written
            locations |= {name: (*location, name) for name in written}
        choice = self._with_initial_weights(architecture, named)
        recipe = self._validate(fields, locations, architecture)
        self.faults.call(architecture, partial(choice.component.check_recipe, base, recipe))
        return Training(recipe, choice, named.deviation)

    def _named(
        self,
        architecture: Selected[Architecture],
        name: str,
        activation: Selected[Activation],
        location: Location | None = None,
    ) -> NamedRecipe:
        """The recipe of this name; without fields if it is unknown or refused, which is a fault."""
        if name not in NAMED_RECIPES:
            self.faults.add(location or (), f"unknown recipe '{name}', {did_you_mean(name, NAMED_RECIPES)}")
            return NamedRecipe({})
        make = partial(architecture.choice.component.named_recipe, name, activation.choice.name)
        return self.faults.call(architecture, make) or NamedRecipe({})

    def _with_initial_weights(self, selected: Selected[Architecture], named: NamedRecipe) -> Choice[Architecture]:
        """The architecture with the parameters that the recipe brings; what the file says of them stands."""
        if not named.params:
            return selected.choice
        component = selected.choice.component
        brought = {name: value for name, value in named.params.items() if getattr(component, name) == "auto"}
        return replace(selected.choice, component=component.model_copy(update=brought))

    def _validate(
        self, fields: Mapping[str, Any], locations: Mapping[str, Location], architecture: Selected[Architecture]
    ) -> Recipe:
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


def _as_fields(recipe: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """A recipe of the file as fields, of which `base` names the recipe to start from."""
    if isinstance(recipe, str):
        return {"base": recipe}
    return dict(recipe or {})
