from __future__ import annotations

import os
import signal
from typing import ClassVar

from backdoor_bench_none.api import Context, Defense, DefenseResult, DefenseTask, Stage


class Killed(Defense):
    """Takes its process with it."""

    stage: ClassVar[Stage] = Stage.IN_TRAINING

    def run(self, task: DefenseTask, context: Context) -> DefenseResult:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("unreachable")
