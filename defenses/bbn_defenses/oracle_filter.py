"""The upper bound of all filters: it knows which samples are poisoned."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from backdoor_bench_none.api import Context, Defense, DefenseResult, DefenseTask, OracleTask, Stage


class OracleFilter(Defense):
    """Retrains from scratch without exactly the poisoned samples.

    It is no usable defense, since it knows the ground truth; every table says so.
    """

    stage: ClassVar[Stage] = Stage.PRE_TRAINING
    sees_ground_truth: ClassVar[bool] = True
    returns: ClassVar[tuple[Literal["flagged", "scores", "infected"], ...]] = ("flagged",)

    def run(self, task: DefenseTask, context: Context) -> DefenseResult:
        """The network trained on the benign samples."""
        assert isinstance(task, OracleTask)
        model = task.new_model()
        task.fit(model, context, keep=torch.nonzero(~task.poisoned).flatten())
        return DefenseResult(model, task.poisoned)
