"""Intervals, paired tests, ranks and TPR at a fixed FPR against SciPy, scikit-learn and hand values."""

from __future__ import annotations

import base64
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from backdoor_bench_none.maths.statistics import (
    Comparison,
    Interval,
    McNemar,
    Spread,
    compare_paired,
    mcnemar_exact,
    pack_outcomes,
    pool_mcnemar,
    rank_with_ties,
    spread_over_seeds,
    tpr_at_fpr,
    unpack_outcomes,
    wilson_interval,
)

INF, NAN = float("inf"), float("nan")
quick = settings(deadline=None, max_examples=60)
counts = st.integers(1, 20_000).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total)))
rates = st.floats(0, 1)
rate_pairs = st.lists(st.tuples(rates, rates), min_size=2, max_size=8)
bits = st.lists(st.booleans(), max_size=70).map(lambda values: np.array(values, dtype=np.bool_))
samples = st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=30)


def outcomes(text: str) -> NDArray[np.bool_]:
    return np.array([letter == "1" for letter in text], dtype=np.bool_)


def width(interval: Interval) -> float:
    return interval.high - interval.low


@pytest.mark.parametrize("confidence", [1e-6, 0.5, 0.95, 0.999999])
@pytest.mark.parametrize(("hits", "total"), [(0, 1), (1, 1), (3, 7), (0, 9000), (90, 9000), (8999, 9000), (5, 10**9)])
def test_wilson_interval_is_scipys(hits: int, total: int, confidence: float) -> None:
    theirs = stats.binomtest(hits, total).proportion_ci(confidence, method="wilson")
    ours = wilson_interval(hits, total, confidence)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=1e-9, abs=1e-15)


def test_wilson_interval_has_the_hand_values_of_9000_images() -> None:
    assert wilson_interval(0, 9000).low == 0
    assert round(100 * wilson_interval(0, 9000).high, 3) == 0.043
    assert round(100 * width(wilson_interval(90, 9000)) / 2, 2) == 0.21


@quick
@given(counts, st.floats(0.01, 0.99), st.integers(2, 50))
def test_wilson_interval_contains_the_share_shrinks_with_more_images_and_mirrors(
    count: tuple[int, int], confidence: float, times: int
) -> None:
    hits, total = count
    interval = wilson_interval(hits, total, confidence)
    assert 0 <= interval.low <= hits / total <= interval.high <= 1
    assert width(wilson_interval(times * hits, times * total, confidence)) < width(interval)
    assert width(wilson_interval(hits, total, (1 + confidence) / 2)) > width(interval)
    mirrored = wilson_interval(total - hits, total, confidence)
    assert (mirrored.low, mirrored.high) == pytest.approx((1 - interval.high, 1 - interval.low), abs=1e-12)


def test_wilson_interval_is_fast_enough_for_a_whole_matrix() -> None:
    started = time.process_time()
    for hits in range(20_000):
        wilson_interval(hits, 20_000)
    assert time.process_time() - started < 1


def test_spread_has_the_hand_values_of_four_seeds() -> None:
    spread = spread_over_seeds([1, 2, 3, 4])
    assert (spread.mean, spread.count) == (2.5, 4)
    assert spread.deviation == pytest.approx((5 / 3) ** 0.5)
    assert spread.interval is not None
    assert (spread.interval.low, spread.interval.high) == pytest.approx((2.5 - 2.05426, 2.5 + 2.05426), abs=1e-5)


@quick
@given(st.lists(st.floats(-100, 100), min_size=2, max_size=9), st.floats(0.05, 0.999))
def test_spread_is_numpys_and_scipys(values: list[float], confidence: float) -> None:
    spread = spread_over_seeds(values, confidence)
    half = stats.t.ppf((1 + confidence) / 2, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    assert (spread.mean, spread.deviation) == pytest.approx((np.mean(values), np.std(values, ddof=1)), abs=1e-10)
    assert spread.interval is not None
    expected = (np.mean(values) - half, np.mean(values) + half)
    assert (spread.interval.low, spread.interval.high) == pytest.approx(expected, rel=1e-8, abs=1e-8)


def test_spread_of_equal_seeds_is_zero_and_of_one_seed_unknown() -> None:
    assert spread_over_seeds([0.1, 0.1, 0.1]) == Spread(0.1, 0.0, Interval(0.1, 0.1), 3)
    assert spread_over_seeds([0.1]) == Spread(0.1, None, None, 1)


@pytest.mark.parametrize(("alpha", "distinguishable"), [(0.05, False), (0.1, True)])
def test_compare_paired_has_the_hand_values_of_three_pairs(alpha: float, distinguishable: bool) -> None:
    comparison = compare_paired([5, 7, 9], [4, 5, 6], alpha)
    assert (comparison.difference, comparison.pairs) == (2, 3)
    assert comparison.p_value == pytest.approx(0.0741799)
    assert comparison.distinguishable is distinguishable
    assert comparison.interval is not None
    half = {0.05: 4.302653, 0.1: 2.919986}[alpha] / 3**0.5
    assert (comparison.interval.low, comparison.interval.high) == pytest.approx((2 - half, 2 + half))


@quick
@given(rate_pairs, st.floats(0.001, 0.5))
def test_compare_paired_is_scipys(pairs: list[tuple[float, float]], alpha: float) -> None:
    first, second = np.array(pairs).T
    assume(np.ptp(first - second) > 1e-6)
    theirs = stats.ttest_rel(first, second)
    ours = compare_paired(first.tolist(), second.tolist(), alpha)
    assert ours.p_value == pytest.approx(theirs.pvalue, rel=1e-6)
    assert ours.interval is not None
    expected = theirs.confidence_interval(1 - alpha)
    assert (ours.interval.low, ours.interval.high) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assume(abs(theirs.pvalue - alpha) > 1e-6)
    assert ours.distinguishable is not (ours.interval.low <= 0 <= ours.interval.high)


@quick
@given(st.lists(st.tuples(rates, rates), max_size=8))
def test_compare_paired_turns_round_with_its_arguments(pairs: list[tuple[float, float]]) -> None:
    first, second = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    there, back = compare_paired(first, second), compare_paired(second, first)
    assert back.difference == (None if there.difference is None else -there.difference)
    assert back.interval == (there.interval and Interval(-there.interval.high, -there.interval.low))
    assert (back.p_value, back.pairs, back.distinguishable) == (there.p_value, there.pairs, there.distinguishable)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([], [], Comparison(None, None, None, 0, None)),
        ([0.75], [0.5], Comparison(0.25, None, None, 1, None)),
        ([0.0, 0.5], [0.0, 0.5], Comparison(0.0, Interval(0.0, 0.0), 1.0, 2, False)),
        ([0.5, 0.75], [0.25, 0.5], Comparison(0.25, Interval(0.25, 0.25), 0.0, 2, True)),
        ([0.25, 0.5], [0.5, 0.75], Comparison(-0.25, Interval(-0.25, -0.25), 0.0, 2, True)),
    ],
)
def test_compare_paired_without_variance(first: list[float], second: list[float], expected: Comparison) -> None:
    assert compare_paired(first, second) == expected


def test_compare_paired_takes_rounding_for_no_difference() -> None:
    same, shifted = compare_paired([0.1 + 0.2] * 3, [0.3] * 3), compare_paired([0.3, 0.4], [0.1, 0.2])
    assert (same.p_value, same.distinguishable) == (1.0, False)
    assert (shifted.p_value, shifted.distinguishable) == (0.0, True)
    assert compare_paired([0.5 + 1e-9, 0.5 + 3e-9], [0.5, 0.5]).p_value == pytest.approx(0.2951672, rel=1e-5)
    assert compare_paired([5e-324] + [0.0] * 8, [0.0] * 9).p_value == 1.0


def test_mcnemar_has_the_hand_values() -> None:
    first, second = outcomes("1" * 10 + "00" + "1100"), outcomes("0" * 10 + "11" + "1100")
    there, back = mcnemar_exact(first, second), mcnemar_exact(second, first)
    assert (there.only_first, there.only_second, back.only_first, back.only_second) == (10, 2, 2, 10)
    assert there.p_value == back.p_value == pytest.approx(2 * (1 + 12 + 66) / 2**12)
    assert mcnemar_exact(first, first) == pool_mcnemar([]) == McNemar(0, 0, 1.0)


@quick
@given(st.integers(0, 400), st.integers(0, 400))
def test_mcnemar_is_scipys_binomial_test(only_first: int, only_second: int) -> None:
    assume(only_first + only_second > 0)
    pooled = pool_mcnemar([McNemar(only_first, 0, 0.5), McNemar(0, only_second, 0.5)])
    assert (pooled.only_first, pooled.only_second) == (only_first, only_second)
    assert pooled.p_value == pytest.approx(stats.binomtest(only_first, only_first + only_second).pvalue, rel=1e-9)


def test_pooled_cells_tell_what_one_cell_cannot() -> None:
    cell = mcnemar_exact(outcomes("11110"), outcomes("00000"))
    assert cell == McNemar(4, 0, 0.125)
    assert pool_mcnemar([cell, cell]) == McNemar(8, 0, 2 / 2**8)


@quick
@given(bits)
def test_outcomes_survive_packing(values: NDArray[np.bool_]) -> None:
    restored = unpack_outcomes(pack_outcomes(values), len(values))
    assert restored.dtype == np.bool_
    assert restored.tolist() == values.tolist()


def test_packed_outcomes_are_bits_from_the_highest_on() -> None:
    assert pack_outcomes(outcomes("1000001011")) == base64.b64encode(bytes([0b10000010, 0b11000000])).decode()


def test_ranks_have_the_hand_values() -> None:
    values = [0.9, None, 0.5, 0.9, 0.1]
    assert rank_with_ties(values, higher_is_better=True) == [1.5, None, 3.0, 1.5, 4.0]
    assert rank_with_ties(values, higher_is_better=False) == [3.5, None, 2.0, 3.5, 1.0]
    assert rank_with_ties([None], higher_is_better=True) == [None]
    assert rank_with_ties([], higher_is_better=True) == []


@quick
@given(st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0]) | st.none(), max_size=12))
def test_ranks_are_scipys_and_their_sum_is_fixed(values: list[float | None]) -> None:
    present = [value for value in values if value is not None]
    for higher_is_better in (False, True):
        ranks = rank_with_ties(values, higher_is_better)
        assert [rank is None for rank in ranks] == [value is None for value in values]
        ranked = [rank for rank in ranks if rank is not None]
        expected = stats.rankdata([-value if higher_is_better else value for value in present], method="average")
        assert ranked == expected.tolist()
        assert sum(ranked) == len(present) * (len(present) + 1) / 2


def test_tpr_at_fpr_has_the_hand_values() -> None:
    scores = np.array([9, 8, 7, 6, 5, 4, 3, 2], dtype=np.float32)
    positives = outcomes("11010010")
    assert [tpr_at_fpr(scores, positives, fpr) for fpr in (0, 0.24, 0.25, 0.5, 1)] == [0.5, 0.5, 0.75, 0.75, 1.0]
    assert tpr_at_fpr(np.ones(4), outcomes("1100")) == 0.0
    # scikit-learn leaves the middle point of this curve out unless told not to
    assert tpr_at_fpr(np.array([3, 2, 2, 1, 1, 0]), outcomes("001010"), 0.5) == 0.5
    one_in_a_hundred = np.arange(101.0)[::-1], np.arange(101) == 1
    assert (tpr_at_fpr(*one_in_a_hundred), tpr_at_fpr(*one_in_a_hundred, 0.0099)) == (1.0, 0.0)


@quick
@given(samples, st.floats(0, 1))
def test_tpr_at_fpr_is_the_best_of_all_thresholds(pairs: list[tuple[int, bool]], fpr: float) -> None:
    scores, positives = np.array([pair[0] for pair in pairs], dtype=float), np.array([pair[1] for pair in pairs])
    if positives.all() or not positives.any():
        assert tpr_at_fpr(scores, positives, fpr) is None
        return
    flags = [scores >= threshold for threshold in range(8)]
    best = max(flagged[positives].mean() for flagged in flags if flagged[~positives].mean() <= fpr)
    assert tpr_at_fpr(scores, positives, fpr) == pytest.approx(best)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: wilson_interval(-1, 9), "hits is -1 of 9: give a count from 0 to 9"),
        (lambda: wilson_interval(10, 9), "hits is 10 of 9: give a count from 0 to 9"),
        (lambda: wilson_interval(0, 0), "total is 0: count at least one image"),
        (lambda: wilson_interval(0, -3), "total is -3: count"),
        (lambda: wilson_interval(1, 9, 0.0), "confidence is 0.0: give a number between 0 and 1"),
        (lambda: wilson_interval(1, 9, 1.0), "confidence is 1.0: give"),
        (lambda: wilson_interval(1, 9, NAN), "confidence is nan: give"),
        (lambda: spread_over_seeds([]), "values is empty: give the value of at least one seed"),
        (lambda: spread_over_seeds([0.5, NAN]), "values has a value that is not finite: leave out"),
        (lambda: spread_over_seeds([0.5], 1.5), "confidence is 1.5: give"),
        (lambda: compare_paired([0.1], [0.1, 0.2]), "first has 1 values, second 2: give one of each per seed"),
        (lambda: compare_paired([0.1, INF], [0.1, INF]), "first - second has a value that is not finite"),
        (lambda: compare_paired([0.1], [0.1], 0.0), "alpha is 0.0: give"),
        (
            lambda: mcnemar_exact(outcomes("10"), outcomes("1")),
            "first has 2 outcomes, second 1: give both for",
        ),
        (lambda: mcnemar_exact(np.array([0, 1]), outcomes("10")), r"first is int64 of shape \(2,\): give a bool"),
        (
            lambda: mcnemar_exact(outcomes("10"), np.array([0, 1])),
            "second is int64",
        ),
        (lambda: pack_outcomes(np.array([[True]])), r"outcomes is bool of shape \(1, 1\): give a bool array"),
        (lambda: unpack_outcomes("gsA", 10), "not base64 .*: write them with pack_outcomes"),
        (lambda: unpack_outcomes("gs*A=", 10), "not base64"),
        (lambda: unpack_outcomes("gsÄ=", 10), "not base64"),
        (lambda: unpack_outcomes("gsB=", 10), "not canonical base64"),  # bits past the last byte, which Python ignores
        (lambda: unpack_outcomes("gsA=", 8), "have 2 bytes, 8 images need 1: check the count"),
        (lambda: unpack_outcomes("gsA=", 17), "have 2 bytes, 17 images need 3"),
        (lambda: unpack_outcomes("gsA=", 9), "bits set past image 9: check the count"),
        (lambda: unpack_outcomes("", -1), "count is -1: give the number of images"),
        (lambda: rank_with_ties([0.5, None, NAN], higher_is_better=True), "values has a value that is not finite"),
        (lambda: tpr_at_fpr(np.ones(2), outcomes("10"), -0.1), "fpr is -0.1: give a share from 0 to 1"),
        (lambda: tpr_at_fpr(np.ones(2), outcomes("10"), 1.1), "fpr is 1.1: give"),
        (
            lambda: tpr_at_fpr(np.ones(1), outcomes("10")),
            r"scores have shape \(1,\), positives \(2,\): give",
        ),
        (lambda: tpr_at_fpr(np.array([0.1, NAN]), outcomes("10")), "scores has a value that is not finite"),
        (lambda: tpr_at_fpr(np.ones(2), np.array([0, 1])), "positives is int64"),
    ],
)
def test_what_is_wrong_and_what_to_do_is_said(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_importing_the_module_loads_no_heavy_library() -> None:
    heavy = "import sys, backdoor_bench_none.maths.statistics; print({'scipy', 'sklearn', 'torch'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True).stdout == "set()\n"
