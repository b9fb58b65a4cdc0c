"""Base class of executors, and the pools that they open.

A pool starts jobs and reports on them; the scheduler decides their order.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from backdoor_bench_none.contracts.component import Component
from backdoor_bench_none.contracts.job import Job, Outcome, Settings


@dataclass(frozen=True)
class Event:
    """An update on a job: its `outcome` once it has ended, else epochs `done` of `total`."""

    job: str
    outcome: Outcome | None = None
    done: int = 0
    total: int = 0


class Pool(Protocol):
    """A number of slots in which jobs run at the same time."""

    slots: int

    def submit(self, job: Job) -> None:
        """Start `job` in a free slot."""

    def wait(self, timeout: float) -> list[Event]:
        """The events since the last call; returns after at most `timeout` seconds if there are none."""


class Executor(Component):
    """Base of all executors."""

    def open(self, settings: Settings) -> AbstractContextManager[Pool]:
        """A pool that is stopped, with all its jobs, when the context is left."""
        raise NotImplementedError
