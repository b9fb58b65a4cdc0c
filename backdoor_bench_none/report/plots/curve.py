"""The training loss of undefended networks over epochs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from matplotlib.ticker import MaxNLocator, NullFormatter

from backdoor_bench_none.contracts.record import Record
from backdoor_bench_none.errors import BenchError
from backdoor_bench_none.report.pivot import varying_axes
from backdoor_bench_none.report.plots.canvas import (
    MAX_SERIES,
    add_legend,
    check_count,
    draw_series,
    legend_lines,
    make_panels,
    needs_log,
)
from backdoor_bench_none.report.plots.labels import describe_rows, label_row, tell_apart
from backdoor_bench_none.results.rows import Row
from backdoor_bench_none.results.store import Store

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: the most epochs of a curve that have a marker and a bar
MARKED = 12


@dataclass(frozen=True)
class Curve:
    """One series: for each epoch the mean loss over `seeds` and its standard deviation, 0 for a single seed."""

    label: str
    means: list[float]
    deviations: list[float]
    seeds: int


def find_curves(rows: Sequence[Row], store: Store) -> list[Curve]:
    """The victims' losses in the records of `rows`: a curve for each setting, whatever the defense."""
    axes = [axis for axis in varying_axes(rows) if axis != "defense"]
    victims: dict[str, dict[object, list[float]]] = {}
    names: dict[str, str] = {}
    for row in rows:
        for record in filter(None, map(store.read_record, row.keys)):
            if record.victim_losses:
                setting = _setting_of(record)
                names[setting] = label_row(row, axes) or "victim"
                victims.setdefault(setting, {})[_victim_of(record)] = record.victim_losses
    if not victims:
        raise BenchError(
            f"none of {len(rows)} rows has the losses of a victim",
            "records of defenses that start from the undefended training have them; `bbn run` makes records",
        )
    check_count("curves", len(victims), MAX_SERIES)
    labels = tell_apart(names[setting] for setting in victims)
    return [_average(label, losses) for label, losses in zip(labels, victims.values(), strict=True)]


def _setting_of(record: Record) -> str:
    """What the victims of one curve have in common: all but the seed and the defense."""
    axes = {axis: value.model_dump(mode="json") for axis, value in record.axes.items() if axis != "defense"}
    return json.dumps([axes, record.recipe], sort_keys=True)


def _victim_of(record: Record) -> object:
    """What identifies a victim, which the records of several defenses share."""
    return record.upstream.get("victim") or record.seed


def _average(label: str, losses: Mapping[object, Sequence[float]]) -> Curve:
    """The mean of each epoch, over the victims that reached it with a finite loss."""
    means, deviations = [], []
    for epoch in range(max(map(len, losses.values()))):
        values = [loss[epoch] for loss in losses.values() if epoch < len(loss) and math.isfinite(loss[epoch])]
        means.append(fmean(values) if values else math.nan)
        deviations.append(stdev(values) if len(values) > 1 else 0.0)
    return Curve(label, means, deviations, len(losses))


def draw_curves(curves: Sequence[Curve], rows: Sequence[Row]) -> Figure:
    """One panel with all curves."""
    labels = [curve.label for curve in curves]
    title = describe_rows(rows, ("defense",)).rpartition(" · ")[0]
    lines = legend_lines(labels, 3.6)
    figure, (axis,) = make_panels(1, title, _describe_bars(curves), height=2.4, legend_lines=lines)
    handles = []
    means: list[float] = []
    for index, curve in enumerate(curves):
        means += filter(math.isfinite, curve.means)
        handles.append(_draw_curve(axis, index, curve))
    if needs_log(means):
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set(xlabel="epoch", ylabel="training loss of the victim")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    add_legend(figure, handles, labels)
    return figure


def _describe_bars(curves: Sequence[Curve]) -> list[str]:
    """A note on means and bars, unless all curves are of one victim."""
    fewest, most = min(curve.seeds for curve in curves), max(curve.seeds for curve in curves)
    if most == 1:
        return []
    count = f"{most}" if fewest == most else f"{fewest} to {most}"
    return [f"mean of {count} victims; bars: standard deviation"]


def _draw_curve(axis: Axes, index: int, curve: Curve) -> object:
    step = math.ceil(len(curve.means) / MARKED)
    every = (index % step, step)  # markers of different curves begin at different epochs, so that fewer overlap
    errors = curve.deviations if any(curve.deviations) else None
    options: dict[str, Any] = {"yerr": errors, "errorevery": every, "markevery": every, "clip_on": True}
    return draw_series(axis, index, range(1, len(curve.means) + 1), curve.means, **options)
