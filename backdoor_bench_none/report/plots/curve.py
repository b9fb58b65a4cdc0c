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
from backdoor_bench_none.report.plots.canvas import (
    MAX_SERIES,
    add_legend,
    check_count,
    draw_series,
    legend_lines,
    make_panels,
    needs_log,
)
from backdoor_bench_none.report.plots.labels import describe_rows, label_row, tell_apart, varying_axes
from backdoor_bench_none.results.rows import Row
from backdoor_bench_none.results.store import Store

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: as many epochs of a curve have a marker and a bar, at most
MARKED = 12


@dataclass(frozen=True)
class Curve:
    """One series: per epoch, from 1 on, the mean loss over `seeds` and its standard deviation, 0 for a single seed."""

    label: str
    means: list[float]
    deviations: list[float]
    seeds: int


def find_curves(rows: Sequence[Row], store: Store) -> list[Curve]:
    """The losses in the records of `rows`: a curve for each setting without its defense, over its victims."""
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
    return [_average(label, found) for label, found in zip(labels, victims.values(), strict=True)]


def _setting_of(record: Record) -> str:
    """Everything that victims of one curve have in common: all but the seed and the defense."""
    axes = {axis: value.model_dump(mode="json") for axis, value in record.axes.items() if axis != "defense"}
    return json.dumps([axes, record.recipe], sort_keys=True)


def _victim_of(record: Record) -> object:
    """What tells victims apart: the records of one victim are of different defenses."""
    return record.upstream.get("victim") or record.seed


def _average(label: str, losses: Mapping[object, Sequence[float]]) -> Curve:
    """Epoch by epoch, over the victims that got as far with a finite loss."""
    epochs = [
        [loss[epoch] for loss in losses.values() if epoch < len(loss) and math.isfinite(loss[epoch])]
        for epoch in range(max(map(len, losses.values())))
    ]
    means = [fmean(values) if values else math.nan for values in epochs]
    return Curve(label, means, [stdev(values) if len(values) > 1 else 0.0 for values in epochs], len(losses))


def draw_curves(curves: Sequence[Curve], rows: Sequence[Row]) -> Figure:
    """One panel with all curves."""
    labels = [curve.label for curve in curves]
    seeds = {curve.seeds for curve in curves}
    over = f"{min(seeds)}" if len(seeds) == 1 else f"{min(seeds)} to {max(seeds)}"
    notes = [f"mean of {over} victims; bars: standard deviation"] if max(seeds) > 1 else []
    title = describe_rows(rows, ("defense",)).rpartition(" · ")[0]
    figure, (axis,) = make_panels(1, title, notes, height=2.4, legend_lines=legend_lines(labels, 3.6))
    handles = []
    for index, curve in enumerate(curves):
        step = -(-len(curve.means) // MARKED)
        every = (index % step, step)
        errors = curve.deviations if any(curve.deviations) else None
        epochs = range(1, len(curve.means) + 1)
        options: dict[str, Any] = {"yerr": errors, "errorevery": every, "markevery": every, "clip_on": True}
        handles.append(draw_series(axis, index, epochs, curve.means, **options))
    if needs_log([mean for curve in curves for mean in curve.means if math.isfinite(mean)]):
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(lambda value, place: f"{value:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set(xlabel="epoch", ylabel="training loss of the victim")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    add_legend(figure, handles, labels)
    return figure
