"""The two-class natural break against jenkspy."""

from __future__ import annotations

import jenkspy
import numpy as np
from pytest_benchmark.fixture import BenchmarkFixture
from ratios import seconds

from backdoor_bench_none.maths.natural_break import find_breaks


def test_split_against_jenkspy(benchmark: BenchmarkFixture) -> None:
    values = np.random.default_rng(0).normal(size=50_000)
    reference = seconds(lambda: jenkspy.jenks_breaks(values, n_classes=2))
    breaks = benchmark.pedantic(find_breaks, args=(values,), rounds=5, warmup_rounds=1)
    ratio = reference / benchmark.stats.stats.median
    benchmark.extra_info["jenkspy / ours"] = ratio
    assert breaks.thresholds[0] == jenkspy.jenks_breaks(values, n_classes=2)[1]
    assert ratio >= 200
