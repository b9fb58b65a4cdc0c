from __future__ import annotations

from typing import ClassVar

import torch

from backdoor_bench_none.api import Context, Defense, DefenseResult, DefenseTask, Stage


class Hog(Defense):
    """Takes all the memory there is, up to 64 GB; it is not touched."""

    stage: ClassVar[Stage] = Stage.IN_TRAINING

    def run(self, task: DefenseTask, context: Context) -> DefenseResult:
        hoard = [torch.empty(2**28, dtype=torch.uint8) for _ in range(256)]
        return DefenseResult(task.new_model(), extras={"bytes": sum(map(len, hoard))})
