"""Runs each job in a separate process on this machine.

A crash, a hang or a leak of one job harms no other, and its peak memory can be measured.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from queue import SimpleQueue
from typing import TYPE_CHECKING, Literal

from pydantic import Field, PositiveInt

from backdoor_bench_none.contracts.executor import Event, Executor, Group, Pool
from backdoor_bench_none.contracts.job import Job, Outcome, Settings
from backdoor_bench_none.executors.room import Gpu, Room
from backdoor_bench_none.run.jobs import run_job
from backdoor_bench_none.system import (
    block_interrupts,
    count_cores,
    has_fork_server,
    limit_memory,
    read_allocated_memory,
)

if TYPE_CHECKING:
    from backdoor_bench_none.results.store import Artifact

#: seconds a job may run past its own deadline before it is killed
GRACE = 10.0
#: threads of a process with no job: its main thread and the one that receives jobs
OWN_THREADS = 2
#: what the process server imports before it forks
PRELOAD = [
    "torch._dynamo",  # the first optimizer imports it, which takes seconds
    "backdoor_bench_none.cli.main",
    "backdoor_bench_none.run.stages",
    "backdoor_bench_none.registry.plugins",
    "backdoor_bench_none.data.digits",
    "bbn_attacks.badnets",
    "bbn_defenses.none",
    "sklearn.metrics",
]


class Local(Executor):
    """Processes on this machine: on a CPU one slot per core, with one thread each; on GPUs as many as fit.

    With CUDA, jobs that compute with no network take slots of the CPU.
    """

    slots: PositiveInt | Literal["auto"] = Field("auto", description="jobs at the same time; with CUDA on all GPUs")
    per_gpu: PositiveInt | Literal["auto"] = Field(
        "auto", description="jobs at the same time on a GPU; auto: as many as fit beside the first of their kind"
    )
    cores: PositiveInt | Literal["auto"] = Field(
        "auto", description="cores that the jobs share; auto: all that this process may use"
    )
    keep_processes: bool | Literal["auto"] = Field(
        "auto",
        description="whether a process runs one job after another, until one fails; auto: with CUDA, where a process "
        "takes seconds to start",
    )

    @contextmanager
    def open(self, settings: Settings) -> Iterator[Pool]:
        """A pool of processes, forked from a server that has imported torch: a start takes 0.1 s instead of seconds."""
        context = start_process_server()
        pool = _LocalPool(settings, self, context, find_gpus(settings.device, context))
        try:
            yield pool
        finally:
            pool.stop()


@dataclass(frozen=True)
class Ended:
    """What a process says at the end of a job: how it ended, and whether the process takes another one."""

    outcome: Outcome
    stays: bool


@dataclass
class _Worker:
    """A process that runs one job after another."""

    process: BaseProcess
    connection: Connection
    device: str
    job: Job | None = None
    kill_at: float | None = None

    def stop(self) -> None:
        self.process.kill()  # a thread that a defense started would keep it alive
        self.process.join()
        self.connection.close()


class _LocalPool:
    def __init__(self, settings: Settings, executor: Local, context: BaseContext, gpus: Sequence[Gpu]) -> None:
        self._settings = settings
        self._context = context
        cores = count_cores() if executor.cores == "auto" else executor.cores
        self._room = Room(settings.device, gpus, cores, executor.slots, executor.per_gpu)
        self._keeps = bool(gpus) if executor.keep_processes == "auto" else executor.keep_processes
        self._workers: list[_Worker] = []
        self._begun: list[Event] = []

    def has_room(self, group: Group) -> bool:
        return self._room.find_device(group[0], self._running()) is not None

    def submit(self, group: Group) -> None:
        (job,) = group
        device = self._room.find_device(job, self._running())
        assert device is not None, "there is no room for a job that was submitted"
        worker = self._find_idle(device) or self._start(device)
        worker.job = job
        timeout = self._settings.timeout
        worker.kill_at = None if timeout is None else time.monotonic() + timeout + GRACE
        with suppress(BrokenPipeError):  # it has just died, which `wait` finds
            worker.connection.send(job)
        self._begun.append(Event(job.id))

    def _find_idle(self, device: str) -> _Worker | None:
        """A process on this device that waits for a job; those that have died while they did are forgotten."""
        for worker in [worker for worker in self._workers if worker.job is None]:
            if not worker.process.is_alive():
                worker.stop()
                self._workers.remove(worker)
            elif worker.device == device:
                return worker
        return None

    def _running(self) -> list[tuple[Job, str]]:
        return [(worker.job, worker.device) for worker in self._workers if worker.job is not None]

    def _start(self, device: str) -> _Worker:
        ours, theirs = self._context.Pipe()
        arguments = (self._settings, device, self._room.threads, self._keeps, theirs)
        process = self._context.Process(target=_work, args=arguments, name="bbn")  # type: ignore[attr-defined]
        process.start()
        theirs.close()
        worker = _Worker(process, ours, device)
        self._workers.append(worker)
        return worker

    def wait(self, timeout: float) -> list[Event]:
        if self._begun:
            begun, self._begun = self._begun, []
            return begun
        busy = [worker for worker in self._workers if worker.job is not None]
        now = time.monotonic()
        left = [max(0.0, worker.kill_at - now) for worker in busy if worker.kill_at is not None]
        messages = [worker.connection for worker in busy]
        ends = [worker.process.sentinel for worker in busy]
        wait([*messages, *ends], min([timeout, *left]))
        return [event for worker in busy for event in self._events_of(worker)]

    def _events_of(self, worker: _Worker) -> Iterator[Event]:
        assert worker.job is not None
        job, outcome, stays = worker.job, None, False
        alive = worker.process.is_alive()  # before the pipe is read, so that nothing sent before the end is lost
        with suppress(EOFError, OSError):
            while worker.connection.poll():
                message = worker.connection.recv()
                if isinstance(message, Ended):
                    outcome, stays = message.outcome, message.stays
                    break
                yield Event(job.id, done=message[0], total=message[1])
        if outcome is None and worker.kill_at is not None and time.monotonic() > worker.kill_at:
            worker.process.kill()
            limit = f"the time limit of {self._settings.timeout:g} s has passed, and {GRACE:g} s to stop by itself"
            outcome = Outcome("timeout", "Timeout", limit, kind=job.kind)
        elif outcome is None and not alive:
            outcome = Outcome("failed", "ProcessDied", _describe_end(worker.process), kind=job.kind)
        if outcome is None:
            return
        worker.job = None
        self._room.note_memory(job, outcome.device_memory)
        if not stays:
            worker.process.join(0 if outcome.error in ("Timeout", "ProcessDied") else GRACE)
            worker.stop()
            self._workers.remove(worker)
        yield Event(job.id, outcome=outcome)

    def stop(self) -> None:
        for worker in self._workers:
            worker.stop()
        self._workers = []


def _work(settings: Settings, device: str, threads: int, keeps: bool, connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    inbox: SimpleQueue[Job] = SimpleQueue()
    # before the limit: a thread that lacks memory for its first step never says that it has started
    threading.Thread(target=_receive_jobs, args=(connection, inbox), daemon=True).start()
    limit = settings.memory if device == "cpu" else None
    allocated = read_allocated_memory()
    job = inbox.get()
    if limit is not None and allocated is not None and limit <= allocated:
        message = f"budget.memory allows {limit:,} bytes, and a process has {allocated:,} when it starts; allow more"
        connection.send(Ended(Outcome("failed", "MemoryError", message, kind=job.kind), stays=False))
        return
    limit_memory(limit)
    kept: dict[str, Artifact] = {}
    while True:
        outcome = run_job(job, settings, device, threads, lambda *epochs: connection.send(epochs), kept)
        left_behind = threading.active_count() > OWN_THREADS or multiprocessing.active_children()
        stays = keeps and outcome.status == "done" and not left_behind
        connection.send(Ended(outcome, stays))
        if not stays:
            return
        job = inbox.get()


def _receive_jobs(connection: Connection, inbox: SimpleQueue[Job]) -> None:
    """Hand over the jobs that the parent sends, and end this process when it ends, which closes the pipe."""
    with suppress(EOFError, OSError):
        while True:
            inbox.put(connection.recv())
    os._exit(1)


def start_process_server() -> BaseContext:
    """A context whose processes are forked from a server that has imported what they need.

    The server and its processes do not receive Ctrl-C. Where there is no such server, processes are spawned.
    """
    if not has_fork_server():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    resource_tracker.ensure_running()  # its start would lift the block below
    with block_interrupts():
        forkserver.ensure_running()
    return context


def find_gpus(device: str, context: BaseContext) -> list[Gpu]:
    """The GPUs that a run on `device` uses.

    They are looked for in a process of its own, so that this one needs neither torch nor a CUDA context.
    """
    if device == "cpu":
        return []
    ours, theirs = context.Pipe()
    process = context.Process(target=_send_gpus, args=(theirs,))  # type: ignore[attr-defined]
    process.start()
    theirs.close()
    gpus: list[Gpu] = []
    with suppress(EOFError):  # CUDA ended the process
        gpus = ours.recv()
    process.join()
    ours.close()
    return [gpu for gpu in gpus if device in ("auto", "cuda", gpu.device)]


def _send_gpus(connection: Connection) -> None:
    import torch

    indices = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    connection.send([Gpu(f"cuda:{index}", torch.cuda.get_device_properties(index).total_memory) for index in indices])


def _describe_end(process: BaseProcess) -> str:
    code = process.exitcode or 0
    if code < 0:
        name = signal.Signals(-code).name
        reason = f"the process was ended by {name}"
        if name == "SIGKILL":
            reason += ", perhaps for lack of memory"
        return reason
    return f"the process ended with exit code {code}"
