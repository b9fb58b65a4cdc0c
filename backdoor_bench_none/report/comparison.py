"""Two defenses side by side: paired over seeds, over cells, and over the images of single cells."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from backdoor_bench_none.contracts.cell import AXES
from backdoor_bench_none.contracts.record import Record
from backdoor_bench_none.errors import ConfigError, did_you_mean
from backdoor_bench_none.maths.statistics import (
    Comparison,
    McNemar,
    compare_paired,
    mcnemar_exact,
    pool_mcnemar,
    unpack_outcomes,
)
from backdoor_bench_none.report.pivot import paired_values
from backdoor_bench_none.results.metrics import METRICS, Metric
from backdoor_bench_none.results.rows import Row

COMPARED = ("ba", "asr")
#: metric -> what records keep of every image
OUTCOMES = {"ba": ("benign", "benign_accuracy"), "asr": ("attacked", "attack_success_rate")}


@dataclass(frozen=True)
class Table:
    """A plain table: a title, a header, lines of texts, and notes."""

    title: str
    header: list[str]
    lines: list[list[str]]
    footnotes: list[str]


def compare_defenses(rows: Sequence[Row], first: str, second: str, results: Path) -> Table:
    """One line for each combination of the other axes and metric, and one over all of them."""
    known = list(dict.fromkeys(row.defense for row in rows))
    for name in (first, second):
        if name not in known:
            raise ConfigError(f"no cell has the defense '{name}'", did_you_mean(name, known))
    if first == second:
        raise ConfigError(f"'{first}' is compared with itself", "name two defenses")
    pairs = list(_pair(rows, first, second))
    axes = [axis for axis in AXES if axis != "defense" and len({getattr(a, axis) for a, _ in pairs}) > 1] or ["attack"]
    lines, names = [], (first, second)
    for name in COMPARED:
        tests = []
        for one, other in pairs:
            test = _test_images(one, other, name, results)
            tests += [] if test is None else [test]
            labels = [getattr(one, axis) for axis in axes]
            lines.append([*labels, *_line(METRICS[name], names, *paired_values(one, other, name), test)])
        if len(pairs) > 1:
            values = [paired_values(one, other, name) for one, other in pairs]
            pooled = [[value for pair in values for value in pair[side]] for side in (0, 1)]
            total = pool_mcnemar(tests) if tests else None
            lines.append(["all", *[""] * (len(axes) - 1), *_line(METRICS[name], names, pooled[0], pooled[1], total)])
    header = [*axes, "metric", f"{first} − {second}", "95 %", "pairs", "p", "p per image", "verdict"]
    notes = [
        "Differences in percentage points, paired over seeds ('all': over seeds and cells): mean, t interval, t test",
        "p per image: McNemar's exact test on equal test images; it leaves out what another training would change",
        "The verdict is the t test's at 5 %; p values are not corrected for the number of lines",
    ]
    return Table(f"{first} against {second}", header, lines, notes)


def _pair(rows: Sequence[Row], first: str, second: str) -> Iterator[tuple[Row, Row]]:
    others = {row.rest: row for row in rows if row.defense == second}
    for row in rows:
        if row.defense == first and (other := others.get(row.rest)) is not None and row.seeds and other.seeds:
            yield row, other


def _line(
    metric: Metric, names: tuple[str, str], one: list[float], other: list[float], test: McNemar | None
) -> list[str]:
    if not one:
        return [metric.heading, "–", "–", "0", "–", "–", "no numbers"]
    found = compare_paired(one, other)
    interval = "–" if found.interval is None else f"{100 * found.interval.low:+.1f} to {100 * found.interval.high:+.1f}"
    shown = [f"{100 * (found.difference or 0):+.1f}", interval, str(found.pairs), show_p(found.p_value)]
    return [metric.heading, *shown, show_p(None if test is None else test.p_value), _verdict(metric, names, found)]


def _verdict(metric: Metric, names: tuple[str, str], found: Comparison) -> str:
    if found.distinguishable is None:
        return "cannot be told from one seed"
    if not found.distinguishable:
        return "not distinguishable"
    first_is_better = ((found.difference or 0) > 0) == (metric.better == "higher")
    return f"{names[not first_is_better]} is better"


def show_p(p_value: float | None) -> str:
    """A p value with three digits."""
    return "–" if p_value is None else "<0.001" if p_value < 0.001 else f"{p_value:.3f}"


def _test_images(one: Row, other: Row, metric: str, results: Path) -> McNemar | None:
    """McNemar's test over the images of the seeds that both have, where the records kept them."""
    tests = []
    keys = dict(zip(other.seeds, other.keys, strict=True))
    for seed, key in zip(one.seeds, one.keys, strict=True):
        found = [_outcomes(results, k, metric) for k in (key, keys.get(seed))]
        if found[0] is not None and found[1] is not None and len(found[0]) == len(found[1]):
            tests.append(mcnemar_exact(found[0], found[1]))
    return pool_mcnemar(tests) if tests else None


def _outcomes(results: Path, key: str | None, metric: str) -> NDArray[np.bool_] | None:
    """Whether each image was a hit (N,) bool; None where the record did not keep it."""
    path = results / "records" / str(key)[:2] / f"{key}.json"
    if key is None or not path.is_file():
        return None
    record = Record.model_validate_json(path.read_bytes())
    part, count = OUTCOMES[metric]
    packed = getattr(record.outcomes, part, None)
    total = getattr(record.counts, count, None)
    return None if packed is None or total is None else unpack_outcomes(packed, total.total)
