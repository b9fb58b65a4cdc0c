"""Labels of rows in pictures, by the axes in which the rows differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from backdoor_bench_none.contracts.cell import AXES
from backdoor_bench_none.errors import BenchError, ConfigError, did_you_mean
from backdoor_bench_none.report.pivot import describe_seeds, varying_axes
from backdoor_bench_none.report.plots.canvas import plain
from backdoor_bench_none.results.metrics import METRICS, Metric
from backdoor_bench_none.results.rows import Row


def find_metrics(names: Sequence[str], count: int | None = None) -> tuple[Metric, ...]:
    """The metrics called `names`, of which there must be `count`; `ConfigError` otherwise."""
    for name in names:
        if name not in METRICS:
            raise ConfigError(f"unknown metric '{name}'", did_you_mean(name, METRICS))
    if not names or (count is not None and len(names) != count):
        raise ConfigError(f"{len(names)} metrics are given, this picture needs {count or 'one or more'}", "as ba,asr")
    if len(set(names)) < len(names):
        raise ConfigError(f"a metric is named twice in '{','.join(names)}'", "name each once")
    return tuple(METRICS[name] for name in names)


def label_row(row: Row, axes: Iterable[str]) -> str:
    """The labels of a row on `axes`."""
    return " · ".join(plain(getattr(row, axis)) for axis in axes)


def describe_rows(rows: Sequence[Row], shown: Iterable[str] = ()) -> str:
    """The labels that all rows have in common, without those of the axes `shown` elsewhere; and the number of seeds."""
    fixed = [axis for axis in AXES if axis not in (*varying_axes(rows), *shown)]
    labels = [plain(getattr(rows[0], axis)) for axis in fixed if getattr(rows[0], axis) != "centralized"]
    return " · ".join([*labels, describe_seeds(rows)])


def with_numbers(rows: Sequence[Row], metrics: Sequence[Metric]) -> tuple[list[Row], list[str]]:
    """The rows that have all `metrics`, and a note on the others; `BenchError` if no row has."""
    kept: list[Row] = []
    others: Counter[str] = Counter()
    for row in rows:
        if all(getattr(row, metric.name) is not None for metric in metrics):
            kept.append(row)
        elif row.ba is None:
            others[row.status] += 1
        else:
            others["not measured"] += 1
    names = " and ".join(metric.title for metric in metrics)
    if not kept:
        message = f"none of {len(rows)} rows has {names}"
        reason = next((row.reason for row in rows if row.reason), None)
        if reason is not None:
            message += f" ({plain(reason)})"
        raise BenchError(message, "`bbn run` computes the numbers; see `bbn table`")
    if not others:
        return kept, []
    counts = ", ".join(f"{count} {why}" for why, count in others.items())
    return kept, [f"left out, without {names}: {counts}"]


def tell_apart(names: Iterable[str]) -> list[str]:
    """The names, with a prime added for each time a name occurred before."""
    unique: dict[str, None] = {}
    for name in names:
        while name in unique:
            name += "′"  # noqa: PLW2901
        unique[name] = None
    return list(unique)
