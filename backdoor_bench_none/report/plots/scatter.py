"""Two metrics against each other, with a point for each defense and a panel for each setting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from backdoor_bench_none.report.pivot import varying_axes
from backdoor_bench_none.report.plots.canvas import (
    MAX_PANELS,
    MAX_SERIES,
    add_legend,
    axis_label,
    check_count,
    draw_series,
    label_axes,
    legend_lines,
    make_panels,
    set_title,
    widen,
)
from backdoor_bench_none.report.plots.labels import describe_rows, label_row, tell_apart, with_numbers
from backdoor_bench_none.results.metrics import Metric
from backdoor_bench_none.results.rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Value:
    """A mean and its 95 % interval, in the unit shown."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Point:
    """One row: its panel, its series, and its values."""

    panel: str
    series: str
    x: Value
    y: Value


@dataclass(frozen=True)
class Scatter:
    """All points, the metrics of both axes, and the texts above them."""

    points: list[Point]
    metrics: tuple[Metric, ...]
    title: str
    notes: list[str]


def find_points(rows: Sequence[Row], metrics: tuple[Metric, ...]) -> Scatter:
    """The points of `rows` by two metrics; series are defenses, or, with a single defense, what else differs."""
    rows, notes = with_numbers(rows, metrics)
    varying = varying_axes(rows)
    series_axes = varying
    if "defense" in varying or not varying:
        series_axes = ["defense"]
    panel_axes = [axis for axis in varying if axis not in series_axes]
    names = [(label_row(row, panel_axes), label_row(row, series_axes)) for row in rows]
    told_apart = tell_apart("\n".join(name) for name in names)
    x, y = metrics
    points = [
        Point(panel, name.partition("\n")[2], _value(row, x), _value(row, y))
        for row, (panel, _), name in zip(rows, names, told_apart, strict=True)
    ]
    check_count("panels", len({point.panel for point in points}), MAX_PANELS)
    check_count("series", len({point.series for point in points}), MAX_SERIES)
    return Scatter(points, metrics, describe_rows(rows, series_axes), [_describe_bars(rows), *notes])


def _value(row: Row, metric: Metric) -> Value:
    mean = float(getattr(row, metric.name))
    low = high = mean
    interval = row.intervals.get(metric.name)
    if interval is not None:
        low, high = min(interval.low, mean), max(interval.high, mean)
    return Value(mean * metric.scale, low * metric.scale, high * metric.scale)


def _describe_bars(rows: Sequence[Row]) -> str:
    counts = [len(row.seeds) for row in rows]
    if max(counts) <= 1:
        return "bars: 95 % intervals, Wilson over test images"
    if min(counts) > 1:
        return "bars: 95 % intervals, Student's t over seeds"
    return "bars: 95 % intervals, Student's t over seeds; of one seed Wilson over test images"


def draw_scatter(scatter: Scatter) -> Figure:
    """The panels with common axes and one legend."""
    panels = list(dict.fromkeys(point.panel for point in scatter.points))
    series = list(dict.fromkeys(point.series for point in scatter.points))
    height = 2.4 if len(panels) == 1 else 2.0
    figure, axes = make_panels(
        len(panels), scatter.title, scatter.notes, height, legend_lines(series), sharex=True, sharey=True
    )
    handles = {}
    for axis, panel in zip(axes, panels, strict=True):
        set_title(axis, panel)
        for point in scatter.points:
            if point.panel == panel:
                handles[point.series] = _draw_point(axis, series.index(point.series), point)
    for side, metric in zip("xy", scatter.metrics, strict=True):
        values = [getattr(point, side) for point in scatter.points]
        ends = min(value.low for value in values), max(value.high for value in values)
        axes[0].set(**{f"{side}lim": widen(*ends, metric)})
    label_axes(axes, *map(axis_label, scatter.metrics))
    add_legend(figure, [handles[name] for name in series], series)
    return figure


def _draw_point(axis: Axes, index: int, point: Point) -> object:
    errors = {
        f"{side}err": [[value.mean - value.low], [value.high - value.mean]]
        for side, value in (("x", point.x), ("y", point.y))
    }
    return draw_series(axis, index, [point.x.mean], [point.y.mean], linestyle="none", **errors)
