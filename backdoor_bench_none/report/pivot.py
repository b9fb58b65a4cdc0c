"""Rows pivoted into tables: which axes make the lines and the columns, and the content of each cell."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from backdoor_bench_none.contracts.cell import AXES
from backdoor_bench_none.errors import ConfigError, did_you_mean
from backdoor_bench_none.maths.statistics import compare_paired, rank_with_ties
from backdoor_bench_none.results.metrics import METRICS, Metric
from backdoor_bench_none.results.rows import Row
from backdoor_bench_none.words import plural

#: the order of axes in lines; the defense makes the columns by default
LINE_AXES = ("dataset", "attack", "architecture", "activation", "trainer")
#: "best" or "close" by the id of a row and the name of a metric
Ranks = dict[tuple[int, str], str]


@dataclass(frozen=True)
class Layout:
    """What a table shows: axes for `lines` and `columns`, and the metrics in every cell.

    Axes that vary and are not named make lines too; without `lines`, all but the columns do.
    """

    lines: tuple[str, ...] = ()
    columns: tuple[str, ...] = ("defense",)
    metrics: tuple[str, ...] = ("ba", "asr")

    def check(self) -> None:
        """Raise `ConfigError` for unknown axes and metrics, and for an axis that is named twice."""
        for axis in (*self.lines, *self.columns):
            if axis not in AXES:
                raise ConfigError(f"unknown axis '{axis}'", did_you_mean(axis, AXES))
        for metric in self.metrics:
            if metric not in METRICS:
                raise ConfigError(f"unknown metric '{metric}'", did_you_mean(metric, METRICS))
        used = [*self.lines, *self.columns]
        if twice := sorted({axis for axis in used if used.count(axis) > 1}):
            raise ConfigError(f"axis '{twice[0]}' is named twice", "an axis makes lines or columns")


@dataclass(frozen=True)
class Part:
    """One number of a cell.

    It is `best` among the defenses that it competes with, or `close`: not distinguishable from the best.
    """

    text: str
    value: float | None
    best: bool = False
    close: bool = False

    @property
    def marked(self) -> str:
        """The number, followed by ≈ if it is close to the best."""
        return f"{self.text}≈" if self.close else self.text


#: what is said of a defense that did nothing
UNCHANGED = "unchanged: the network that the defense returned is the victim"


@dataclass(frozen=True)
class Box:
    """One cell of a table: its numbers, or a status.

    `note` is the number of a footnote, `row` the row that the cell shows.
    """

    parts: tuple[Part, ...]
    status: str = ""
    note: int | None = None
    row: Row | None = None

    def text(self, show: Callable[[Part], str] = lambda part: part.marked) -> str:
        """The numbers, each as `show` writes it, or the status; then the number of the footnote."""
        numbers = " / ".join(map(show, self.parts)) or self.status
        return numbers if self.note is None else f"{numbers} [{self.note}]"


@dataclass
class Pivot:
    """A table: `header` names the line axes and then the columns, `lines` hold labels and boxes."""

    title: str
    axes: tuple[str, ...]
    columns: list[str]
    lines: list[tuple[tuple[str, ...], list[Box | None]]]
    metrics: tuple[Metric, ...]
    footnotes: list[str] = field(default_factory=list)

    @property
    def header(self) -> list[str]:
        """The names of the line axes, then of the columns."""
        return [*self.axes, *self.columns]


def pivot(rows: Sequence[Row], layout: Layout | None = None) -> Pivot:
    """The table of `rows`."""
    layout = layout or Layout()
    layout.check()
    metrics = tuple(METRICS[name] for name in layout.metrics)
    axes = _line_axes(rows, layout)
    ranks, tested = rank_rows(rows, layout.metrics)
    notes: list[str] = []
    boxes: dict[tuple[str, ...], dict[str, Box]] = defaultdict(dict)
    columns: dict[str, None] = {}
    for row in rows:
        line = tuple(str(getattr(row, axis)) for axis in axes)
        column = _column_of(row, layout)
        columns[column] = None
        box = _box(row, metrics, ranks, notes)
        while column in boxes[line]:  # equal labels of different parameters go into separate lines
            line = (*line[:-1], line[-1] + "′")
        boxes[line][column] = box
    lines: list[tuple[tuple[str, ...], list[Box | None]]] = []
    for line, by_column in boxes.items():
        lines.append((line, [by_column.get(column) for column in columns]))
    grants = _find_grants(rows, layout)
    names = list(columns)
    for index, column in enumerate(columns):
        if column in grants:
            names[index] = f"{column}*"
    footnotes = [_legend(metrics, rows, tested), *describe_ranks(rows, metrics)]
    footnotes += [f"* {name} was {text}" for name, text in grants.items()]
    footnotes += [f"[{number}] {note}" for number, note in enumerate(notes, 1)]
    return Pivot(_title(rows, axes, layout), axes, names, lines, metrics, footnotes)


def varying_axes(rows: Sequence[Row]) -> list[str]:
    """The axes in which rows differ."""
    axes = []
    for axis in AXES:
        labels = {getattr(row, axis) for row in rows}
        if len(labels) > 1:
            axes.append(axis)
    return axes


def _line_axes(rows: Sequence[Row], layout: Layout) -> tuple[str, ...]:
    varying = [axis for axis in varying_axes(rows) if axis not in (*layout.columns, *layout.lines)]
    if layout.lines:
        return (*layout.lines, *varying)
    if varying:
        return tuple(varying)
    return ("defense",) if "attack" in layout.columns else ("attack",)


def _column_of(row: Row, layout: Layout) -> str:
    return " · ".join(str(getattr(row, axis)) for axis in layout.columns)


def _title(rows: Sequence[Row], axes: Sequence[str], layout: Layout) -> str:
    """The labels that all rows have in common, without the trainer, and the number of seeds."""
    shown = (*axes, *layout.columns, "trainer")
    fixed = [axis for axis in LINE_AXES if axis not in shown]
    labels: list[str] = []
    if rows:
        labels = [str(getattr(rows[0], axis)) for axis in fixed]
    return " · ".join([*labels, describe_seeds(rows)])


def _box(row: Row, metrics: Sequence[Metric], ranks: Mapping[tuple[int, str], str], notes: list[str]) -> Box:
    note, text = None, ""
    if row.status != "done":
        text = f"{row.status}: {row.reason}"
    elif row.unchanged and not row.is_baseline:
        text = UNCHANGED
    if text:
        if text not in notes:
            notes.append(text)
        note = notes.index(text) + 1
    if row.ba is None:
        return Box((), row.status, note, row)
    parts = []
    for metric in metrics:
        value, deviation = getattr(row, metric.name), row.deviations.get(metric.name)
        text = metric.show(value)
        if deviation is not None:
            text += f" ±{metric.show(deviation)}"
        rank = ranks.get((id(row), metric.name), "")
        parts.append(Part(text, value, rank == "best", rank == "close"))
    return Box(tuple(parts), row.status, note, row)


def rank_rows(rows: Sequence[Row], metrics: Iterable[str]) -> tuple[Ranks, bool]:
    """For each row and metric "best" among the defenses of equal other axes, or "close" to it; and whether any t test
    could be made.

    Baselines and defenses that are told which samples are poisoned do not compete.
    """
    groups: dict[object, list[Row]] = defaultdict(list)
    for row in rows:
        if row.ba is not None and not row.is_baseline and not row.sees_ground_truth:
            groups[row.rest].append(row)
    ranks: Ranks = {}
    tested = False
    for group in groups.values():
        if len(group) > 1:
            for name in metrics:
                tested |= _rank_group(group, METRICS[name], ranks)
    return ranks, tested


def _rank_group(group: Sequence[Row], metric: Metric, ranks: Ranks) -> bool:
    """Add the ranks of one group by one metric, and return whether any t test could be made."""
    having = [row for row in group if getattr(row, metric.name) is not None]
    if len(having) < 2 or len({getattr(row, metric.name) for row in having}) == 1:
        return False
    choose = max if metric.better == "higher" else min
    goal = choose(getattr(row, metric.name) for row in having)
    best = [row for row in having if getattr(row, metric.name) == goal]
    ranks.update({(id(row), metric.name): "best" for row in best})
    tested = False
    for row in having:
        if row in best:
            continue
        distinguishable = are_distinguishable(best[0], row, metric.name)
        if distinguishable is not None:
            tested = True
            if not distinguishable:
                ranks[id(row), metric.name] = "close"
    return tested


def mean_ranks(rows: Sequence[Row], metric: Metric) -> tuple[dict[str, float], int]:
    """The mean rank of each competing defense by a metric, and the number of combinations behind it.

    1 is the best and ties are averaged. The mean is over those combinations of the other axes in which all competing
    defenses have a number.
    """
    competing = [row for row in rows if not row.is_baseline and not row.sees_ground_truth]
    defenses = list(dict.fromkeys(row.defense for row in competing))
    groups: dict[object, dict[str, float]] = defaultdict(dict)
    for row in competing:
        value = getattr(row, metric.name)
        if value is not None:
            groups[row.rest][row.defense] = value
    shared = [group for group in groups.values() if len(group) == len(defenses)]
    if len(defenses) < 2 or not shared:
        return {}, 0
    totals = dict.fromkeys(defenses, 0.0)
    for group in shared:
        ranks = rank_with_ties([group[defense] for defense in defenses], metric.better == "higher")
        for defense, rank in zip(defenses, ranks, strict=True):
            totals[defense] += rank or 0.0
    return {defense: total / len(shared) for defense, total in totals.items()}, len(shared)


def describe_ranks(rows: Sequence[Row], metrics: Sequence[Metric]) -> Iterable[str]:
    """A note on mean ranks for each metric, where there are several combinations to average over."""
    for metric in metrics:
        ranks, count = mean_ranks(rows, metric)
        if count > 1:
            order = sorted(ranks, key=lambda name: ranks[name])
            shown = ", ".join(f"{name} {ranks[name]:.2g}" for name in order)
            yield f"Mean rank by {metric.title} over {count} combinations, ties averaged: {shown}"


def are_distinguishable(first: Row, second: Row, metric: str) -> bool | None:
    """Whether a paired t test over the seeds that both have tells two rows apart (5 %); None below two such seeds."""
    return compare_paired(*paired_values(first, second, metric)).distinguishable


def paired_values(first: Row, second: Row, metric: str) -> tuple[list[float], list[float]]:
    """The values of two rows for the seeds that both have."""
    one, other = (dict(zip(row.seeds, row.per_seed.get(metric, ()), strict=False)) for row in (first, second))
    seeds = [seed for seed in one if one[seed] is not None and other.get(seed) is not None]
    return [float(one[seed] or 0) for seed in seeds], [float(other[seed] or 0) for seed in seeds]


def _find_grants(rows: Sequence[Row], layout: Layout) -> dict[str, str]:
    """What defenses were given beyond the untrusted training set, by column."""
    grants: dict[str, str] = {}
    if "defense" not in layout.columns:
        return grants
    for row in rows:
        if row.sees_ground_truth:
            text = "told which samples are poisoned: an upper bound, not a defense"
            grants[_column_of(row, layout)] = text
        elif row.clean_fraction:
            text = f"given {100 * row.clean_fraction:g} % of the training set as clean data"
            grants[_column_of(row, layout)] = text
    return grants


def _legend(metrics: Sequence[Metric], rows: Sequence[Row], tested: bool) -> str:
    cells = " / ".join(metric.title for metric in metrics)
    if any(row.deviations for row in rows):
        cells += ", ± standard deviation over seeds"
    meanings = [f"{metric.meaning}, {metric.better} is better" for metric in metrics]
    if tested:
        meanings.append("≈ not distinguishable from the best by a paired t test over seeds at 5 %")
    return f"Each cell: {cells}. {'; '.join(meanings)}"


def describe_seeds(rows: Sequence[Row]) -> str:
    """How many seeds the means are over."""
    counts = [len(row.seeds) for row in rows if row.seeds]
    if not counts:
        return "no results yet"
    low, high = min(counts), max(counts)
    if high == 1:
        return plural("seed", 1)
    if low == high:
        return f"mean over {plural('seed', low)}"
    return f"mean over {low} to {plural('seed', high)}"
