"""Two defenses compared: paired over seeds, over cells, and over the images of single cells."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from backdoor_bench_none.errors import ConfigError, did_you_mean
from backdoor_bench_none.maths.statistics import (
    Comparison,
    McNemar,
    compare_paired,
    mcnemar_exact,
    pool_mcnemar,
    unpack_outcomes,
)
from backdoor_bench_none.report.pivot import paired_values, varying_axes
from backdoor_bench_none.results.files import DamagedFileError, read_record_file
from backdoor_bench_none.results.metrics import METRICS, Metric
from backdoor_bench_none.results.rows import Row

if TYPE_CHECKING:
    from numpy.typing import NDArray

COMPARED = ("ba", "asr")
#: metric -> the outcomes and the count that a record keeps of it
OUTCOMES = {"ba": ("benign", "benign_accuracy"), "asr": ("attacked", "attack_success_rate")}


@dataclass(frozen=True)
class Table:
    """A plain table: a title, a header, lines of texts, and notes."""

    title: str
    header: list[str]
    lines: list[list[str]]
    footnotes: list[str]


def compare_defenses(rows: Sequence[Row], first: str, second: str, results: Path) -> Table:
    """A line for each metric and combination of the other axes, and one for each metric over all of them."""
    known = list(dict.fromkeys(row.defense for row in rows))
    for name in (first, second):
        if name not in known:
            raise ConfigError(f"no cell has the defense '{name}'", did_you_mean(name, known))
    if first == second:
        raise ConfigError(f"'{first}' is compared with itself", "name two defenses")
    pairs = list(_pair(rows, first, second))
    axes = _label_axes([one for one, _ in pairs])
    lines: list[list[str]] = []
    for name in COMPARED:
        lines += _compare(pairs, axes, METRICS[name], (first, second), results)
    header = [*axes, "metric", f"{first} − {second}", "95 %", "pairs", "p", "p per image", "verdict"]
    notes = [
        "Differences in percentage points, paired over seeds ('all': over seeds and cells): mean, t interval, t test",
        "p per image: McNemar's exact test on the same test images; it ignores what another training would change",
        "The verdict is the t test's at 5 %; p values are not corrected for the number of lines",
    ]
    return Table(f"{first} against {second}", header, lines, notes)


def _label_axes(rows: Sequence[Row]) -> list[str]:
    """The axes besides the defense in which rows differ; the attack if there is none."""
    axes = [axis for axis in varying_axes(rows) if axis != "defense"]
    return axes or ["attack"]


def _pair(rows: Sequence[Row], first: str, second: str) -> Iterator[tuple[Row, Row]]:
    """The rows of both defenses that agree on all other axes and have numbers."""
    others = {row.rest: row for row in rows if row.defense == second}
    for row in rows:
        other = others.get(row.rest)
        if row.defense == first and other is not None and row.seeds and other.seeds:
            yield row, other


def _compare(
    pairs: Sequence[tuple[Row, Row]], axes: Sequence[str], metric: Metric, names: tuple[str, str], results: Path
) -> Iterator[list[str]]:
    """The lines of one metric: a line for each pair, and one over all pairs if there are several."""
    tests: list[McNemar] = []
    pooled: tuple[list[float], list[float]] = ([], [])
    for one, other in pairs:
        test = _test_images(one, other, metric.name, results)
        if test is not None:
            tests.append(test)
        values = paired_values(one, other, metric.name)
        for side in (0, 1):
            pooled[side].extend(values[side])
        labels = [getattr(one, axis) for axis in axes]
        yield [*labels, *_line(metric, names, *values, test)]
    if len(pairs) > 1:
        blank = [""] * (len(axes) - 1)
        yield ["all", *blank, *_line(metric, names, *pooled, _pool(tests))]


def _line(
    metric: Metric, names: tuple[str, str], one: list[float], other: list[float], test: McNemar | None
) -> list[str]:
    if not one:
        return [metric.heading, "–", "–", "0", "–", "–", "no numbers"]
    comparison = compare_paired(one, other)
    interval = "–"
    if comparison.interval is not None:
        interval = f"{100 * comparison.interval.low:+.1f} to {100 * comparison.interval.high:+.1f}"
    difference = comparison.difference or 0.0
    shown = [f"{100 * difference:+.1f}", interval, str(comparison.pairs), show_p(comparison.p_value)]
    p_per_image = None if test is None else test.p_value
    return [metric.heading, *shown, show_p(p_per_image), _verdict(metric, names, comparison)]


def _verdict(metric: Metric, names: tuple[str, str], comparison: Comparison) -> str:
    if comparison.distinguishable is None:
        return "cannot be told from one seed"
    if not comparison.distinguishable:
        return "not distinguishable"
    first_is_higher = (comparison.difference or 0) > 0
    first_is_better = first_is_higher == (metric.better == "higher")
    if first_is_better:
        return f"{names[0]} is better"
    return f"{names[1]} is better"


def show_p(p_value: float | None) -> str:
    """A p value with three digits."""
    if p_value is None:
        return "–"
    return "<0.001" if p_value < 0.001 else f"{p_value:.3f}"


def _test_images(one: Row, other: Row, metric: str, results: Path) -> McNemar | None:
    """McNemar's test over the images of the seeds that both rows have; None where no record kept their outcomes."""
    tests = []
    keys = dict(zip(other.seeds, other.keys, strict=True))
    for seed, key in zip(one.seeds, one.keys, strict=True):
        first, second = (_outcomes(results, each, metric) for each in (key, keys.get(seed)))
        if first is not None and second is not None and len(first) == len(second):
            tests.append(mcnemar_exact(first, second))
    return _pool(tests)


def _pool(tests: Sequence[McNemar]) -> McNemar | None:
    return pool_mcnemar(tests) if tests else None


def _outcomes(results: Path, key: str | None, metric: str) -> NDArray[np.bool_] | None:
    """Whether each image was a hit (N,) bool; None where the record did not keep it."""
    if key is None:
        return None
    try:
        record = read_record_file(results / "records" / key[:2] / f"{key}.json")
    except (FileNotFoundError, DamagedFileError):  # every verb names it already
        return None
    part, count = OUTCOMES[metric]
    packed = getattr(record.outcomes, part, None)
    total = getattr(record.counts, count, None)
    if packed is None or total is None:
        return None
    return unpack_outcomes(packed, total.total)
