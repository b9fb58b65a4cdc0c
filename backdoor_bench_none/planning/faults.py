"""Collects the faults of a benchmark file, so that all of them are reported at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from backdoor_bench_none.contracts.component import C_co, Choice, Component
from backdoor_bench_none.contracts.config import Entry, Fault, Location
from backdoor_bench_none.errors import BenchError
from backdoor_bench_none.planning.source import Source
from backdoor_bench_none.registry.components import Registry
from backdoor_bench_none.words import describe_error

T = TypeVar("T")


@dataclass(frozen=True)
class Selected(Generic[C_co]):
    """A choice, the entry it was made from, and the location of that entry in the file."""

    choice: Choice[C_co]
    entry: Entry
    location: Location


@dataclass
class Faults:
    """The faults of a benchmark file with their locations."""

    source: Source
    registry: Registry
    _faults: list[Fault] = field(default_factory=list)

    def add(self, location: Location, message: str) -> None:
        """Add a fault."""
        self._faults.append((location, message))

    def extend(self, faults: list[Fault]) -> None:
        """Add several faults."""
        self._faults += faults

    def raise_if_any(self) -> None:
        """Raise one `ConfigError` that lists every fault with file, line and column."""
        if self._faults:
            raise self.source.fail(self._faults)

    def call(self, selected: Selected[Component], function: Callable[[], T]) -> T | None:
        """The result of `function`, which runs code of the selected component.

        None if it raises; the error becomes a fault.
        """
        try:
            return function()
        except BenchError as error:
            self.add(selected.location, one_line(error))
        except Exception as error:  # third-party code may raise anything
            kind, name = selected.choice.kind, selected.choice.name
            provider = self.registry.entry(kind, name).provider
            self.add(selected.location, f"{kind} '{name}' of {provider}: {describe_error(error)}")
        return None


def one_line(error: BenchError) -> str:
    """The message and the hint of an error, in one line."""
    return str(error).replace("\nhint: ", "; ")
