"""A cell: one combination of the matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from backdoor_bench_none.contracts.component import Choice, Component
from backdoor_bench_none.contracts.recipe import Recipe

if TYPE_CHECKING:  # these import torch, which reading a record does not need
    from backdoor_bench_none.contracts.architecture import Activation, Architecture
    from backdoor_bench_none.contracts.attack import Attack
    from backdoor_bench_none.contracts.dataset import Dataset, DatasetInfo
    from backdoor_bench_none.contracts.defense import Defense
    from backdoor_bench_none.contracts.metric import Metric
    from backdoor_bench_none.contracts.trainer import Trainer

#: The axes of the matrix, in the order of tables.
AXES = ("dataset", "attack", "defense", "architecture", "activation", "trainer")


@dataclass(frozen=True)
class Cell:
    """One combination of all axes and a seed, with the recipe of its networks.

    The attack is resolved for the data set; `fingerprint` is the sha256 of the data, None while they are not on this
    machine.
    """

    dataset: Choice[Dataset]
    attack: Choice[Attack]
    defense: Choice[Defense]
    architecture: Choice[Architecture]
    activation: Choice[Activation]
    trainer: Choice[Trainer]
    seed: int
    recipe: Recipe
    info: DatasetInfo
    fingerprint: str | None
    #: extra metrics
    metrics: tuple[Choice[Metric], ...] = ()
    #: how the recipe deviates from the publication that it is named after; "" if it does not
    recipe_deviation: str = ""
    #: values derived from this cell, such as its content keys; a changed copy starts without them
    memo: dict[str, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    @cached_property
    def choices(self) -> Mapping[str, Choice[Component]]:
        """The choices by axis."""
        return {axis: getattr(self, axis) for axis in AXES}

    @cached_property
    def title(self) -> str:
        """The labels of all axes and the seed; the trainer is left out if it is `centralized`."""
        labels = [choice.label for axis, choice in self.choices.items() if axis != "trainer"]
        if self.trainer.name != "centralized":
            labels.append(self.trainer.label)
        return "/".join([*labels, f"s{self.seed}"])

    def spec(self) -> dict[str, Any]:
        """This cell as JSON values, as jobs carry it."""
        choices = {axis: choice.spec for axis, choice in self.choices.items()}
        metrics = [metric.spec for metric in self.metrics]
        recipe = self.recipe.model_dump(mode="json")
        return {
            **choices, "seed": self.seed, "recipe": recipe, "fingerprint": self.fingerprint, "metrics": metrics,
            "recipe_deviation": self.recipe_deviation,
        }  # fmt: skip
