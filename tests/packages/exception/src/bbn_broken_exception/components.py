from __future__ import annotations

from typing import ClassVar

from backdoor_bench_none.api import Context, Defense, DefenseResult, DefenseTask, Stage


class Raises(Defense):
    """Raises while it runs."""

    stage: ClassVar[Stage] = Stage.IN_TRAINING

    def run(self, task: DefenseTask, context: Context) -> DefenseResult:
        raise ValueError("it broke")
