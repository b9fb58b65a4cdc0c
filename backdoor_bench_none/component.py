"""A component: one attack, defense, architecture, activation, data set or trainer with its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from backdoor_bench_none.cell import Cell


class Incidental:
    """Marks a parameter that does not change results (a folder, a download switch): it stays out of the content key."""


class Component(BaseModel):
    """A frozen set of validated parameters; subclasses add fields, each with a `Field(description=...)`."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, use_enum_values=True)

    #: Bump it when results change: it is part of every content key.
    revision: ClassVar[int] = 1
    #: Where the method is described: arXiv id, DOI or section of the paper.
    paper: ClassVar[str] = ""

    def identity(self) -> dict[str, Any]:
        """The revision and the parameters that determine results, as JSON values."""
        fields = type(self).model_fields
        incidental = {name for name, field in fields.items() if Incidental in field.metadata}
        return {"revision": self.revision, "params": self.model_dump(mode="json", exclude=incidental)}

    @classmethod
    def facts(cls) -> Mapping[str, str]:
        """What `bbn show` says besides parameters and paper."""
        return {}

    def skip(self, cell: Cell) -> str | None:
        """The reason why this component cannot be part of `cell`, shown in the tables; None if it can."""
        return None
