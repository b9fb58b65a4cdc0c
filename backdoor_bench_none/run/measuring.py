"""What a stage takes: seconds, memory, and the warnings on the way."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from backdoor_bench_none.contracts.record import Cost
from backdoor_bench_none.system import read_peak_memory, reset_peak_memory


@contextmanager
def watch_peak_memory(device: torch.device) -> Iterator[Callable[[], int | None]]:
    """Yields a function for the highest memory in bytes since then: the
    device's on CUDA, this process's on Linux, else None.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: int(torch.cuda.max_memory_allocated(device))
        return
    has_mark = reset_peak_memory()
    yield lambda: read_peak_memory() if has_mark else None


@dataclass
class Measured:
    """What was measured once the stage has ended."""

    cost: Cost = field(default_factory=lambda: Cost(seconds=0.0))
    warnings: list[str] = field(default_factory=list)


@contextmanager
def measure_stage(device: torch.device) -> Iterator[Measured]:
    """Seconds, peak memory and warnings of what is done inside."""
    measured = Measured()
    started = time.perf_counter()
    with watch_peak_memory(device) as peak, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        yield measured
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    measured.cost = Cost(seconds=time.perf_counter() - started, peak_memory=peak())
    measured.warnings = list(dict.fromkeys(str(warning.message) for warning in caught))
