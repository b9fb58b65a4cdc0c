from __future__ import annotations

import time
from typing import ClassVar

from backdoor_bench_none.api import Context, Defense, DefenseResult, DefenseTask, Stage


class Hangs(Defense):
    """Never ends."""

    stage: ClassVar[Stage] = Stage.IN_TRAINING

    def run(self, task: DefenseTask, context: Context) -> DefenseResult:
        while True:
            time.sleep(1)
