from __future__ import annotations

from typing import ClassVar

from backdoor_bench_none.api import (
    Attack,
    AttackTask,
    Context,
    Defense,
    DefenseResult,
    DefenseTask,
    PoisonedSamples,
    Stage,
)


class Scribbles(Defense):
    """Writes into the training set it is given."""

    stage: ClassVar[Stage] = Stage.IN_TRAINING

    def run(self, task: DefenseTask, context: Context) -> DefenseResult:
        task.train.images[:5] = 0
        return DefenseResult(task.new_model())


class ScribblingAttack(Attack):
    """Writes into the data it is given."""

    def poison(self, task: AttackTask, context: Context) -> PoisonedSamples:
        task.data.labels[:5] = 0
        return PoisonedSamples.nothing(task.data)

    def attack_test(self, task: AttackTask, context: Context) -> PoisonedSamples:
        return PoisonedSamples.nothing(task.data)
