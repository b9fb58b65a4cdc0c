"""What the operating system may or may not offer: locks, limits, memory, signals and the facts of `/proc`.

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

#: what a file system answers that has no locks
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
    """Wait for the exclusive lock on an open file, which ends with the process; False where there are no locks."""
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


def limit_memory(limit: int | None) -> None:
    """Let allocations beyond `limit` bytes fail (on Linux), and let a kernel short of memory end this process first."""
    with suppress(OSError):
        (PROC / "self/oom_score_adj").write_text("900")
    if limit is not None and sys.platform == "linux" and resource is not None:
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def reset_peak_memory() -> bool:
    """Start the high-water mark of this process's memory again; False where there is none."""
    try:
        (PROC / "self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def read_peak_memory() -> int | None:
    """The high-water mark of this process's memory in bytes; None where there is none."""
    try:
        lines = (PROC / "self/status").read_text().splitlines()
    except OSError:
        return None
    mark = next((line for line in lines if line.startswith("VmHWM")), None)
    return int(mark.split()[1]) * 1024 if mark else None


@cache
def cpu_has_bf16() -> bool:
    """Whether this CPU has instructions for bfloat16 (AVX-512 BF16 or AMX), as far as the system tells."""
    flags = set(_read_cpu_fact("flags").split())
    return bool({"avx512_bf16", "amx_bf16"} & flags)


def cpu_name() -> str:
    """The name of the CPU, as far as the system tells."""
    return _read_cpu_fact("model name") or platform.processor() or platform.machine()


def _read_cpu_fact(name: str) -> str:
    try:
        with (PROC / "cpuinfo").open() as file:
            return next((line.partition(":")[2].strip() for line in file if line.startswith(name)), "")
    except OSError:
        return ""


@contextmanager
def block_interrupts() -> Iterator[None]:
    """Processes started inside never receive SIGINT: Ctrl-C reaches the whole terminal, and the parent alone decides.

    Where signals cannot be blocked, nothing is.
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
