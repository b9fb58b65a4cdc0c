"""Runs each job in a separate process on this machine.

A crash, a hang or a leak of one job harms no other, and its peak memory can be measured.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Literal

from pydantic import Field, PositiveInt

from backdoor_bench_none.contracts.executor import Event, Executor, Group, Pool
from backdoor_bench_none.contracts.job import Job, Outcome, Settings
from backdoor_bench_none.run.jobs import run_job
from backdoor_bench_none.system import (
    block_interrupts,
    count_cores,
    has_fork_server,
    limit_memory,
    read_allocated_memory,
)

#: seconds a job may run past its own deadline before it is killed
GRACE = 10.0
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
    """Processes on this machine: on a CPU one slot per core, with one thread each, with CUDA one slot per GPU."""

    slots: PositiveInt | Literal["auto"] = Field("auto", description="jobs at the same time")

    @contextmanager
    def open(self, settings: Settings) -> Iterator[Pool]:
        """A pool of processes, forked from a server that has imported torch: a start takes 0.1 s instead of seconds."""
        pool = _LocalPool(settings, self.slots)
        try:
            yield pool
        finally:
            pool.stop()


@dataclass
class _Running:
    job: Job
    process: BaseProcess
    connection: Connection
    device: str
    kill_at: float | None
    outcome: Outcome | None = None


class _LocalPool:
    def __init__(self, settings: Settings, slots: int | Literal["auto"]) -> None:
        self._settings = settings
        self._context = start_process_server()
        self._devices = _find_devices(settings.device, self._context)
        is_cuda = self._devices[0].startswith("cuda")
        if slots == "auto":
            slots = len(self._devices) if is_cuda else count_cores()
        self.slots = slots
        self._threads = None if is_cuda else max(1, count_cores() // slots)
        self._running: list[_Running] = []
        self._begun: list[Event] = []

    def submit(self, group: Group) -> None:
        (job,) = group
        self._begun.append(Event(job.id))
        ours, theirs = self._context.Pipe()
        busy = [running.device for running in self._running]
        device = min(self._devices, key=busy.count)
        arguments = (job, self._settings, device, self._threads, theirs)
        process = self._context.Process(target=_work, args=arguments, name=job.title)  # type: ignore[attr-defined]
        process.start()
        theirs.close()
        timeout = self._settings.timeout
        kill_at = None
        if timeout is not None:
            kill_at = time.monotonic() + timeout + GRACE
        self._running.append(_Running(job, process, ours, device, kill_at))

    def wait(self, timeout: float) -> list[Event]:
        if self._begun:
            begun, self._begun = self._begun, []
            return begun
        now = time.monotonic()
        left = [max(0.0, running.kill_at - now) for running in self._running if running.kill_at is not None]
        messages = [running.connection for running in self._running]
        ends = [running.process.sentinel for running in self._running]
        wait([*messages, *ends], min([timeout, *left]))
        events: list[Event] = []
        for running in self._running:
            events += self._events_of(running)
        self._running = [running for running in self._running if running.outcome is None]
        return events

    def _events_of(self, running: _Running) -> Iterator[Event]:
        alive = running.process.is_alive()  # before the pipe is read, so that nothing sent before the end is lost
        with suppress(EOFError, OSError):
            while running.connection.poll():
                message = running.connection.recv()
                if isinstance(message, Outcome):
                    running.outcome = message
                else:
                    yield Event(running.job.id, done=message[0], total=message[1])
        if running.outcome is None and running.kill_at is not None and time.monotonic() > running.kill_at:
            running.process.kill()
            limit = f"the time limit of {self._settings.timeout:g} s has passed, and {GRACE:g} s to stop by itself"
            running.outcome = Outcome("timeout", "Timeout", limit, kind=running.job.kind)
        elif running.outcome is None and not alive:
            running.outcome = Outcome("failed", "ProcessDied", _describe_end(running.process), kind=running.job.kind)
        if running.outcome is not None:
            running.process.join(GRACE)
            running.process.kill()  # a thread that a defense started would keep it alive
            running.process.join()
            running.connection.close()
            yield Event(running.job.id, outcome=running.outcome)

    def stop(self) -> None:
        for running in self._running:
            running.process.kill()
            running.process.join()
            running.connection.close()
        self._running = []


def _work(job: Job, settings: Settings, device: str, threads: int | None, connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # before the limit: a thread that lacks memory for its first step never says that it has started
    threading.Thread(target=_end_with_parent, args=(connection,), daemon=True).start()
    limit = settings.memory if device == "cpu" else None
    allocated = read_allocated_memory()
    if limit is not None and allocated is not None and limit <= allocated:
        message = f"budget.memory allows {limit:,} bytes, and a process has {allocated:,} when it starts; allow more"
        connection.send(Outcome("failed", "MemoryError", message, kind=job.kind))
        return
    limit_memory(limit)
    connection.send(run_job(job, settings, device, threads, lambda done, total: connection.send((done, total))))


def _end_with_parent(connection: Connection) -> None:
    """End this process when its parent ends: the parent never sends, so the pipe becomes readable when it is closed."""
    with suppress(EOFError, OSError):
        connection.recv()
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


def _find_devices(device: str, context: BaseContext) -> list[str]:
    """The devices that jobs are spread over: all GPUs, if there are any and the run does not name one device."""
    if device not in ("auto", "cuda"):
        return [device]
    count = _count_gpus(context)
    if count == 0:
        return ["cpu" if device == "auto" else device]
    return [f"cuda:{index}" for index in range(count)]


def _count_gpus(context: BaseContext) -> int:
    """The number of GPUs, counted in a process of its own: this one needs neither torch nor a CUDA context."""
    ours, theirs = context.Pipe()
    process = context.Process(target=_send_gpu_count, args=(theirs,))  # type: ignore[attr-defined]
    process.start()
    theirs.close()
    try:
        count: int = ours.recv()
    except EOFError:  # CUDA ended the process
        count = 0
    process.join()
    ours.close()
    return count


def _send_gpu_count(connection: Connection) -> None:
    import torch

    connection.send(torch.cuda.device_count() if torch.cuda.is_available() else 0)


def _describe_end(process: BaseProcess) -> str:
    code = process.exitcode or 0
    if code < 0:
        name = signal.Signals(-code).name
        reason = f"the process was ended by {name}"
        if name == "SIGKILL":
            reason += ", perhaps for lack of memory"
        return reason
    return f"the process ended with exit code {code}"
