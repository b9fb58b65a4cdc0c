"""What the operating system may offer: locks, limits, memory, signals and the contents of `/proc`.

Every function has a fallback, so that reading records and making tables works on any platform.
"""

from __future__ import annotations

import errno
import importlib
import multiprocessing
import os
import platform
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

#: error codes of a file system without locks
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF}
PROC = Path("/proc")


def _import_if_present(name: str) -> Any:  # noqa: ANN401
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


fcntl = _import_if_present("fcntl")
resource = _import_if_present("resource")


def lock_file(file: IO[Any]) -> bool:
    """Wait for the exclusive lock on an open file; False where there are no locks.

    The lock ends with the process.
    """
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return False
        raise
    return True


def count_cores() -> int:
    """The cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def describe_mps() -> str:
    """Whether NVIDIA's Multi-Process Service runs, by which the processes on a GPU compute at the same time."""
    pipes = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"))  # noqa: S108 - NVIDIA's default
    if (pipes / "control").exists():
        return "runs: the processes on a GPU compute at the same time"
    return "does not run: the processes on a GPU take turns; `nvidia-cuda-mps-control -d` starts it"


def limit_memory(limit: int | None) -> None:
    """Make allocations beyond `limit` bytes fail (Linux only).

    A kernel that runs short of memory also ends this process first.
    """
    with suppress(OSError):
        (PROC / "self/oom_score_adj").write_text("900")
    if limit is not None and sys.platform == "linux" and resource is not None:
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def reset_peak_memory() -> bool:
    """Reset the peak of this process's memory; False where the system does not record it."""
    try:
        (PROC / "self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def read_peak_memory() -> int | None:
    """The peak of this process's memory in bytes; None where the system does not record it."""
    return _read_status("VmHWM")


def read_allocated_memory() -> int | None:
    """The bytes that this process has allocated, as `limit_memory` counts; None where the system does not record it."""
    return _read_status("VmData")


def _read_status(name: str) -> int | None:
    """A size of this process in bytes."""
    try:
        lines = (PROC / "self/status").read_text().splitlines()
    except OSError:
        return None
    size = next((line for line in lines if line.startswith(f"{name}:")), None)
    if size is None:
        return None
    return int(size.split()[1]) * 1024


@cache
def cpu_has_bf16() -> bool:
    """Whether this CPU has instructions for bfloat16 (AVX-512 BF16 or AMX), as far as the system reports it."""
    flags = set(_read_cpu_fact("flags").split())
    return bool({"avx512_bf16", "amx_bf16"} & flags)


def cpu_name() -> str:
    """The name of the CPU, as far as the system reports it."""
    return _read_cpu_fact("model name") or platform.processor() or platform.machine()


def _read_cpu_fact(name: str) -> str:
    try:
        with (PROC / "cpuinfo").open() as file:
            return next((line.partition(":")[2].strip() for line in file if line.startswith(name)), "")
    except OSError:
        return ""


@contextmanager
def keep_working_directory() -> Iterator[None]:
    """Go back to the working directory after the block, whatever a plugin does in it."""
    before = os.getcwd()
    try:
        yield
    finally:
        os.chdir(before)


@contextmanager
def block_interrupts() -> Iterator[None]:
    """Keep SIGINT from processes started inside this block, so that the parent alone handles Ctrl-C.

    Ctrl-C reaches every process of a terminal. Where signals cannot be blocked, this has no effect.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def has_fork_server() -> bool:
    """Whether processes can be forked from a server that has imported what they need."""
    return "forkserver" in multiprocessing.get_all_start_methods()
