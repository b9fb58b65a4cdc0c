"""Starts each job once the jobs it needs are done; a job that needs a failed one fails too, and all others go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from backdoor_bench_none.contracts.executor import Event, Pool
from backdoor_bench_none.contracts.job import Job, Outcome

#: seconds between two checks of whether to stop
PATIENCE = 0.5


@dataclass
class Scheduler:
    """Runs `jobs` as soon as possible and in their order, in which each comes after those it needs."""

    jobs: Sequence[Job]
    pool: Pool
    #: called when a job reports progress, not when it ends
    on_progress: Callable[[Event], None] = lambda event: None
    on_start: Callable[[Job], None] = lambda job: None
    _outcomes: dict[str, Outcome] = field(default_factory=dict)
    _running: set[str] = field(default_factory=set)

    def run(self, keep_going: Callable[[], bool]) -> Iterator[tuple[Job, Outcome]]:
        """Yield every job that ended; once `keep_going` returns False, start no more and finish the running ones."""
        by_id = {job.id: job for job in self.jobs}
        waiting = list(self.jobs)
        while self._running or (waiting and keep_going()):
            if keep_going():
                for job, outcome in self._doomed(waiting):
                    waiting.remove(job)
                    self._outcomes[job.id] = outcome
                    yield job, outcome
                    if not keep_going():
                        break
            if keep_going():
                self._start(waiting)
            if not self._running:
                continue
            for event in self.pool.wait(PATIENCE):
                if event.outcome is None:
                    self.on_progress(event)
                    continue
                self._running.discard(event.job)
                self._outcomes[event.job] = event.outcome
                yield by_id[event.job], event.outcome

    def _start(self, waiting: list[Job]) -> None:
        for job in list(waiting):
            if len(self._running) >= self.pool.slots:
                return
            if all(self._is_done(need) for need in job.needs):
                waiting.remove(job)
                self._running.add(job.id)
                self.on_start(job)
                self.pool.submit(job)

    def _is_done(self, job_id: str) -> bool:
        outcome = self._outcomes.get(job_id)
        return outcome is not None and outcome.status == "done"

    def _doomed(self, waiting: list[Job]) -> list[tuple[Job, Outcome]]:
        """The jobs that can no longer run, with the outcome of the failed job they need."""
        doomed = []
        for job in waiting:
            failed = [need for need in job.needs if need in self._outcomes and not self._is_done(need)]
            if failed:
                # its warnings were shown when it ended
                doomed.append((job, replace(self._outcomes[failed[0]], warnings=())))
        return doomed
