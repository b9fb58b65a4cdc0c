"""The exact two-class natural break of many rows of numbers.

Jenks with two classes, Otsu's threshold and optimal one-dimensional 2-means are one and the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

Split = Literal["exact", "jenkspy"]
#: rows sorted at once: keeps the working set in the cache
CHUNK = 32


@dataclass(frozen=True)
class Breaks:
    """The split of each row in two: the lower class is x <= threshold, the upper x > threshold.

    `gvf` in [0, 1] is the goodness of variance fit, B / TSS. A constant row has no upper class: its threshold is the
    constant, its gvf 0.
    """

    thresholds: NDArray[np.float64]  # (R,)
    gvf: NDArray[np.float64]  # (R,)


def find_breaks(rows: ArrayLike, split: Split = "exact") -> Breaks:
    """The cut of each row of `rows` (R, N) that maximises the variance between two classes.

    Among equal cuts it is the lowest, as in jenkspy. `split` chooses the computation: `exact`, in O(N log N) per row,
    or `jenkspy`, by the library of that name, the reference implementation, in O(N**2). Exact means: with sorted
    centred values x and S_k = x_1 + ... + x_k, the variance between the classes of a cut after k is S_k**2 * N / (k *
    (N - k)), and a cut never splits equal values. Raises `ValueError` for values that are not finite.
    """
    values = np.atleast_2d(np.asarray(rows))
    if not np.isfinite(values).all():
        raise ValueError("values must be finite")
    find = _find_chunk if split == "exact" else _find_by_jenkspy
    parts = [find(values[start : start + CHUNK]) for start in range(0, len(values), CHUNK)]
    thresholds, gvf = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Breaks(thresholds, gvf)


def _find_chunk(rows: NDArray[np.floating]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    ordered = np.sort(rows, axis=1).astype(np.float64)  # (R, N)
    count = ordered.shape[1]
    if count < 2:
        return ordered[:, -1], np.zeros(len(rows))
    centred = ordered - ordered.mean(axis=1, keepdims=True)  # without it, a large offset cancels all digits
    lower = np.arange(1, count)  # sizes of the lower class
    between = np.square(np.cumsum(centred, axis=1)[:, :-1]) * (count / (lower * (count - lower)))
    between[ordered[:, :-1] == ordered[:, 1:]] = -1.0
    total = np.square(centred).sum(axis=1)
    best = between.argmax(axis=1)
    each = np.arange(len(rows))
    split = ordered[:, 0] < ordered[:, -1]
    thresholds = np.where(split, ordered[each, best], ordered[:, -1])
    gvf = np.divide(between[each, best], total, out=np.zeros(len(rows)), where=split)
    return thresholds, gvf


def _find_by_jenkspy(rows: NDArray[np.floating]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    import jenkspy

    thresholds, gvf = np.empty(len(rows)), np.zeros(len(rows))
    for index, row in enumerate(rows.astype(np.float64)):
        if row.min() == row.max():  # jenkspy refuses a constant row
            thresholds[index] = row[0]
            continue
        thresholds[index] = jenkspy.jenks_breaks(row, n_classes=2)[1]
        within = sum(np.square(part - part.mean()).sum() for part in _classes(row, thresholds[index]))
        gvf[index] = 1 - within / np.square(row - row.mean()).sum()
    return thresholds, gvf


def _classes(row: NDArray[np.float64], threshold: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return row[row <= threshold], row[row > threshold]
