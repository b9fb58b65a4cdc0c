"""The kinds of component, and the base class of each."""

from __future__ import annotations

from collections.abc import Mapping

from backdoor_bench_none.contracts.architecture import Activation, Architecture
from backdoor_bench_none.contracts.attack import Attack
from backdoor_bench_none.contracts.component import Component
from backdoor_bench_none.contracts.dataset import Dataset
from backdoor_bench_none.contracts.defense import Defense
from backdoor_bench_none.contracts.executor import Executor
from backdoor_bench_none.contracts.metric import Metric
from backdoor_bench_none.contracts.trainer import Trainer

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
