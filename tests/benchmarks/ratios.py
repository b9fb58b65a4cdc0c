"""Ratios of two running times, measured in turns in one run, so that a busy machine slows both."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure_ratio(work: Callable[[], Any], reference: Callable[[], Any], rounds: int = 5) -> float:
    """The median over rounds of time(work) / time(reference), after one warm-up of each."""
    work(), reference()
    return median(seconds(work) / seconds(reference) for _ in range(rounds))
