"""Device, precision, seed, deadline and progress of a stage."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch

from backdoor_bench_none.errors import BenchError, DeadlineError
from backdoor_bench_none.seeds import derive_seed
from backdoor_bench_none.system import cpu_has_bf16


def no_log(name: str, value: float, step: int) -> None:
    """Ignore a logged number."""


def no_progress(done: int, total: int) -> None:
    """Ignore the progress of a stage."""


@dataclass(frozen=True)
class Context:
    """The environment in which a stage runs.

    `amp` is the autocast type, or None for float32. `deadline` is in seconds of `time.monotonic`. `log(name, value,
    step)` records a number, `progress(done, total)` counts epochs.
    """

    device: torch.device
    seed: int
    amp: torch.dtype | None = None
    deadline: float | None = None
    log: Callable[[str, float, int], None] = no_log
    progress: Callable[[int, int], None] = no_progress

    def autocast(self) -> AbstractContextManager[object]:
        """The context manager of mixed precision; without effect in float32."""
        return nullcontext() if self.amp is None else torch.autocast(self.device.type, self.amp)

    def generator(self, *purpose: object) -> torch.Generator:
        """A generator on the CPU, seeded by this stage's seed and a purpose."""
        return torch.Generator().manual_seed(derive_seed(self.seed, *purpose))

    def derive(self, *purpose: object) -> Context:
        """The same context with a seed derived for a purpose."""
        return replace(self, seed=derive_seed(self.seed, *purpose))

    def check_deadline(self) -> None:
        """Raise `DeadlineError` once the deadline has passed."""
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise DeadlineError("the time limit has passed", "raise budget.cell_timeout")


def choose_device(name: str = "auto") -> torch.device:
    """The device called `auto`, `cpu`, `cuda` or `cuda:N`; `auto` is CUDA where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise BenchError(f"unknown device '{name}'", "auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise BenchError(f"there is no device '{name}'", "use --device cpu, or see `bbn doctor`")
    return device


def choose_amp(device: torch.device) -> torch.dtype | None:
    """bfloat16 where the hardware supports it; None, for float32, elsewhere.

    Emulated bfloat16 is 4 to 12 times slower than float32.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    return torch.bfloat16 if cpu_has_bf16() else None
