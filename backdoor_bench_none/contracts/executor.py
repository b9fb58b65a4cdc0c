"""Base class of executors, and the pools that they open.

A pool runs jobs in places and reports on them; the scheduler decides when.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar, Protocol

from backdoor_bench_none.contracts.component import Component
from backdoor_bench_none.contracts.job import Job, Outcome, Settings

#: jobs for one place, each after those of the group that it needs
Group = tuple[Job, ...]


@dataclass(frozen=True)
class Event:
    """An update on a job: that it has begun, epochs `done` of `total`, or its `outcome` once it has ended."""

    job: str
    outcome: Outcome | None = None
    done: int = 0
    total: int = 0


class Pool(Protocol):
    """Places, in each of which one group of jobs runs at a time."""

    def has_room(self, group: Group) -> bool:
        """Whether the group can start now."""

    def submit(self, group: Group) -> None:
        """Start a group for which there is room; the jobs that it needs from other groups are done."""

    def wait(self, timeout: float) -> list[Event]:
        """The events since the last call; returns after at most `timeout` seconds if there are none."""


class Executor(Component):
    """Base of all executors."""

    #: whether jobs go on after Ctrl-C, so that a later run finds them again
    outlives_run: ClassVar[bool] = False

    def group(self, jobs: Sequence[Job]) -> list[Group]:
        """The jobs in groups for one place each; by default every job is one. A job may be in several groups.

        `jobs` are in an order in which each comes after those it needs.
        """
        return [(job,) for job in jobs]

    def check(self) -> None:
        """Raise `BenchError` if this executor cannot work here; called before any job starts."""

    def open(self, settings: Settings) -> AbstractContextManager[Pool]:
        """A pool that is stopped, with all its jobs, when the context is left.

        One that outlives the run leaves them as they are when `KeyboardInterrupt` leaves the context.
        """
        raise NotImplementedError
