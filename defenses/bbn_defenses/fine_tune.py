"""Fine-tuning on trusted images: the control that NAD must be compared with."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from backdoor_bench_none.api import Context, Defense, DefenseResult, DefenseTask, Stage


class FineTune(Defense):
    """Fine-tunes the network on the clean images by the schedule of NAD's student, without its attention loss."""

    paper: ClassVar[str] = "arXiv:2101.05930"
    stage: ClassVar[Stage] = Stage.POST_TRAINING
    starts_from_victim: ClassVar[bool] = True

    clean_fraction: float = Field(
        0.05, gt=0, lt=1, description="share of the training set granted as trusted clean images"
    )
    epochs: int = Field(20, ge=1, description="passes over the clean images")
    batch_size: int = Field(64, ge=1, description="images per step")
    lr: float | None = Field(
        None,
        gt=0,
        description="learning rate of the first two epochs, a tenth of it after; default: the recipe's highest",
    )

    def run(self, task: DefenseTask, context: Context) -> DefenseResult:
        """The fine-tuned network."""
        model = task.victim()
        schedule: dict[str, Any] = {
            "schedule": "step",
            "milestones": (3,),
            "gamma": 0.1,
            "lr": self.lr or task.recipe.lr,
        }
        task.fit(
            model,
            context,
            data=task.clean,
            epochs=self.epochs,
            batch_size=self.batch_size,
            weight_decay=1e-4,
            **schedule,
        )
        return DefenseResult(model)
