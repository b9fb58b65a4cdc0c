"""Metrics over a parameter that a benchmark file sweeps."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from backdoor_bench_none.contracts.cell import AXES
from backdoor_bench_none.errors import ConfigError, did_you_mean
from backdoor_bench_none.report.pivot import varying_axes
from backdoor_bench_none.report.plots.canvas import (
    MAX_SERIES,
    add_legend,
    axis_label,
    check_count,
    draw_series,
    legend_lines,
    make_panels,
    needs_log,
    plain,
    widen,
)
from backdoor_bench_none.report.plots.labels import describe_rows, label_row, tell_apart, with_numbers
from backdoor_bench_none.results.metrics import Metric
from backdoor_bench_none.results.rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: the look of lines for rows that do not have the parameter
REFERENCE: dict[str, Any] = {"color": "#555555", "linewidth": 1.0}
DASHES: tuple[Any, ...] = ((0, (6, 2)), (0, (2, 2)), (0, (6, 2, 2, 2)), (0, (1, 3)))


@dataclass(frozen=True)
class Series:
    """One line: `rows` by the index of their value in `Sweep.values`."""

    label: str
    rows: Mapping[int, Row]

    def line(self, metric: Metric) -> tuple[list[int], list[float], list[float]]:
        """The indices, the means and the standard deviations (0 for one seed), in the unit shown."""
        measured = {index: row for index, row in sorted(self.rows.items()) if getattr(row, metric.name) is not None}
        means = [float(getattr(row, metric.name)) * metric.scale for row in measured.values()]
        deviations = [row.deviations.get(metric.name, 0.0) * metric.scale for row in measured.values()]
        return list(measured), means, deviations


@dataclass(frozen=True)
class Sweep:
    """The `values` of the parameter in order, a series for each setting, and `references`: rows without it."""

    parameter: str
    values: list[Any]
    series: list[Series]
    references: list[tuple[str, Row]]
    metrics: tuple[Metric, ...]
    title: str
    notes: list[str]

    @property
    def is_numeric(self) -> bool:
        """Whether the values are numbers on a scale; other values are evenly spaced."""
        return all(map(_is_number, self.values))

    @property
    def is_logarithmic(self) -> bool:
        """Whether the axis of the values is logarithmic."""
        return self.is_numeric and needs_log(self.values)


def split_parameter(text: str) -> tuple[str, str]:
    """The axis and the parameter of `axis.parameter`; `ConfigError` unless it names both."""
    axis, _, parameter = text.partition(".")
    if axis not in AXES:
        raise ConfigError(f"--x '{plain(text)}': unknown axis '{plain(axis)}'", did_you_mean(axis, AXES))
    if not parameter:
        raise ConfigError(f"--x '{plain(text)}' names no parameter", "as defense.lr or attack.poison_rate")
    return axis, parameter


def find_sweep(rows: Sequence[Row], x: str, metrics: tuple[Metric, ...]) -> Sweep:
    """The rows over the parameter `x`, as defense.lr; rows that differ in anything else form separate series."""
    axis, parameter = split_parameter(x)
    rows, notes = with_numbers(rows, metrics[:1])
    swept, others = _split(rows, axis, parameter)
    values = _in_order([row.components[axis]["params"][parameter] for row in swept])
    if len(values) < 2:
        message = f"'{plain(x)}' has one value here, {plain(values[0])}"
        raise ConfigError(message, f"`sweep: {{{plain(parameter)}: [...]}}` in the benchmark file gives it more")
    groups = _group(swept, axis, parameter, values)
    check_count("series", len(groups) + len(others), MAX_SERIES)
    bases = [_base_of(list(group.values()), axis, parameter) for group in groups]
    bases += [getattr(row, axis) for row in others]
    labels, common = _name([*(next(iter(group.values())) for group in groups), *others], bases, axis)
    title = " · ".join([*common, describe_rows(rows, (axis,))])
    series = [Series(label, group) for label, group in zip(labels, groups, strict=False)]
    references = list(zip(labels[len(groups) :], others, strict=True))
    if any(row.deviations for row in rows):
        notes = ["bars: standard deviation over seeds", *notes]
    return Sweep(x, values, series, references, metrics, title, notes)


def _split(rows: Sequence[Row], axis: str, parameter: str) -> tuple[list[Row], list[Row]]:
    """The rows with and without the parameter; `ConfigError` if no row has it."""
    known: set[str] = set()
    swept: list[Row] = []
    others: list[Row] = []
    for row in rows:
        params = row.components[axis]["params"]
        known.update(params)
        if parameter in params:
            swept.append(row)
        else:
            others.append(row)
    if not swept:
        message = f"no {axis} that is selected has the parameter '{plain(parameter)}'"
        raise ConfigError(message, did_you_mean(parameter, map(plain, known)))
    return swept, others


def _name(rows: Sequence[Row], bases: Sequence[str], axis: str) -> tuple[list[str], list[str]]:
    """Labels of series, by a row of each and its label on the swept axis.

    Where that label is the same for all, it is left out if others tell the series apart; the second list then holds it.
    """
    axes = [name for name in varying_axes(rows) if name != axis]
    if not axes:
        return tell_apart(map(plain, bases)), []
    labels = [label_row(row, axes) for row in rows]
    if len(set(bases)) == 1:
        return tell_apart(labels), [plain(bases[0])]
    return tell_apart(f"{label} · {plain(base)}" for label, base in zip(labels, bases, strict=True)), []


def _in_order(values: Sequence[Any]) -> list[Any]:
    """The distinct values: numbers by size, anything else in its first order."""
    unique = list({_key(value): value for value in values}.values())
    return sorted(unique) if all(map(_is_number, unique)) else unique


def _key(value: object) -> str:
    return json.dumps(value, sort_keys=True)


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def _group(rows: Sequence[Row], axis: str, parameter: str, values: Sequence[Any]) -> list[dict[int, Row]]:
    """The rows of each series, which differ in the parameter only, by the index of their value."""
    indices = {_key(value): index for index, value in enumerate(values)}
    groups: dict[str, dict[int, Row]] = {}
    for row in rows:
        params = dict(row.components[axis]["params"])
        index = indices[_key(params.pop(parameter))]
        key = _key([*(getattr(row, name) for name in AXES if name != axis), row.components[axis]["name"], params])
        while index in groups.setdefault(key, {}):
            key += "′"  # rows of other recipes or data form another series
        groups[key][index] = row
    return list(groups.values())


def _base_of(rows: Sequence[Row], axis: str, parameter: str) -> str:
    """The label on the swept axis without the parameter; the component's name where the values' labels differ more."""
    sweeping = re.compile(rf"(?<=[\[,]){re.escape(parameter)}=[^,\]]*,?")
    bases = {sweeping.sub("", getattr(row, axis)).replace(",]", "]").removesuffix("[]") for row in rows}
    if len(bases) > 1:
        return str(rows[0].components[axis]["name"])
    return bases.pop()


def draw_sweep(sweep: Sweep) -> Figure:
    """A panel for each metric, with one legend."""
    labels = [line.label for line in sweep.series] + [label for label, _ in sweep.references]
    count = len(sweep.metrics)
    lines = legend_lines(labels, 3.6 if count == 1 else 5.4)
    figure, axes = make_panels(count, sweep.title, sweep.notes, height=2.2, legend_lines=lines)
    handles = [_draw_lines(axis, sweep, metric) for axis, metric in zip(axes, sweep.metrics, strict=True)]
    add_legend(figure, handles[0], labels)  # all rows have the first metric
    return figure


def _draw_lines(axis: Axes, sweep: Sweep, metric: Metric) -> list[Any]:
    xs = list(map(float, range(len(sweep.values))))
    if sweep.is_numeric:
        xs = list(map(float, sweep.values))
    handles: list[Any] = []
    for number, series in enumerate(sweep.series):
        indices, means, deviations = series.line(metric)
        if indices:  # an empty line without clipping has no extent, which breaks the constrained layout
            errors = deviations if any(deviations) else None
            handles.append(draw_series(axis, number, [xs[index] for index in indices], means, yerr=errors))
    for number, (_, row) in enumerate(sweep.references):
        value = getattr(row, metric.name)
        if value is not None:
            handles.append(axis.axhline(value * metric.scale, linestyle=DASHES[number % len(DASHES)], **REFERENCE))
    _place_ticks(axis, xs, sweep)
    axis.set(ylabel=axis_label(metric), xlabel=plain(sweep.parameter))
    if handles:
        axis.set_ylim(*widen(axis.dataLim.ymin, axis.dataLim.ymax, metric))
    else:
        axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center")
        axis.set(xticks=[], yticks=[])
    return handles


def _place_ticks(axis: Axes, xs: Sequence[float], sweep: Sweep) -> None:
    """Put a tick at every value; where there are many numbers, matplotlib chooses the ticks."""
    if sweep.is_logarithmic:
        axis.set_xscale("log")
    if len(xs) <= 8 or not sweep.is_numeric:
        names = [plain(value, 16) for value in sweep.values]
        if sweep.is_numeric:
            names = list(map(_tick_label, sweep.values))
        turned: dict[str, Any] = {}
        if len(sweep.metrics) > 2 or max(map(len, names)) > 8:
            turned = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"}
        axis.set_xticks(xs, names, **turned)
    elif sweep.is_logarithmic:
        axis.xaxis.set_major_formatter(lambda value, _: _tick_label(value))
    axis.minorticks_off()


def _tick_label(value: float) -> str:
    return f"{value:g}"
