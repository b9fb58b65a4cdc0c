"""Metrics over a parameter that the benchmark file sweeps."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from backdoor_bench_none.contracts.cell import AXES
from backdoor_bench_none.errors import ConfigError, did_you_mean
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
from backdoor_bench_none.report.plots.labels import describe_rows, label_row, tell_apart, varying_axes, with_numbers
from backdoor_bench_none.results.metrics import Metric
from backdoor_bench_none.results.rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: lines of rows that do not have the parameter
REFERENCE: dict[str, Any] = {"color": "#555555", "linewidth": 1.0}
DASHES: tuple[Any, ...] = ((0, (6, 2)), (0, (2, 2)), (0, (6, 2, 2, 2)), (0, (1, 3)))


@dataclass(frozen=True)
class Series:
    """One line: `rows` by the place of their value among `Sweep.values`."""

    label: str
    rows: Mapping[int, Row]

    def line(self, metric: Metric) -> tuple[list[int], list[float], list[float]]:
        """The places, the means and the standard deviations (0 for one seed), in the unit shown."""
        places = sorted(place for place, row in self.rows.items() if getattr(row, metric.name) is not None)
        means = [float(getattr(self.rows[place], metric.name)) * metric.scale for place in places]
        return places, means, [self.rows[p].deviations.get(metric.name, 0.0) * metric.scale for p in places]


@dataclass(frozen=True)
class Sweep:
    """`values` of the parameter in order; `references` are rows that do not have it."""

    parameter: str
    values: list[Any]
    series: list[Series]
    references: list[tuple[str, Row]]
    metrics: tuple[Metric, ...]
    title: str
    notes: list[str]

    @property
    def is_numeric(self) -> bool:
        """Whether the values have places on a scale; else they stand side by side."""
        return all(map(_is_number, self.values))

    @property
    def is_logarithmic(self) -> bool:
        """Whether the values stand on a logarithmic axis."""
        return self.is_numeric and needs_log(self.values)


def split_parameter(text: str) -> tuple[str, str]:
    """`axis.parameter`; `ConfigError` unless the axis is one."""
    axis, _, parameter = text.partition(".")
    if axis not in AXES:
        raise ConfigError(f"--x '{plain(text)}': unknown axis '{plain(axis)}'", did_you_mean(axis, AXES))
    if not parameter:
        raise ConfigError(f"--x '{plain(text)}' names no parameter", "as defense.lr or attack.poison_rate")
    return axis, parameter


def find_sweep(rows: Sequence[Row], x: str, metrics: tuple[Metric, ...]) -> Sweep:
    """The rows over the parameter `x`, as defense.lr; rows that differ in anything else are other series."""
    axis, parameter = split_parameter(x)
    rows, notes = with_numbers(rows, metrics[:1])
    known = {name for row in rows for name in row.components[axis]["params"]}
    if parameter not in known:
        raise ConfigError(f"no {axis} that is selected has the parameter '{plain(parameter)}'",
                          did_you_mean(parameter, map(plain, known)))  # fmt: skip
    swept, others = (
        [row for row in rows if (parameter in row.components[axis]["params"]) is has] for has in (True, False)
    )
    values = _in_order([row.components[axis]["params"][parameter] for row in swept])
    if len(values) < 2:
        shown = f"'{plain(x)}' has one value here, {plain(values[0])}"
        raise ConfigError(shown, f"`sweep: {{{plain(parameter)}: [...]}}` in the benchmark file gives it more")
    groups = _group(swept, axis, parameter, values)
    check_count("series", len(groups) + len(others), MAX_SERIES)
    bases = [_base_of(list(group.values()), axis, parameter) for group in groups]
    bases += [getattr(row, axis) for row in others]
    labels, common = _name([*(next(iter(group.values())) for group in groups), *others], bases, axis)
    title = " · ".join([*common, describe_rows(rows, (axis,))])
    series = [Series(label, group) for label, group in zip(labels, groups, strict=False)]
    references = list(zip(labels[len(groups) :], others, strict=True))
    bars = ["bars: standard deviation over seeds"] if any(row.deviations for row in rows) else []
    return Sweep(x, values, series, references, metrics, title, [*bars, *notes])


def _name(rows: Sequence[Row], bases: Sequence[str], axis: str) -> tuple[list[str], list[str]]:
    """Labels of series, by a row of each and its label on the swept axis; and that label, if it is in none of them."""
    axes = [name for name in varying_axes(rows) if name != axis]
    named = len(set(bases)) > 1 or not axes
    parts = [[label_row(row, axes)] * bool(axes) + [plain(x)] * named for row, x in zip(rows, bases, strict=True)]
    return tell_apart(map(" · ".join, parts)), [] if named else [plain(bases[0])]


def _in_order(values: Sequence[Any]) -> list[Any]:
    """Each value once: numbers by size, anything else in the order it came in."""
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
    """Rows that differ in the parameter only stand together, by the place of their value."""
    places = {_key(value): place for place, value in enumerate(values)}
    found: dict[str, dict[int, Row]] = {}
    for row in rows:
        params = dict(row.components[axis]["params"])
        place = places[_key(params.pop(parameter))]
        key = _key([*(getattr(row, name) for name in AXES if name != axis), row.components[axis]["name"], params])
        while place in found.setdefault(key, {}):
            key += "′"  # of other recipes or data
        found[key][place] = row
    return list(found.values())


def _base_of(rows: Sequence[Row], axis: str, parameter: str) -> str:
    """The label on the swept axis without the parameter; where each value has a label of its own, the component."""
    sweeping = re.compile(rf"(?<=[\[,]){re.escape(parameter)}=[^,\]]*,?")
    bases = {sweeping.sub("", getattr(row, axis)).replace(",]", "]").removesuffix("[]") for row in rows}
    return bases.pop() if len(bases) == 1 else str(rows[0].components[axis]["name"])


def draw_sweep(sweep: Sweep) -> Figure:
    """A panel for each metric, side by side, with one legend."""
    labels = [line.label for line in sweep.series] + [label for label, _ in sweep.references]
    count = len(sweep.metrics)
    lines = legend_lines(labels, 3.6 if count == 1 else 5.4)
    figure, axes = make_panels(count, sweep.title, sweep.notes, height=2.2, legend_lines=lines)
    handles = [_draw_lines(axis, sweep, metric) for axis, metric in zip(axes, sweep.metrics, strict=True)]
    add_legend(figure, handles[0], labels)  # all rows have the first metric
    return figure


def _draw_lines(axis: Axes, sweep: Sweep, metric: Metric) -> list[Any]:
    xs = [float(value) for value in sweep.values] if sweep.is_numeric else list(map(float, range(len(sweep.values))))
    handles: list[Any] = []
    for index, line in enumerate(sweep.series):
        places, means, deviations = line.line(metric)
        if places:  # an empty line that is not clipped has no extent, and the layout goes wrong
            errors = deviations if any(deviations) else None
            handles.append(draw_series(axis, index, [xs[place] for place in places], means, yerr=errors))
    for index, (_, row) in enumerate(sweep.references):
        if (value := getattr(row, metric.name)) is not None:
            handles.append(axis.axhline(value * metric.scale, linestyle=DASHES[index % len(DASHES)], **REFERENCE))
    _place_ticks(axis, xs, sweep)
    axis.set(ylabel=axis_label(metric), xlabel=plain(sweep.parameter))
    if handles:
        axis.set_ylim(*widen(axis.dataLim.ymin, axis.dataLim.ymax, metric))
    else:
        axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center")
        axis.set(xticks=[], yticks=[])
    return handles


def _place_ticks(axis: Axes, xs: Sequence[float], sweep: Sweep) -> None:
    """A tick at every value; of many numbers, where matplotlib wants them."""
    if sweep.is_logarithmic:
        axis.set_xscale("log")
    if len(xs) <= 8 or not sweep.is_numeric:
        names = [f"{value:g}" if sweep.is_numeric else plain(value, 16) for value in sweep.values]
        crowded = len(sweep.metrics) > 2 or max(map(len, names)) > 8
        turned: dict[str, Any] = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
        axis.set_xticks(xs, names, **turned)
    elif sweep.is_logarithmic:
        axis.xaxis.set_major_formatter(lambda value, place: f"{value:g}")
    axis.minorticks_off()
