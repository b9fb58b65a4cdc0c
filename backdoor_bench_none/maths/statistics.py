"""Statistics over images and over seeds: intervals, paired comparisons, ranks, and TPR at a fixed FPR.

An interval over images covers the sampling of the test set only, one over seeds covers training too; a table gives
both.
"""

from __future__ import annotations

import base64
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Interval:
    """A confidence interval from `low` to `high`, both included, in the unit of what it bounds."""

    low: float
    high: float


@dataclass(frozen=True)
class Spread:
    """A measurement over `count` seeds, in its own unit: mean, standard deviation, and t interval of the mean.

    The deviation is that of a sample (n - 1 below), the interval is Student's; both are None for a single seed.
    """

    mean: float
    deviation: float | None
    interval: Interval | None
    count: int


@dataclass(frozen=True)
class Comparison:
    """The mean of `pairs` paired differences, its t interval, and the two-sided p-value, 0 to 1, of no difference.

    `difference` is None without pairs; the interval, the p-value and `distinguishable` are None (undecidable) with
    fewer than two.
    """

    difference: float | None
    interval: Interval | None
    p_value: float | None
    pairs: int
    distinguishable: bool | None


@dataclass(frozen=True)
class McNemar:
    """How many images are hits of only the first and only the second, and McNemar's exact two-sided p-value, 0 to 1."""

    only_first: int
    only_second: int
    p_value: float


def wilson_interval(hits: int, total: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of the share `hits` / `total`, within 0 to 1 (Wilson 1927, no continuity correction)."""
    _require_fraction("confidence", confidence)
    if total <= 0:
        raise ValueError(f"total is {total}: count at least one image")
    if not 0 <= hits <= total:
        raise ValueError(f"hits is {hits} of {total}: give a count from 0 to {total}")
    share, z = hits / total, -NormalDist().inv_cdf((1 - confidence) / 2)
    scale = 1 + z * z / total
    center = (share + z * z / (2 * total)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    # exactly, 0 of n begins at 0 and n of n ends at 1: rounding must not leave the share outside
    return Interval(low=max(0.0, min(share, center - half)), high=min(1.0, max(share, center + half)))


def spread_over_seeds(values: Sequence[float], confidence: float = 0.95) -> Spread:
    """Mean, sample standard deviation and t interval of one finite value per seed."""
    _require_fraction("confidence", confidence)
    numbers = _require_finite("values", values)
    if not numbers:
        raise ValueError("values is empty: give the value of at least one seed")
    (center, deviation), count = _mean_and_deviation(numbers), len(numbers)
    if count == 1:
        return Spread(center, None, None, 1)
    return Spread(center, deviation, _t_interval(center, deviation, count, 1 - confidence), count)


def compare_paired(first: Sequence[float], second: Sequence[float], alpha: float = 0.05) -> Comparison:
    """The two-sided paired t test of `first` - `second`, pair by pair, with the interval of confidence 1 - `alpha`.

    They are distinguishable where the p-value is below `alpha`. Differences that are all equal, up to rounding, give p
    1 if they are zero and p 0 otherwise.
    """
    _require_fraction("alpha", alpha)
    if len(first) != len(second):
        raise ValueError(f"first has {len(first)} values, second {len(second)}: give one of each per seed")
    differences = _require_finite("first - second", [float(a) - float(b) for a, b in zip(first, second, strict=True)])
    if not differences:
        return Comparison(None, None, None, 0, None)
    if len(differences) == 1:
        return Comparison(differences[0], None, None, 1, None)
    (center, deviation), pairs = _mean_and_deviation(differences), len(differences)
    # 0.1 + 0.2 against 0.3 on every seed must not become a difference without variance, hence with p 0
    rounding = max(8 * sys.float_info.epsilon * max(map(abs, [*first, *second])), sys.float_info.min)
    if max(differences) - min(differences) <= rounding:
        is_zero = abs(center) <= rounding
        return Comparison(center, Interval(center, center), 1.0 if is_zero else 0.0, pairs, not is_zero)
    p_value = _t_test(center, deviation, pairs)
    return Comparison(center, _t_interval(center, deviation, pairs, alpha), p_value, pairs, p_value < alpha)


def mcnemar_exact(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> McNemar:
    """McNemar's exact test of two outcomes (N,) bool of the same images; p 1 where no image differs."""
    _require_outcomes("first", first)
    _require_outcomes("second", second)
    if len(first) != len(second):
        raise ValueError(f"first has {len(first)} outcomes, second {len(second)}: give both for the same images")
    return _test_discordant(int((first & ~second).sum()), int((second & ~first).sum()))


def pool_mcnemar(parts: Sequence[McNemar]) -> McNemar:
    """One exact test over the images of all `parts`, from the sums of their counts; p 1 without parts."""
    return _test_discordant(sum(part.only_first for part in parts), sum(part.only_second for part in parts))


def pack_outcomes(outcomes: NDArray[np.bool_]) -> str:
    """Outcomes (N,) bool as base64 of their bits, first image in the highest bit, padded with zeros to whole bytes."""
    _require_outcomes("outcomes", outcomes)
    return base64.b64encode(np.packbits(outcomes).tobytes()).decode("ascii")


def unpack_outcomes(text: str, count: int) -> NDArray[np.bool_]:
    """The `count` outcomes that `pack_outcomes` put into `text`; `ValueError` for any other text."""
    if count < 0:
        raise ValueError(f"count is {count}: give the number of images")
    try:
        raw = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ValueError(f"outcomes are not base64 ({error}): write them with pack_outcomes") from error
    if base64.b64encode(raw).decode("ascii") != text:
        raise ValueError("outcomes are not canonical base64: write them with pack_outcomes")
    if len(raw) != (count + 7) // 8:
        raise ValueError(f"outcomes have {len(raw)} bytes, {count} images need {(count + 7) // 8}: check the count")
    bits = np.unpackbits(np.frombuffer(raw, dtype=np.uint8)).astype(np.bool_)
    if bits[count:].any():
        raise ValueError(f"outcomes have bits set past image {count}: check the count")
    return bits[:count]


def rank_with_ties(values: Sequence[float | None], higher_is_better: bool) -> list[float | None]:
    """Ranks from 1, the best; equal values share the mean of their ranks, and None stays None and takes no rank."""
    numbers = np.array(_require_finite("values", [value for value in values if value is not None]), dtype=np.float64)
    if higher_is_better:
        numbers = -numbers
    _, groups, sizes = np.unique(numbers, return_inverse=True, return_counts=True)
    averages = np.cumsum(sizes) - (sizes - 1) / 2
    ranks: list[float | None] = [None] * len(values)
    ranked = [index for index, value in enumerate(values) if value is not None]
    for index, rank in zip(ranked, averages[groups].tolist(), strict=True):
        ranks[index] = rank
    return ranks


def tpr_at_fpr(scores: NDArray[np.floating], positives: NDArray[np.bool_], fpr: float = 0.01) -> float | None:
    """The highest TPR, 0 to 1, that a threshold (flagged: score >= threshold) reaches with an FPR of at most `fpr`.

    `scores` (N,) are finite, `positives` (N,) bool; None where all samples are of one kind, or there are none.
    """
    from sklearn.metrics import roc_curve

    _require_outcomes("positives", positives)
    if not 0 <= fpr <= 1:
        raise ValueError(f"fpr is {fpr}: give a share from 0 to 1")
    if scores.shape != positives.shape:
        raise ValueError(f"scores have shape {scores.shape}, positives {positives.shape}: give one of each per sample")
    _require_finite("scores", scores.tolist())
    if positives.all() or not positives.any():
        return None
    false_rates, true_rates, _ = roc_curve(positives, scores, drop_intermediate=False)
    return float(true_rates[false_rates <= fpr].max())


def _mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation, summed exactly (`statistics.stdev` is 20 times slower); 0 for one value."""
    first = values[0]
    center = first + math.fsum(value - first for value in values) / len(values)  # equal values have no deviation
    if len(values) == 1:
        return center, 0.0
    return center, math.sqrt(math.fsum((value - center) ** 2 for value in values) / (len(values) - 1))


def _require_fraction(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"{name} is {value}: give a number between 0 and 1, such as 0.95 or 0.05")


def _require_finite(name: str, values: Sequence[float]) -> list[float]:
    numbers = [float(value) for value in values]
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"{name} has a value that is not finite: leave out the runs that failed")
    return numbers


def _require_outcomes(name: str, outcomes: NDArray[np.bool_]) -> None:
    if outcomes.dtype != np.bool_ or outcomes.ndim != 1:
        raise ValueError(f"{name} is {outcomes.dtype} of shape {outcomes.shape}: give a bool array of shape (N,)")


def _t_interval(center: float, deviation: float, count: int, alpha: float) -> Interval:
    half = _t_quantile(count - 1, 1 - alpha / 2) * deviation / math.sqrt(count)
    return Interval(center - half, center + half)


@cache
def _t_quantile(degrees: int, probability: float) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(degrees, probability))


def _t_test(center: float, deviation: float, count: int) -> float:
    from scipy.special import stdtr

    return 2 * float(stdtr(count - 1, -abs(center) / (deviation / math.sqrt(count))))


def _test_discordant(only_first: int, only_second: int) -> McNemar:
    """The exact test: if neither is better, each image that differs is the first's with probability 1/2."""
    from scipy.special import bdtr

    discordant = only_first + only_second
    return McNemar(only_first, only_second, min(1.0, 2 * float(bdtr(min(only_first, only_second), discordant, 0.5))))
