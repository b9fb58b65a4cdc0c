"""No attack: the baseline every benign accuracy is read against."""

from __future__ import annotations

from typing import ClassVar

from backdoor_bench_none.api import Attack, AttackTask, Context, PoisonedSamples


class Clean(Attack):
    """Leaves the training set as it is, and has no triggered test set, so that ASR and RA are not defined."""

    poisons: ClassVar[bool] = False

    def attack_test(self, task: AttackTask, context: Context) -> PoisonedSamples:
        """No samples."""
        return PoisonedSamples.nothing(task.data)
