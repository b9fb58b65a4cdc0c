"""What the author of a plugin imports."""

from __future__ import annotations

from collections.abc import Mapping

from backdoor_bench_none.attack import (
    Attack,
    AttackTask,
    CleanLabelAttack,
    Crafter,
    FoundTriggers,
    LabelMode,
    PoisonedSamples,
    SearchTask,
    StampAttack,
    TriggerAttack,
    VictimTask,
)
from backdoor_bench_none.component import Component, Incidental
from backdoor_bench_none.context import Context
from backdoor_bench_none.data.dataset import Dataset, DatasetInfo, ImageSet
from backdoor_bench_none.defense import Defense, DefenseResult, DefenseTask, OracleTask, Stage
from backdoor_bench_none.evaluation import Evaluation, Metric
from backdoor_bench_none.executors.base import Executor
from backdoor_bench_none.hookspecs import hookimpl
from backdoor_bench_none.models.architecture import Activation, Architecture, ModelSpec
from backdoor_bench_none.recipe import Recipe
from backdoor_bench_none.task import TrainingTask
from backdoor_bench_none.training import Batch, FitOptions, History, Trainer, TrainingData, cross_entropy
from backdoor_bench_none.trigger import PlacedTiles, Trigger

__all__ = [
    "BASES",
    "Activation",
    "Architecture",
    "Attack",
    "AttackTask",
    "Batch",
    "CleanLabelAttack",
    "Component",
    "Context",
    "Crafter",
    "Dataset",
    "DatasetInfo",
    "Defense",
    "DefenseResult",
    "DefenseTask",
    "Evaluation",
    "Executor",
    "FitOptions",
    "FoundTriggers",
    "History",
    "ImageSet",
    "Incidental",
    "LabelMode",
    "Metric",
    "ModelSpec",
    "OracleTask",
    "PlacedTiles",
    "PoisonedSamples",
    "Recipe",
    "SearchTask",
    "Stage",
    "StampAttack",
    "Trainer",
    "TrainingData",
    "TrainingTask",
    "Trigger",
    "TriggerAttack",
    "VictimTask",
    "cross_entropy",
    "hookimpl",
]  # fmt: skip

#: The base class of each kind of component.
BASES: Mapping[str, type[Component]] = {
    "attack": Attack,
    "defense": Defense,
    "architecture": Architecture,
    "activation": Activation,
    "dataset": Dataset,
    "trainer": Trainer,
    "metric": Metric,
    "executor": Executor,
}
