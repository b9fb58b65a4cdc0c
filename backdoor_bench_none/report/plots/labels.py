"""How rows are called in pictures: by the axes in which they differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from backdoor_bench_none.contracts.cell import AXES
from backdoor_bench_none.errors import BenchError, ConfigError, did_you_mean
from backdoor_bench_none.report.pivot import describe_seeds
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
        raise ConfigError(f"a metric stands twice in '{','.join(names)}'", "name each once")
    return tuple(METRICS[name] for name in names)


def varying_axes(rows: Sequence[Row]) -> list[str]:
    """The axes in which rows differ."""
    return [axis for axis in AXES if len({getattr(row, axis) for row in rows}) > 1]


def label_row(row: Row, axes: Iterable[str]) -> str:
    """Its labels on `axes`."""
    return " · ".join(plain(getattr(row, axis)) for axis in axes)


def describe_rows(rows: Sequence[Row], shown: Iterable[str] = ()) -> str:
    """What all rows have in common and is not `shown` elsewhere, and how many seeds they have."""
    fixed = [axis for axis in AXES if axis not in (*varying_axes(rows), *shown)]
    labels = [plain(getattr(rows[0], axis)) for axis in fixed if getattr(rows[0], axis) != "centralized"]
    return " · ".join([*labels, describe_seeds(rows)])


def with_numbers(rows: Sequence[Row], metrics: Sequence[Metric]) -> tuple[list[Row], list[str]]:
    """The rows that have all `metrics`, and a note on the others; `BenchError` if there is none."""
    kept = [row for row in rows if all(getattr(row, metric.name) is not None for metric in metrics)]
    names = " and ".join(metric.title for metric in metrics)
    if not kept:
        first = next((row.reason for row in rows if row.reason), None)
        reason = f" ({plain(first)})" if first else ""
        raise BenchError(
            f"none of {len(rows)} rows has {names}{reason}", "`bbn run` makes the numbers; see `bbn table`"
        )
    left = Counter("not measured" if row.ba is not None else row.status for row in rows if row not in kept)
    counts = ", ".join(f"{count} {why}" for why, count in left.items())
    return kept, [f"left out, without {names}: {counts}"] if left else []


def tell_apart(names: Iterable[str]) -> list[str]:
    """The names, with a prime for each time one stood before."""
    seen: set[str] = set()
    found = []
    for name in names:
        while name in seen:
            name += "′"  # noqa: PLW2901
        seen.add(name)
        found.append(name)
    return found
