"""The highest memory of a stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

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
