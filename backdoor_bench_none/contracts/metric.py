"""Base class of extra metrics, and their input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.nn as nn

from backdoor_bench_none.contracts.attack import Attack
from backdoor_bench_none.contracts.component import Component
from backdoor_bench_none.contracts.context import Context
from backdoor_bench_none.contracts.dataset import DatasetInfo, ImageSet

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Evaluation:
    """The input of a metric: predictions and labels of the test images, and the finished model.

    Predictions are (N,) int64 on the clean test set and (M,) on the triggered one.
    """

    model: nn.Module
    clean_predictions: Tensor
    clean_labels: Tensor
    triggered_predictions: Tensor
    triggered_labels: Tensor
    wanted_labels: Tensor
    #: the number of triggered images per trigger, for attacks with several triggers
    part_sizes: tuple[int, ...] = ()
    #: the clean test set, the facts of the data set, and the attack: for metrics that classify other images
    test: ImageSet | None = None
    info: DatasetInfo | None = None
    attack: Attack | None = None


class Metric(Component):
    """Base of all extra metrics."""

    def absent_for(self, attack: Attack, info: DatasetInfo) -> str:
        """Why it has no value under an attack, as "the attack has no fixed trigger"; empty where it has one.

        It is then not computed; a benchmark without any cell that has a value is refused.
        """
        return ""

    def compute(self, evaluation: Evaluation, context: Context) -> Mapping[str, float]:
        """Values by name; each name is prefixed with that of the metric."""
        raise NotImplementedError
