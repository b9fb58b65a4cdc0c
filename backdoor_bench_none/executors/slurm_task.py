"""What a task of the executor `slurm` runs on its node."""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass
from pathlib import Path

from submitit.core.utils import DelayedSubmission

from backdoor_bench_none.contracts.executor import Event
from backdoor_bench_none.contracts.job import Outcome
from backdoor_bench_none.executors.local import Local, start_process_server
from backdoor_bench_none.executors.place import run_group, unpack_group
from backdoor_bench_none.executors.task_file import Reports, Task

#: tasks in which a job may have begun without an end
MOST_BEGINNINGS = 5


@dataclass(frozen=True)
class SlurmTask:
    """Runs the jobs of a file that have not ended, and reports on them in the file of its name with `.jsonl`.

    submitit calls `checkpoint` before the time limit and queues the task again, with the same file.
    """

    local: Local

    def __call__(self, path: str) -> None:
        """Run the task; called by submitit on the node."""
        task = Task.of(Path(path))
        task.read_events()
        group, settings, versions = unpack_group(json.loads(task.path.read_bytes()))
        reports = Reports(task.path.with_suffix(".jsonl"))
        left = []
        for job in group:
            failed = [
                task.ended[need] for need in job.needs if need in task.ended and task.ended[need].status != "done"
            ]
            if job.id not in task.ended and failed:
                task.ended[job.id] = failed[0]
                reports.write(Event(job.id, failed[0]))
            elif job.id not in task.ended:
                left.append(job)
        if left:
            ignore_warning()
            run_group(tuple(left), settings, versions, self.local, reports.write)

    def checkpoint(self, path: str) -> DelayedSubmission:
        """The same task, which goes on from what is in the results folder; a job that never ends in time has failed."""
        task = Task.of(Path(path))
        task.read_events()
        reports = Reports(task.path.with_suffix(".jsonl"))
        for job in task.jobs:
            if job not in task.ended and task.begun[job] >= MOST_BEGINNINGS:
                reason = f"it was begun {task.begun[job]} times and never ended before its task had to"
                outcome = Outcome("timeout", "TaskTimeout", f"{reason}; raise the executor's time", kind=_kind_of(job))
                reports.write(Event(job, outcome))
        return DelayedSubmission(self, path)


def _kind_of(job: str) -> str:
    return job.partition(":")[0]


def ignore_warning() -> None:
    """Start the process server so that jobs ignore the signal before the time limit, which Slurm sends to all."""
    handler = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    start_process_server()  # what is ignored at its start stays ignored in all of its processes
    signal.signal(signal.SIGUSR2, handler)
