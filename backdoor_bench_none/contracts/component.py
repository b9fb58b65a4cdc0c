"""A component: one attack, defense, architecture, activation, data set or trainer with its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from pydantic import ConfigDict

from backdoor_bench_none.contracts.values import Values
from backdoor_bench_none.seeds import canonical_json


class Incidental:
    """Marks a parameter that does not change results (a folder, a download switch): it stays out of the content key."""


class Added:
    """Marks a parameter that a later version added: while it has its default, it stays out of the content key.

    So results of the version without it are found under the key that they were kept under.
    """


class Component(Values):
    """A frozen set of validated parameters; subclasses add fields, each with a `Field(description=...)`."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, use_enum_values=True)

    #: Bump it when results change: it is part of every content key.
    revision: ClassVar[int] = 1
    #: Where the method is described: arXiv id, DOI or section of the paper.
    paper: ClassVar[str] = ""

    def identity(self) -> dict[str, Any]:
        """The revision and the parameters that determine results, as JSON values."""
        left_out = set()
        for name, field in type(self).model_fields.items():
            if Incidental in field.metadata or (Added in field.metadata and getattr(self, name) == field.default):
                left_out.add(name)
        return {"revision": self.revision, "params": self.model_dump(mode="json", exclude=left_out)}

    @classmethod
    def facts(cls) -> Mapping[str, str]:
        """Lines that `bbn show` adds to the parameters and the paper, by title."""
        return {}

    def skip(self, cell: Combination) -> str | None:
        """The reason why this component cannot be part of `cell`, shown in the tables; None if it can."""
        return None


C_co = TypeVar("C_co", bound=Component, covariant=True)


@dataclass(frozen=True)
class Choice(Generic[C_co]):
    """One value of an axis: a component by its registered name, and its label in tables."""

    kind: str
    name: str
    label: str
    component: C_co

    @cached_property
    def identity(self) -> str:
        """The name, revision and parameters that determine results, as canonical JSON."""
        return canonical_json({"name": self.name, **self.component.identity()})

    @cached_property
    def spec(self) -> Mapping[str, Any]:
        """Everything needed to restore this choice, as JSON values."""
        return {"name": self.name, "label": self.label, "params": self.component.model_dump(mode="json")}


class Combination(Protocol):
    """The part of a cell that a component may read to decide whether it can be part of that cell.

    A protocol rather than `Cell`, which itself depends on components. Example: `cell.trainer.component.has_clients`.
    """

    @property
    def dataset(self) -> Choice[Any]:
        """The data set."""

    @property
    def attack(self) -> Choice[Any]:
        """The attack, resolved for the data set."""

    @property
    def defense(self) -> Choice[Any]:
        """The defense."""

    @property
    def architecture(self) -> Choice[Any]:
        """The architecture."""

    @property
    def activation(self) -> Choice[Any]:
        """The activation function."""

    @property
    def trainer(self) -> Choice[Any]:
        """The trainer."""

    @property
    def seed(self) -> int:
        """The seed."""

    @property
    def info(self) -> Any:  # noqa: ANN401 - a DatasetInfo, whose module imports this one
        """The metadata of the data set (`DatasetInfo`)."""
