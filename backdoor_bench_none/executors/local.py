"""One process per job on this machine: a crash, a hang or a leak of
one job harms no other, and its peak memory is its own.
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

from backdoor_bench_none.contracts.executor import Event, Executor, Pool
from backdoor_bench_none.contracts.job import Job, Outcome, Settings
from backdoor_bench_none.run.jobs import run_job
from backdoor_bench_none.system import block_interrupts, count_cores, has_fork_server, limit_memory

#: seconds a job may run past its own deadline before it is killed
GRACE = 10.0
#: what every fresh process has imported already
PRELOAD = [
    "torch._dynamo",  # the first optimizer imports it, which takes seconds
    "backdoor_bench_none.cli.main",
    "backdoor_bench_none.run.stages",
    "backdoor_bench_none.registry.plugins",
    "bbn_attacks.badnets",
    "bbn_defenses.none",
]


class Local(Executor):
    """Processes on this machine. On a CPU, one slot per core with one thread each; with CUDA, one slot per GPU."""

    slots: PositiveInt | Literal["auto"] = Field("auto", description="jobs at the same time")

    @contextmanager
    def open(self, settings: Settings) -> Iterator[Pool]:
        """Processes are forked from a server that has imported torch, which takes 0.1 s each instead of seconds."""
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
        self._devices = _devices(settings.device)
        automatic = len(self._devices) if _is_cuda(self._devices) else count_cores()
        self.slots = automatic if slots == "auto" else slots
        self._threads = None if _is_cuda(self._devices) else max(1, count_cores() // self.slots)
        self._context = start_process_server()
        self._running: list[_Running] = []

    def submit(self, job: Job) -> None:
        ours, theirs = self._context.Pipe()
        busy = [running.device for running in self._running]
        device = min(self._devices, key=busy.count)
        arguments = (job, self._settings, device, self._threads, theirs)
        process = self._context.Process(target=_work, args=arguments, name=job.title)  # type: ignore[attr-defined]
        process.start()
        theirs.close()
        timeout = self._settings.timeout
        kill_at = None if timeout is None else time.monotonic() + timeout + GRACE
        self._running.append(_Running(job, process, ours, device, kill_at))

    def wait(self, timeout: float) -> list[Event]:
        deadlines = [r.kill_at for r in self._running if r.kill_at is not None]
        patience = min([timeout, *(max(0.0, at - time.monotonic()) for at in deadlines)])
        wait([r.connection for r in self._running] + [r.process.sentinel for r in self._running], patience)
        events = [event for running in list(self._running) for event in self._news(running)]
        self._running = [running for running in self._running if running.outcome is None]
        return events

    def _news(self, running: _Running) -> Iterator[Event]:
        alive = running.process.is_alive()  # read before the pipe, so that nothing sent before the end is lost
        with suppress(EOFError, OSError):
            while running.connection.poll():
                message = running.connection.recv()
                if isinstance(message, Outcome):
                    running.outcome = message
                else:
                    yield Event(running.job.id, done=message[0], total=message[1])
        if running.outcome is None and running.kill_at is not None and time.monotonic() > running.kill_at:
            running.process.kill()
            limit = f"the time limit of {self._settings.timeout:g} s and {GRACE:g} s to end by itself have passed"
            running.outcome = Outcome("timeout", "Timeout", limit, kind=running.job.kind)
        elif running.outcome is None and not alive:
            running.outcome = Outcome("failed", "ProcessDied", _death(running.process), kind=running.job.kind)
        if running.outcome is not None:
            running.process.join(GRACE)
            running.process.kill()  # a thread that a defense left behind would keep it alive
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
    limit_memory(settings.memory if device == "cpu" else None)
    threading.Thread(target=_die_with_parent, args=(connection,), daemon=True).start()
    connection.send(run_job(job, settings, device, threads, lambda done, total: connection.send((done, total))))


def _die_with_parent(connection: Connection) -> None:
    """The parent never sends: the pipe becomes readable when the parent is gone, and then nobody waits for this job."""
    with suppress(EOFError, OSError):
        connection.recv()
    os._exit(1)


def start_process_server() -> BaseContext:
    """The way to start processes: forked from a server that has imported what they need, and that Ctrl-C does not
    reach.
    """
    if not has_fork_server():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    resource_tracker.ensure_running()  # it would lift the block below when it starts
    with block_interrupts():
        forkserver.ensure_running()
    return context


def _devices(device: str) -> list[str]:
    if device not in ("auto", "cuda"):
        return [device]
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [f"cuda:{index}" for index in range(count)] or ["cpu" if device == "auto" else device]


def _is_cuda(devices: list[str]) -> bool:
    return devices[0].startswith("cuda")


def _death(process: BaseProcess) -> str:
    code = process.exitcode or 0
    if code < 0:
        name = signal.Signals(-code).name
        return f"the process was ended by {name}" + (", perhaps for want of memory" if name == "SIGKILL" else "")
    return f"the process ended with exit code {code}"
