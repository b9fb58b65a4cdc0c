"""The metrics of the field: their names, how they are shown, and which direction is better."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from backdoor_bench_none.maths.statistics import Interval

Better = Literal["higher", "lower"]


@dataclass(frozen=True)
class Metric:
    """A metric: `scale` turns a stored value into the shown one, which has `digits` decimals; `meaning` is one line."""

    name: str
    title: str
    better: Better
    meaning: str
    scale: float = 100.0
    digits: int = 1

    @property
    def heading(self) -> str:
        """The title with an arrow in the better direction."""
        arrow = "↑" if self.better == "higher" else "↓"
        return f"{self.title} {arrow}"

    @property
    def is_share(self) -> bool:
        """Whether its values lie between 0 and 1."""
        return self.scale == 100.0

    def bound(self, interval: Interval) -> Interval:
        """`interval` cut at 0, and at 1 for a share: Student's t does not respect these limits."""
        high = min(1.0, interval.high) if self.is_share else interval.high
        return Interval(max(0.0, interval.low), high)

    def show(self, value: float | None) -> str:
        """The value as tables show it; a dash for None."""
        if value is None:
            return "–"
        return f"{value * self.scale:.{self.digits}f}"


METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("ba", "BA", "higher", "BA benign accuracy in percent"),
        Metric("asr", "ASR", "lower", "ASR attack success rate in percent, of images whose label would change"),
        Metric("ra", "RA", "higher", "RA robust accuracy in percent: triggered images given their true label"),
        Metric("der", "DER", "higher", "DER (max(0, ΔASR) − max(0, ΔBA) + 1) / 2 in percent, against no_defense"),
        Metric("tpr", "TPR", "higher", "TPR poisoned samples that were flagged, in percent"),
        Metric("fpr", "FPR", "lower", "FPR benign samples that were flagged, in percent"),
        Metric("auroc", "AUROC", "higher", "AUROC of the scores, in percent"),
        Metric("tpr_at_1_fpr", "TPR@1%", "higher", "TPR@1% the highest TPR at an FPR of at most 1 percent"),
        Metric("seconds", "s", "lower", "s seconds of the defense alone", 1.0),
        Metric("cost_ratio", "cost", "lower", "cost time to a defended network over one undefended training", 1.0, 2),
        Metric("peak_memory", "MiB", "lower", "MiB highest memory of the defense", 2.0**-20, 0),
        Metric("clean_fraction", "clean", "lower", "clean share of the training set granted as clean data, in percent"),
    )
}  # fmt: skip
