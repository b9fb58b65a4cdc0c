"""The natural breaks of a GPU are those of NumPy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from bbn_defenses import breaks_on_device
from bbn_defenses.breaks_on_device import find_breaks_on_device
from bbn_defenses.compromised_neurons import examine_neurons
from torch import nn

from backdoor_bench_none.api import find_breaks
from backdoor_bench_none.testing.pretend_cuda import pretend_cuda

Draw = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]
KINDS: dict[str, Draw] = {
    "gaussian": lambda g, shape: g.normal(size=shape),
    "float32": lambda g, shape: g.normal(size=shape).astype(np.float32),
    "few values": lambda g, shape: g.integers(0, 6, shape).astype(float),
    "relu zeros": lambda g, shape: np.maximum(g.normal(size=shape), 0),
    "two values": lambda g, shape: (g.random(shape) < 0.1) * 3.5 - 1,
    "cauchy": lambda g, shape: g.standard_cauchy(shape),
    "a large offset": lambda g, shape: g.normal(size=shape) + 1e6,
    "constant": lambda g, shape: np.full(shape, 2.5),
}


@pytest.mark.parametrize("columns", [2, 9, 301])
@pytest.mark.parametrize("kind", KINDS)
def test_the_breaks_are_those_of_numpy(kind: str, columns: int) -> None:
    rows = KINDS[kind](np.random.default_rng([columns, *kind.encode()]), (60, columns))
    expected = find_breaks(rows)
    thresholds, gvf = find_breaks_on_device(torch.from_numpy(rows))
    assert (thresholds.dtype, gvf.dtype) == (torch.float64, torch.float64)
    assert thresholds.tolist() == expected.thresholds.tolist()
    np.testing.assert_allclose(gvf.numpy(), expected.gvf, rtol=1e-8, atol=0)


def test_of_equal_cuts_it_is_the_lowest() -> None:
    half = torch.randn(50, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    half[:, :4] = half[:, :4].abs() + 20  # so that the best cut is beside the middle
    rows = torch.cat([half, -half], 1)  # with each cut, its mirror image is as good, but for rounding
    assert bool((find_breaks_on_device(rows)[0] < -20).all())


def test_rows_are_sorted_in_parts_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(7, 20, generator=torch.Generator().manual_seed(0))
    whole = find_breaks_on_device(rows)
    monkeypatch.setattr(breaks_on_device, "SORTED_AT_ONCE", 45)
    in_parts = find_breaks_on_device(rows)
    assert all(torch.equal(one, other) for one, other in zip(whole, in_parts, strict=True))


def test_one_column_has_no_upper_class() -> None:
    thresholds, gvf = find_breaks_on_device(torch.tensor([[4.0], [5.0]]))
    assert (thresholds.tolist(), gvf.tolist()) == ([4.0, 5.0], [0.0, 0.0])


def test_values_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        find_breaks_on_device(torch.tensor([[1.0, float("nan")]]))


def test_neurons_are_examined_without_bringing_their_values_to_the_host() -> None:
    values = torch.randn(6, 50, generator=torch.Generator().manual_seed(1)).abs()
    values[:, :5] += 20
    expected = examine_neurons(values, nn.ReLU(), 0.9, 0.5)
    with pretend_cuda() as gpu:
        neurons = examine_neurons(values.to("cuda"), nn.ReLU(), 0.9, 0.5)
        kinds = sorted(kind for kind, _ in gpu.waits)
        assert neurons.indices.is_cuda
        assert kinds == ["bool()", "nonzero"]
        assert len(expected.indices) == 6
        assert neurons.indices.tolist() == expected.indices.tolist()
        assert neurons.thresholds.tolist() == expected.thresholds.tolist()
