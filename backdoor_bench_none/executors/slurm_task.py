"""What a task of the executor `slurm` runs on its node."""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass
from pathlib import Path

from submitit.core.utils import DelayedSubmission

from backdoor_bench_none.executors.local import Local, start_process_server
from backdoor_bench_none.executors.place import run_group, unpack_group
from backdoor_bench_none.executors.task_file import Reports, Task


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
        left = tuple(job for job in group if job.id not in task.ended)
        ignore_warning()
        reports = Reports(task.path.with_suffix(".jsonl"))
        run_group(left, settings, versions, self.local, reports.write)

    def checkpoint(self, path: str) -> DelayedSubmission:
        """The same task: what it has computed is in the results folder."""
        return DelayedSubmission(self, path)


def ignore_warning() -> None:
    """Start the process server so that jobs ignore the signal before the time limit, which Slurm sends to all."""
    handler = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    start_process_server()  # what is ignored at its start stays ignored in all of its processes
    signal.signal(signal.SIGUSR2, handler)
