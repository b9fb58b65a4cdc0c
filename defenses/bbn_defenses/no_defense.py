"""No defense: the network as the attack left it."""

from __future__ import annotations

from typing import ClassVar

from backdoor_bench_none.api import Context, Defense, DefenseResult, DefenseTask, Stage


class NoDefense(Defense):
    """Returns the victim, the network trained on the untrusted data by the cell's recipe."""

    stage: ClassVar[Stage] = Stage.POST_TRAINING
    starts_from_victim: ClassVar[bool] = True
    may_return_victim: ClassVar[bool] = True

    def run(self, task: DefenseTask, context: Context) -> DefenseResult:
        """The victim, untouched."""
        return DefenseResult(task.victim())
