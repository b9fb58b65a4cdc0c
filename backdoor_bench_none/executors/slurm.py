"""Runs groups of jobs as tasks of Slurm job arrays, which go on when the run is stopped and are found again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, PositiveInt

from backdoor_bench_none.contracts.config import parse_bytes, parse_seconds
from backdoor_bench_none.contracts.executor import Event, Executor, Group, Pool
from backdoor_bench_none.contracts.job import Job, Outcome, Settings
from backdoor_bench_none.errors import BenchError
from backdoor_bench_none.executors.local import Local
from backdoor_bench_none.executors.place import find_versions, pack_group
from backdoor_bench_none.executors.task_file import Task
from backdoor_bench_none.run.grouping import group_by_network

#: seconds between two looks at the reports of the tasks
LOOK = 1.0
#: seconds between two questions to Slurm
POLL = 15.0
#: seconds that a file may take to be seen here after it was written on a node
DELAY = 30.0
#: tasks in an array; Slurm's own limit is 1001 unless its administrator changed it
LARGEST_ARRAY = 1000
#: how often a task may reach its time limit; it goes on from its artifacts each time
MOST_TIMEOUTS = 1000
#: the folder of all runs, in the results folder
FOLDER = "slurm"


class Slurm(Executor):
    """Tasks of Slurm job arrays: each runs the cells of one victim in processes of one node.

    A task is queued again before its time limit ends, when it is preempted and when its node is lost, and goes on from
    what it has kept. Ctrl-C leaves queued and running tasks, which the next `bbn run` finds.
    """

    outlives_run: ClassVar[bool] = True

    partition: str | None = Field(None, description="partition; default: the cluster's")
    cpus: PositiveInt = Field(1, description="cores of a task; on a CPU it runs as many jobs at the same time")
    gpus: int = Field(0, ge=0, description="GPUs of a task")
    memory: Annotated[int | None, BeforeValidator(parse_bytes)] = Field(
        None, gt=0, description="memory of a task, such as 16G; default: the cluster's"
    )
    time: Annotated[float, BeforeValidator(parse_seconds)] = Field(
        14400.0, ge=60, description="time limit of a task, such as 4h; it goes on in a new one"
    )
    warning: Annotated[float, BeforeValidator(parse_seconds)] = Field(
        90.0, gt=0, description="how long before its time limit a task is queued again, such as 90s"
    )
    parallel: PositiveInt = Field(256, description="tasks at the same time")
    groups: PositiveInt = Field(1, description="victims, with their cells, in a task")
    cells: PositiveInt | None = Field(None, description="cells of one victim in a task; default: all")
    slots: PositiveInt | Literal["auto"] = Field("auto", description="jobs at the same time in a task")
    setup: tuple[str, ...] = Field((), description="lines of shell before a task starts, such as 'module load cuda'")
    slurm: Mapping[str, str | int | bool] = Field(
        {}, description="further options of sbatch without dashes, such as {account: lab, constraint: a100}"
    )

    def group(self, jobs: Sequence[Job]) -> list[Group]:
        """The cells of a victim, and what they need, are a group."""
        return group_by_network(jobs, self.cells)

    def check(self) -> None:
        """Raise `BenchError` if there is no Slurm, or none that can run such a task."""
        if shutil.which("sbatch") is None or shutil.which("squeue") is None:
            raise BenchError(
                "executor slurm: `sbatch` is not on this machine", "start the run on a login node of the cluster"
            )
        if find_spec("submitit") is None:
            raise BenchError("executor slurm: submitit is not installed", "pip install 'backdoor-bench-none[slurm]'")
        partitions = sorted(set(_ask("sinfo", "-h", "-o", "%R").split()))
        if self.partition is not None and self.partition not in partitions:
            raise BenchError(
                f"executor slurm: there is no partition '{self.partition}'", f"there are {', '.join(partitions)}"
            )
        flags = [f"--{name}" if value is True else f"--{name}={value}" for name, value in self._options().items()]
        _ask("sbatch", "--test-only", *flags, "--wrap", "true")

    def _options(self) -> dict[str, Any]:
        """What a task asks of Slurm, by long option of sbatch."""
        options: dict[str, Any] = {
            "partition": self.partition, "cpus-per-task": self.cpus, "gpus-per-node": self.gpus or None,
            "mem": None if self.memory is None else f"{-(-self.memory // 2**20)}M", "time": -(-int(self.time) // 60),
            "requeue": True,
        }  # fmt: skip
        return {name: value for name, value in options.items() if value is not None} | dict(self.slurm)

    @contextmanager
    def open(self, settings: Settings) -> Iterator[Pool]:
        """A pool of tasks; those that it finds in Slurm's queue are its own."""
        pool = _SlurmPool(self, settings)
        yield pool
        pool.cancel()  # not reached after Ctrl-C

    def submit_array(self, folder: Path, tasks: Sequence[Path]) -> None:
        """Submit tasks, whose files lie in `folder`, as one array."""
        import submitit

        from backdoor_bench_none.executors.slurm_task import SlurmTask

        executor = submitit.SlurmExecutor(folder=str(folder / "logs"), max_num_timeout=MOST_TIMEOUTS)
        executor.update_parameters(
            job_name="bbn", comment=str(folder), array_parallelism=self.parallel, setup=list(self.setup),
            signal_delay_s=int(self.warning), stderr_to_stdout=True, additional_parameters=self._options(),
        )  # fmt: skip
        try:
            executor.map_array(SlurmTask(Local(slots=self.slots, cores=self.cpus)), [str(task) for task in tasks])
        except submitit.core.utils.FailedJobError as error:
            raise BenchError(f"executor slurm: sbatch refused the tasks: {_last_line(str(error))}") from error


class _SlurmPool:
    def __init__(self, executor: Slurm, settings: Settings) -> None:
        self._executor = executor
        self._settings = settings.absolute()
        self._versions = find_versions(settings)
        self._root = self._settings.results / FOLDER
        self._folder = self._root / f"{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}"
        self._pending: list[Group] = []
        self._wanted: set[str] = set()
        #: what earlier runs left in the queue; their jobs are taken over when they are asked for
        self._tasks: list[Task] = []
        self._count = 0
        self._asked = 0.0
        self._looked = 0.0
        for folder, states in find_states(self._root).items():
            live = [task for task, state in states if state in ("queued", "running")]
            self._tasks += live
            if not live:
                shutil.rmtree(folder, ignore_errors=True)

    def has_room(self, group: Group) -> bool:
        return True  # Slurm's queue is its own

    def submit(self, group: Group) -> None:
        self._wanted |= {job.id for job in group}
        under_way = {job for task in self._tasks for job in task.jobs if job not in task.ended}
        if any(job.id not in under_way for job in group):
            self._pending.append(tuple(job for job in group if job.id not in under_way))

    def wait(self, timeout: float) -> list[Event]:
        self._flush()
        time.sleep(min(timeout, max(0.0, self._looked + LOOK - time.monotonic())))
        if time.monotonic() < self._looked + LOOK:
            return []
        self._looked = time.monotonic()
        events = [event for task in self._tasks for event in task.read_events() if event.job in self._wanted]
        events += self._find_lost()
        self._tasks = [task for task in self._tasks if not task.is_over]
        return events

    def _flush(self) -> None:
        """Submit the groups that were given since the last call."""
        size = self._executor.groups
        batches = [self._pending[start : start + size] for start in range(0, len(self._pending), size)]
        self._pending = []
        for start in range(0, len(batches), LARGEST_ARRAY):
            self._submit_array(batches[start : start + LARGEST_ARRAY])

    def _submit_array(self, batches: Sequence[Sequence[Group]]) -> None:
        self._count += 1
        folder = self._folder / f"array-{self._count}"
        folder.mkdir(parents=True)
        paths = []
        for index, groups in enumerate(batches):
            jobs = {job.id: job for group in groups for job in group}  # a data set may be in several
            path = folder / f"task-{index}.json"
            path.write_text(json.dumps(pack_group(tuple(jobs.values()), self._settings, self._versions)))
            paths.append(path)
        self._executor.submit_array(folder, paths)
        self._tasks += map(Task.of, paths)
        self._asked = time.monotonic()

    def _find_lost(self) -> list[Event]:
        """Failures of the jobs of tasks that Slurm no longer knows and that did not report an end."""
        if time.monotonic() < self._asked + POLL:
            return []
        self._asked = time.monotonic()
        known = read_queue()
        events: list[Event] = []
        for task in self._tasks:
            if task.path in known:
                task.gone_since = None
            elif task.gone_since is None:
                task.gone_since = time.monotonic()
            elif time.monotonic() > task.gone_since + DELAY:
                lost = {job: _lost(task) for job in task.jobs if job not in task.ended}
                events += [Event(job, outcome) for job, outcome in lost.items() if job in self._wanted]
                task.ended |= lost
        return events

    def cancel(self) -> None:
        """Take all tasks that have not ended out of Slurm's queue."""
        known = read_queue() if self._tasks else {}
        ids = [known[task.path].id for task in self._tasks if task.path in known]
        if ids:
            _ask("scancel", *ids)


def _lost(task: Task) -> Outcome:
    message = (
        f"the Slurm task of {task.path.parent.name}/{task.path.name} ended without a result: it was cancelled, its "
        f"memory was too small, or its node does not see the results folder; its output is in {task.path.parent}/logs"
    )
    return Outcome("failed", "TaskLost", message)


@dataclass(frozen=True)
class Queued:
    """A task in Slurm's queue."""

    id: str
    state: str
    node: str


def read_queue() -> dict[Path, Queued]:
    """The tasks that Slurm has in its queue, waiting or running, by their files; `BenchError` if it does not answer."""
    queue = {}
    for line in _ask("squeue", "-h", "-r", "--me", "-o", "%i|%T|%N|%K|%k").splitlines():
        identity, state, node, index, comment = line.split("|", 4)
        number = index if index.isdigit() else "0"  # an array of one task is none
        queue[Path(comment) / f"task-{number}.json"] = Queued(identity, state, node)
    return queue


def find_states(root: Path) -> dict[Path, list[tuple[Task, str]]]:
    """The tasks below `root`, the folder of all runs, by the folder of their array; queued, running, done or lost."""
    paths = sorted(root.glob("*/array-*/task-*.json"))
    queue = read_queue() if paths else {}
    by_folder: dict[Path, list[tuple[Task, str]]] = {}
    for path in paths:
        task = Task.of(path)
        task.read_events()
        by_folder.setdefault(path.parent, []).append((task, _state_of(task, queue.get(path))))
    return by_folder


def _state_of(task: Task, queued: Queued | None) -> str:
    if task.is_over:
        return "done"
    if queued is None:
        return "lost"
    return "queued" if queued.state in ("PENDING", "REQUEUED", "SUSPENDED") else "running"


def count_states(results: Path) -> Mapping[str, int]:
    """The number of Slurm tasks of a results folder that are queued, running, done and lost; empty without any."""
    root = results.absolute() / FOLDER
    if not root.is_dir() or shutil.which("squeue") is None:
        return {}
    counts = Counter(state for tasks in find_states(root).values() for _, state in tasks)
    return {state: counts[state] for state in ("queued", "running", "done", "lost")}


def _ask(*command: str) -> str:
    """What a command of Slurm answers; `BenchError` with its last line if it fails."""
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise BenchError(
            f"executor slurm: {command[0]} failed: {_last_line(done.stderr)}",
            "`sinfo -o '%P %c %m %G'` shows cores, memory and GPUs of the nodes",
        )
    return done.stdout


def _last_line(text: str) -> str:
    lines: Iterable[str] = filter(None, map(str.strip, text.splitlines()))
    return ([*lines] or ["without a word"])[-1]
