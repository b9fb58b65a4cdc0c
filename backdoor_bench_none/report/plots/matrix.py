"""The comparison matrix as heat maps, one for each metric, with the number in every cell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import Normalize
from matplotlib.patches import Rectangle

from backdoor_bench_none.report.pivot import Box, Layout, Pivot, pivot
from backdoor_bench_none.report.plots.canvas import PAGE, axis_label, check_count, new_figure, plain
from backdoor_bench_none.report.plots.labels import with_numbers
from backdoor_bench_none.results.metrics import Metric
from backdoor_bench_none.results.rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: colour maps by the better side; two different ones, so that a glance tells the metrics apart
MAPS = {"higher": "viridis", "lower": "cividis"}
MAX_LINES, MAX_COLUMNS = 60, 24
#: width and height of a cell in inches
CELL = (0.58, 0.34)


@dataclass(frozen=True)
class Entry:
    """One cell of a heat map: its number in the unit shown, or None, and the texts in it."""

    value: float | None
    text: str
    spread: str = ""


@dataclass(frozen=True)
class HeatMap:
    """The entries of one metric, by line and column."""

    metric: Metric
    entries: list[list[Entry]]

    @property
    def limits(self) -> tuple[float, float]:
        """The numbers at the ends of the colour map: 0 and 100 for shares, else the lowest and the highest one."""
        values = [entry.value for entry in chain.from_iterable(self.entries) if entry.value is not None]
        if self.metric.is_share or not values:
            return 0.0, 100.0
        low, high = min(values), max(values)
        if low == high:
            return low - 1, high + 1
        return low, high


@dataclass(frozen=True)
class Matrix:
    """Heat maps with the same lines and columns."""

    title: str
    lines: list[str]
    columns: list[str]
    maps: list[HeatMap]
    notes: list[str]


def make_matrix(rows: Sequence[Row], metrics: Sequence[Metric]) -> Matrix:
    """The table of `rows` with defenses as columns, as `bbn table` has it."""
    with_numbers(rows, metrics[:1])  # raises an error for a matrix without any number
    table = pivot(rows, Layout(metrics=tuple(metric.name for metric in metrics)))
    check_count("lines", len(table.lines), MAX_LINES)
    check_count("columns", len(table.columns), MAX_COLUMNS)
    lines = [" · ".join(map(plain, labels)) for labels, _ in table.lines]
    maps = [_make_map(table, index, metric) for index, metric in enumerate(metrics)]
    notes = [plain(note, 300) for note in _notes(table)]
    if any(map(_has_unmeasured, maps)):
        notes.append("–: not measured")
    return Matrix(plain(table.title, 120), lines, list(map(plain, table.columns)), maps, notes)


def _make_map(table: Pivot, index: int, metric: Metric) -> HeatMap:
    """The heat map of the metric that is number `index` in every cell of `table`."""
    entries = []
    for _, boxes in table.lines:
        entries.append([_entry(box, index, metric) for box in boxes])
    return HeatMap(metric, entries)


def _has_unmeasured(heat: HeatMap) -> bool:
    return any(entry.text.startswith("–") for entry in chain.from_iterable(heat.entries))


def _notes(table: Pivot) -> list[str]:
    """The footnotes of the table that a picture needs: on deviations, grants and failures."""
    notes = [note for note in table.footnotes if note.startswith(("*", "["))]
    if "± standard deviation" in table.footnotes[0]:
        notes.insert(0, "±: standard deviation over seeds")
    return notes


def _entry(box: Box | None, index: int, metric: Metric) -> Entry:
    if box is None:
        return Entry(None, "")
    note = "" if box.note is None else f" [{box.note}]"
    if not box.parts:
        return Entry(None, box.status + note)
    part = box.parts[index]
    text, _, deviation = part.text.partition(" ±")
    value = None if part.value is None else part.value * metric.scale
    return Entry(value, text + note, deviation and f"±{deviation}")


def draw_matrix(matrix: Matrix) -> Figure:
    """The heat maps side by side, or one below the other where the page is too narrow."""
    names = 0.25 + 0.062 * max(map(len, matrix.lines))  # inches that the labels of lines need
    longest = max(map(len, matrix.columns))
    wide = len(matrix.columns) * CELL[0] + 0.55
    high = len(matrix.lines) * CELL[1] + 0.3 + 0.045 * longest
    across, down = 1, len(matrix.maps)
    if names + wide * len(matrix.maps) <= PAGE + 0.5:
        across, down = down, across
    width = max(3.4, names + wide * across)
    figure = new_figure(width, high * down + 0.2 + 0.135 * (1 + len(matrix.notes)), matrix.title, matrix.notes)
    axes = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).flat
    turned: dict[str, Any] = {}
    if longest > 8:
        turned = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"}
    for axis, heat in zip(axes, matrix.maps, strict=True):
        _draw_map(axis, heat, figure)
        axis.set_xticks(range(len(matrix.columns)), matrix.columns, **turned)
        axis.set_yticks(range(len(matrix.lines)), matrix.lines)
    return figure


def _draw_map(axis: Axes, heat: HeatMap, figure: Figure) -> None:
    scale, colours = Normalize(*heat.limits), colormaps[MAPS[heat.metric.better]]
    numbers = np.full((len(heat.entries), len(heat.entries[0])), np.nan)
    for line, entries in enumerate(heat.entries):
        for column, entry in enumerate(entries):
            if entry.value is not None:
                numbers[line, column] = entry.value
    y, x = (np.arange(count + 1) - 0.5 for count in numbers.shape)
    cells = axis.pcolormesh(x, y, np.ma.masked_invalid(numbers), norm=scale, cmap=colours, edgecolors="white", lw=0.6)
    axis.set_ylim(y[-1], y[0])
    axis.grid(False)
    axis.tick_params(length=0, labelbottom=True)
    axis.spines[:].set_visible(False)
    for line, entries in enumerate(heat.entries):
        for column, entry in enumerate(entries):
            if entry.value is None and entry.text:
                _draw_absent(axis, column, line, entry.text)
            elif entry.value is not None:
                _draw_number(axis, column, line, entry, colours(scale(entry.value)))
    axis.set_title(axis_label(heat.metric))
    figure.colorbar(cells, ax=axis, fraction=0.05, pad=0.02).outline.set_visible(False)


def _draw_number(axis: Axes, x: int, y: int, entry: Entry, background: tuple[float, float, float, float]) -> None:
    red, green, blue = ((part + 0.055) / 1.055 for part in background[:3])
    luminance = 0.2126 * red**2.4 + 0.7152 * green**2.4 + 0.0722 * blue**2.4
    colour = "black" if luminance > 0.18 else "white"  # both have the same WCAG contrast at about 0.18
    height = y - 0.13 if entry.spread else y  # room for the deviation below the number
    axis.text(x, height, entry.text, color=colour, ha="center", va="center")
    axis.text(x, y + 0.25, entry.spread, color=colour, ha="center", va="center", fontsize=6)


def _draw_absent(axis: Axes, x: int, y: int, text: str) -> None:
    """A hatched cell with its status."""
    axis.add_patch(
        Rectangle((x - 0.47, y - 0.46), 0.94, 0.92, facecolor="white", edgecolor="#999999", hatch="////", lw=0)
    )
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    axis.text(x, y, text, ha="center", va="center", fontsize=6, bbox=box)
