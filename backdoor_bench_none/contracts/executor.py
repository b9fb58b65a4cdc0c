"""What an executor is: it opens a pool, which starts jobs and reports
on them. The order of jobs is the scheduler's business.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from backdoor_bench_none.contracts.component import Component
from backdoor_bench_none.contracts.job import Job, Outcome, Settings


@dataclass(frozen=True)
class Event:
    """News of a running job: `outcome` when it ended, else epochs `done` of `total`."""

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
        """The news since the last call, after at most `timeout` seconds without any."""


class Executor(Component):
    """Base of all executors."""

    def open(self, settings: Settings) -> AbstractContextManager[Pool]:
        """A pool that is stopped, with all its jobs, when the context is left."""
        raise NotImplementedError
