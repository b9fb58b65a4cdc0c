"""A cell: one combination of the matrix, and the content keys of the stages that make its record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self, cast

from backdoor_bench_none.component import Component
from backdoor_bench_none.recipe import Recipe
from backdoor_bench_none.seeds import canonical_json, content_key

if TYPE_CHECKING:
    from backdoor_bench_none.api import Activation, Architecture, Attack, Dataset, DatasetInfo, Defense, Trainer
    from backdoor_bench_none.registry import Registry

#: The axes of the matrix, in the order of tables.
AXES = ("dataset", "attack", "defense", "architecture", "activation", "trainer")


@dataclass(frozen=True)
class Choice:
    """One value of an axis: a component by its registered name, and the label it bears in tables."""

    kind: str
    name: str
    label: str
    component: Component

    @cached_property
    def identity(self) -> str:
        """What determines results, as canonical JSON."""
        return canonical_json({"name": self.name, **self.component.identity()})

    def spec(self) -> dict[str, Any]:
        """Everything needed to make this choice again, as JSON values."""
        return {"name": self.name, "label": self.label, "params": self.component.model_dump(mode="json")}


@dataclass(frozen=True)
class Cell:
    """dataset x attack x defense x architecture x activation x trainer
    x seed, with the recipe its networks are trained by.

    The attack is resolved for the data set; `fingerprint` is the data's sha256, None while it is not on this machine.
    """

    dataset: Choice
    attack: Choice
    defense: Choice
    architecture: Choice
    activation: Choice
    trainer: Choice
    seed: int
    recipe: Recipe
    info: DatasetInfo
    fingerprint: str | None
    #: identities of the extra metrics
    metrics: tuple[Choice, ...] = ()

    @cached_property
    def data_key(self) -> str:
        """The decoded data set."""
        return content_key("data", self.dataset.identity, self.fingerprint)

    @cached_property
    def crafter_key(self) -> str | None:
        """The network that the attack crafts with, if it does."""
        crafter = self.the_attack.crafted_with()
        if crafter is None:
            return None
        name = f"{type(crafter).__module__}:{type(crafter).__qualname__}"
        return content_key("crafter", self.data_key, name, canonical_json(crafter.identity()), self.seed)

    @cached_property
    def backbone_key(self) -> str | None:
        """The frozen backbone that every network starts from, if the trainer has one."""
        if not self.the_trainer.has_backbone:
            return None
        return content_key("backbone", self.data_key, self.initial_key, self.trainer.identity)

    @cached_property
    def poison_key(self) -> str:
        """The poisoned training samples and the triggered test samples."""
        backbone = self.backbone_key if self.the_attack.needs_backbone else None
        clients = self.trainer.identity if self.the_attack.needs_clients else None
        parts = (self.crafter_key, backbone, clients)
        return content_key("poison", self.data_key, self.attack.identity, self.seed, *parts)

    @cached_property
    def train_key(self) -> str:
        """The training set as a defender gets it."""
        return self.poison_key if self.the_attack.poisons else self.data_key

    @cached_property
    def initial_key(self) -> str:
        """The initial weights: equal for all attacks and defenses of a seed."""
        return content_key(
            "initial", self.dataset.identity, self.architecture.identity, self.activation.identity, self.seed
        )

    @cached_property
    def victim_key(self) -> str:
        """The network trained on the poisoned data without a defense."""
        return self._victim_key(self.train_key, self.attack.identity if self.the_attack.controls_training else None)

    @cached_property
    def benign_key(self) -> str:
        """The network trained on clean data: the victim of the attack `clean`."""
        return self._victim_key(self.data_key, None)

    def _victim_key(self, data: str, attacker: str | None) -> str:
        parts = (self.architecture.identity, self.activation.identity, self.trainer.identity)
        return content_key("victim", data, attacker, *parts, self.recipe_json, self.seed)

    @cached_property
    def defense_key(self) -> str:
        """The defended network and what the defense found."""
        return content_key("defense", self.victim_key, self.defense.identity)

    @cached_property
    def search_key(self) -> str:
        """The triggers that the attack finds in the defended network."""
        return content_key("search", self.defense_key, self.attack.identity)

    @cached_property
    def key(self) -> str:
        """This cell's record."""
        from backdoor_bench_none.evaluation import EVALUATION_REVISION

        metrics = [metric.identity for metric in self.metrics]
        return content_key("cell", self.defense_key, self.poison_key, EVALUATION_REVISION, metrics)

    @cached_property
    def recipe_json(self) -> str:
        """The recipe as canonical JSON."""
        return canonical_json(self.recipe.model_dump(mode="json"))

    @property
    def title(self) -> str:
        """The labels of all axes that vary in practice, and the seed."""
        labels = [getattr(self, axis).label for axis in AXES if axis != "trainer" or self.trainer.name != "centralized"]
        return "/".join([*labels, f"s{self.seed}"])

    def spec(self) -> dict[str, Any]:
        """This cell as JSON values: what a job carries."""
        choices = {axis: getattr(self, axis).spec() for axis in AXES}
        metrics = [metric.spec() for metric in self.metrics]
        recipe = self.recipe.model_dump(mode="json")
        return {**choices, "seed": self.seed, "recipe": recipe, "fingerprint": self.fingerprint, "metrics": metrics}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], registry: Registry) -> Self:
        """The cell that `spec` describes."""
        choices = {axis: choice_from_spec(axis, spec[axis], registry) for axis in AXES}
        return cls(
            **choices,
            seed=spec["seed"],
            recipe=Recipe(**spec["recipe"]),
            info=cast("Dataset", choices["dataset"].component).info(),
            fingerprint=spec["fingerprint"],
            metrics=tuple(choice_from_spec("metric", metric, registry) for metric in spec["metrics"]),
        )

    # The components with their own types.

    @property
    def the_dataset(self) -> Dataset:
        """The data set."""
        return cast("Dataset", self.dataset.component)

    @property
    def the_attack(self) -> Attack:
        """The attack, resolved."""
        return cast("Attack", self.attack.component)

    @property
    def the_defense(self) -> Defense:
        """The defense."""
        return cast("Defense", self.defense.component)

    @property
    def the_architecture(self) -> Architecture:
        """The architecture."""
        return cast("Architecture", self.architecture.component)

    @property
    def the_activation(self) -> Activation:
        """The activation function."""
        return cast("Activation", self.activation.component)

    @property
    def the_trainer(self) -> Trainer:
        """The trainer."""
        return cast("Trainer", self.trainer.component)


def choice_from_spec(kind: str, spec: Mapping[str, Any], registry: Registry) -> Choice:
    """The choice that `Choice.spec` wrote down."""
    return Choice(kind, spec["name"], spec["label"], registry.create(kind, spec["name"], spec["params"]))
