"""What a stage takes: seconds, memory, and the warnings on the way."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from backdoor_bench_none.results.record import Cost

STATUS = Path("/proc/self/status")


@contextmanager
def watch_peak_memory(device: torch.device) -> Iterator[Callable[[], int | None]]:
    """Yields a function for the highest memory in bytes since then: the
    device's on CUDA, this process's on Linux, else None.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: int(torch.cuda.max_memory_allocated(device))
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts again
    except OSError:
        yield lambda: None
        return
    yield _high_water_mark


def _high_water_mark() -> int | None:
    line = next((line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM")), None)
    return int(line.split()[1]) * 1024 if line else None


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
