"""Starts each group of jobs once the jobs it needs are done; a job that needs a failed one fails too, others go on."""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from backdoor_bench_none.contracts.executor import Event, Group, Pool
from backdoor_bench_none.contracts.job import Job, Outcome

#: seconds between two checks of whether to stop
PATIENCE = 0.5


@dataclass
class Scheduler:
    """Runs `groups` as soon as possible and in their order, in which each comes after those it needs."""

    groups: Sequence[Group]
    pool: Pool
    #: called when a job reports progress, not when it ends
    on_progress: Callable[[Event], None] = lambda event: None
    on_start: Callable[[Job], None] = lambda job: None
    #: whether running jobs are waited for once no more are started
    finishes_running: bool = True
    _jobs: dict[str, Job] = field(default_factory=dict)
    _begun: set[str] = field(default_factory=set)
    _outcomes: dict[str, Outcome] = field(default_factory=dict)
    #: the ids of the jobs that have not ended, of groups that wait and of groups that run, by number
    _waiting: dict[int, set[str]] = field(default_factory=dict)
    _running: dict[int, set[str]] = field(default_factory=dict)
    #: the ids of jobs of other groups that a group waits for, and the groups that wait for a job
    _needs: dict[int, set[str]] = field(default_factory=dict)
    _waiters: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    #: the groups that have each job
    _places: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    #: the groups that can start, in their order: those that take no place on a GPU, and those that do
    _ready: tuple[list[int], list[int]] = field(default_factory=lambda: ([], []))
    _ended: deque[str] = field(default_factory=deque)

    def __post_init__(self) -> None:
        for number, group in enumerate(self.groups):
            inside = {job.id for job in group}
            self._waiting[number] = inside
            self._needs[number] = {need for job in group for need in job.needs if need not in inside}
            for job in group:
                self._jobs[job.id] = job
                self._places[job.id].append(number)
            for need in self._needs[number]:
                self._waiters[need].append(number)
            if not self._needs[number]:
                self._add_ready(number)

    def run(self, keep_going: Callable[[], bool]) -> Iterator[tuple[Job, Outcome]]:
        """Yield every job that ended; once `keep_going` returns False, start no more, and finish the running ones."""
        while True:
            while self._ended and keep_going():
                yield self._next_ended()
            if keep_going():
                self._start()
            if not self._running or not (self.finishes_running or keep_going()):
                if not self._ended or not keep_going():
                    return
                continue
            for event in self.pool.wait(PATIENCE):
                yield from self._take(event)

    def _start(self) -> None:
        for ready in self._ready:
            while ready:
                left = self._waiting[ready[0]]
                group = tuple(job for job in self.groups[ready[0]] if job.id in left)
                if group and not self.pool.has_room(group):
                    break
                number = heapq.heappop(ready)
                del self._waiting[number]
                if group:
                    self._running[number] = left
                    self.pool.submit(group)

    def _add_ready(self, number: int) -> None:
        uses_device = any(job.uses_device for job in self.groups[number])
        heapq.heappush(self._ready[uses_device], number)

    def _take(self, event: Event) -> Iterator[tuple[Job, Outcome]]:
        if event.job not in self._begun:
            self._begun.add(event.job)
            self.on_start(self._jobs[event.job])
        if event.outcome is None:
            if event.total:
                self.on_progress(event)
            return
        is_first = event.job not in self._outcomes
        self._end(event.job, event.outcome)
        if is_first:
            yield self._jobs[event.job], event.outcome

    def _next_ended(self) -> tuple[Job, Outcome]:
        job = self._ended.popleft()
        return self._jobs[job], self._outcomes[job]

    def _end(self, job_id: str, outcome: Outcome) -> None:
        """Note how a job ended, which others may wait for; a second end of the same job changes nothing."""
        first = self._outcomes.setdefault(job_id, outcome)
        for number in self._places[job_id]:
            self._drop(number, job_id, running=True)
            if first.status == "done":
                self._drop(number, job_id, running=False)
        for number in self._waiters.pop(job_id, ()):
            if first.status != "done":
                self._doom(number)
            self._needs[number].discard(job_id)
            if not self._needs[number] and number in self._waiting:
                self._add_ready(number)

    def _drop(self, number: int, job_id: str, *, running: bool) -> None:
        groups = self._running if running else self._waiting
        if number in groups:
            groups[number].discard(job_id)
            if running and not groups[number]:
                del groups[number]

    def _doom(self, number: int) -> None:
        """End the jobs of a waiting group that need a failed job of another one, and those that need them."""
        left = self._waiting.get(number, set())
        for job in self.groups[number]:
            failed = [need for need in job.needs if need not in left and self._has_failed(need)]
            if job.id in left and failed:
                left.discard(job.id)
                if job.id not in self._outcomes:
                    # its warnings were shown when it ended
                    self._end(job.id, replace(self._outcomes[failed[0]], warnings=()))
                    self._ended.append(job.id)

    def _has_failed(self, job_id: str) -> bool:
        outcome = self._outcomes.get(job_id)
        return outcome is not None and outcome.status != "done"
