"""What an extra metric is, and what it may look at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from backdoor_bench_none.contracts.component import Component
from backdoor_bench_none.contracts.context import Context


@dataclass(frozen=True)
class Evaluation:
    """What a metric may look at: predictions (N,) int64 on the clean test set and (M,) on the triggered one, with their
    labels, and the finished model.
    """

    model: nn.Module
    clean_predictions: Tensor
    clean_labels: Tensor
    triggered_predictions: Tensor
    triggered_labels: Tensor
    wanted_labels: Tensor
    #: numbers of triggered images of each of the attack's triggers, where it has several
    part_sizes: tuple[int, ...] = ()


class Metric(Component):
    """Base of all extra metrics."""

    def compute(self, evaluation: Evaluation, context: Context) -> Mapping[str, float]:
        """Numbers by name; the names are prefixed with the metric's."""
        raise NotImplementedError
