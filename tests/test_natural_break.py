"""The two-class natural break against jenkspy, exact arithmetic and closed forms."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import jenkspy
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from backdoor_bench_none.maths.natural_break import CHUNK, Breaks, find_breaks

Floats = NDArray[np.floating]
Draw = Callable[[np.random.Generator, int], Floats]

KINDS: dict[str, Draw] = {
    "gaussian": lambda g, n: g.normal(size=n),
    "heavy ties": lambda g, n: g.integers(0, 6, n).astype(float),
    "relu zeros": lambda g, n: np.maximum(g.normal(size=n), 0),
    "bimodal": lambda g, n: np.concatenate([g.normal(0, 1, n - n // 5), g.normal(9, 0.5, n // 5)]),
    "symmetric ties": lambda g, n: np.concatenate([half := g.integers(1, 9, n // 2).astype(float), -half]),
    "cauchy": lambda g, n: g.standard_cauchy(n),
    "lognormal": lambda g, n: g.lognormal(0, 2, n),
    "float32": lambda g, n: g.normal(size=n).astype(np.float32),
    "two values": lambda g, n: np.where(np.arange(n) < n // 3, 2.5, -1.0),
    "equispaced": lambda g, n: g.permutation(n).astype(float),
}


def find_one(values: Floats | list[float]) -> tuple[float, float]:
    breaks = find_breaks(np.asarray(values)[None])
    return float(breaks.thresholds[0]), float(breaks.gvf[0])


def measure_between(values: Floats | list[float], threshold: float) -> Fraction:
    """Variance between the classes of a cut, exact: maximal where the one within is minimal."""
    exact = [Fraction(float(value)) for value in values]
    lower = [value for value in exact if value <= Fraction(threshold)]
    upper = [value for value in exact if value > Fraction(threshold)]
    assert lower
    assert upper
    gap = sum(upper, Fraction()) / len(upper) - sum(lower, Fraction()) / len(lower)
    return gap**2 * len(lower) * len(upper)


def best_between(values: Floats | list[float]) -> Fraction:
    return max(measure_between(values, float(cut)) for cut in np.unique(values)[:-1])


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("kind", KINDS)
def test_equals_jenkspy(kind: str, seed: int) -> None:
    generator = np.random.default_rng([seed, *kind.encode()])
    values = KINDS[kind](generator, int(generator.integers(10, 150)))
    as_double = values.astype(np.float64)
    assert abs(as_double.mean()) < 1e5 * as_double.std(), "jenkspy loses its digits there"
    threshold, _ = find_one(values)
    assert threshold == jenkspy.jenks_breaks(as_double, n_classes=2)[1]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("offset", [1e6, 1e9, -1e9])
def test_is_the_exact_optimum_far_from_zero(offset: float, seed: int) -> None:
    values = offset + np.random.default_rng(seed).normal(size=60)
    threshold, _ = find_one(values)
    assert measure_between(values, threshold) == best_between(values)


@pytest.mark.parametrize("scale", [1e-150, 1e150])
def test_is_the_exact_optimum_at_extreme_scales(scale: float) -> None:
    values = scale * np.random.default_rng(0).normal(size=60)
    threshold, gvf = find_one(values)
    assert measure_between(values, threshold) == best_between(values)
    assert 0 < gvf < 1


@pytest.mark.parametrize(
    ("values", "threshold", "gvf"),
    [
        ([0, 1, 2], 0, 0.75),
        ([2, 0, 1], 0, 0.75),
        ([-3, -1, 1, 3], -1, 0.8),
        ([1, 1, 1, 5, 5], 1, 1.0),
        ([5, 1, 5, 1, 1], 1, 1.0),
        ([0, 0, 0, 1], 0, 1.0),
        ([1, 2], 1, 1.0),
    ],
)
def test_hand_values(values: list[float], threshold: float, gvf: float) -> None:
    assert find_one(values) == (threshold, pytest.approx(gvf, abs=1e-12))


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.float32, np.float64])
def test_takes_any_number_type(dtype: type[np.generic]) -> None:
    breaks = find_breaks(np.array([[1, 2, 9, 10]], dtype))
    assert breaks.thresholds.tolist() == [2.0]
    assert breaks.thresholds.dtype == np.float64


def test_goodness_of_fit_has_its_closed_forms() -> None:
    generator = np.random.default_rng(0)
    normal, uniform = generator.normal(5, 2, 40_000), np.arange(10_000.0)
    threshold, gvf = find_one(normal)
    assert gvf == pytest.approx(2 / np.pi, abs=0.01)
    assert threshold == pytest.approx(5, abs=0.1)
    assert find_one(uniform) == (4999.0, pytest.approx(0.75, abs=1e-6))
    assert find_one(np.repeat([-7.0, 3.0], [1, 99])) == (-7.0, pytest.approx(1.0, abs=1e-12))


@settings(deadline=None)
@given(
    values=st.lists(st.integers(-40, 40), min_size=2, max_size=25),
    factor=st.sampled_from([0.25, 1.0, 3.0, 64.0]),
    shift=st.integers(-1000, 1000),
)
def test_partition_is_invariant_under_affine_maps(values: list[int], factor: float, shift: int) -> None:
    assume(len(set(values)) > 1)
    before, gvf = find_one([float(value) for value in values])
    mapped, gvf_mapped = find_one([factor * value + shift for value in values])
    optimum = best_between([float(value) for value in values])
    assert measure_between(values, before) == measure_between(values, (mapped - shift) / factor) == optimum
    assert gvf_mapped == pytest.approx(gvf, rel=1e-9)


@settings(deadline=None)
@given(st.lists(st.integers(-5, 5), min_size=2, max_size=12), st.randoms())
def test_order_of_samples_does_not_matter(values: list[int], random: object) -> None:
    shuffled = list(values)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert find_one([float(v) for v in values]) == find_one([float(v) for v in shuffled])


@pytest.mark.parametrize("rows", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK])
def test_rows_together_equal_rows_alone(rows: int) -> None:
    generator = np.random.default_rng(rows)
    values = np.maximum(generator.normal(size=(rows, 40)) * generator.lognormal(size=(rows, 1)), 0)
    values[0] = 7
    together, alone = find_breaks(values), [find_one(row) for row in values]
    assert list(zip(together.thresholds.tolist(), together.gvf.tolist(), strict=True)) == alone


def test_input_is_left_as_it_is() -> None:
    values = np.array([[3.0, 1.0, 2.0]])
    find_breaks(values)
    assert values.tolist() == [[3.0, 1.0, 2.0]]


@pytest.mark.parametrize("constant", [-2.5, 0.0, 0.1, 1e12])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_a_constant_row_has_no_upper_class(constant: float, count: int) -> None:
    breaks = find_breaks(np.full((1, count), constant))
    assert (breaks.thresholds.tolist(), breaks.gvf.tolist()) == ([constant], [0.0])


def test_a_constant_row_among_others() -> None:
    breaks = find_breaks([[1, 1, 1, 1], [1, 1, 9, 9]])
    assert isinstance(breaks, Breaks)
    assert (breaks.thresholds.tolist(), breaks.gvf.tolist()) == ([1.0, 1.0], [0.0, 1.0])


def test_one_row_may_come_without_its_axis() -> None:
    assert find_breaks([0.0, 1.0, 2.0]).thresholds.tolist() == [0.0]


@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(bad: float, place: int) -> None:
    values = np.array([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]])
    values[1, place] = bad
    with pytest.raises(ValueError, match="finite"):
        find_breaks(values)
