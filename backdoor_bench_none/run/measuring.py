"""Measures a stage: its seconds, its peak memory, and the warnings it raised."""

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
    """Yield a function that returns the peak memory in bytes since then.

    That is the memory of the device on CUDA and of this process on Linux; None elsewhere.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: int(torch.cuda.max_memory_allocated(device))
        return
    if reset_peak_memory():
        yield read_peak_memory
    else:
        yield lambda: None


@dataclass
class Measured:
    """The measurements of a stage, set when it has ended."""

    cost: Cost = field(default_factory=lambda: Cost(seconds=0.0))
    warnings: list[str] = field(default_factory=list)


@contextmanager
def measure_stage(device: torch.device) -> Iterator[Measured]:
    """Measure the seconds, the peak memory and the warnings of what is done inside."""
    measured = Measured()
    _finish_work(device)  # of the stage before
    started = time.perf_counter()
    with watch_peak_memory(device) as peak, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        yield measured
        _finish_work(device)
    measured.cost = Cost(seconds=time.perf_counter() - started, peak_memory=peak())
    measured.warnings = list(dict.fromkeys(str(warning.message) for warning in caught))


def _finish_work(device: torch.device) -> None:
    """Wait until a GPU has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
