"""Rows pivoted into tables: which axes make the lines, which the columns, and what stands in a cell."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from backdoor_bench_none.contracts.cell import AXES
from backdoor_bench_none.errors import ConfigError, did_you_mean
from backdoor_bench_none.maths.statistics import compare_paired, rank_with_ties
from backdoor_bench_none.results.metrics import METRICS, Metric
from backdoor_bench_none.results.rows import Row

#: the order of axes in lines; the defense makes the columns unless told otherwise
LINE_AXES = ("dataset", "attack", "architecture", "activation", "trainer")


@dataclass(frozen=True)
class Layout:
    """What a table shows: axes for `lines` and `columns`, and the metrics in every cell.

    Axes that vary and are named nowhere make lines too; without `lines`, all but the columns do.
    """

    lines: tuple[str, ...] = ()
    columns: tuple[str, ...] = ("defense",)
    metrics: tuple[str, ...] = ("ba", "asr")

    def check(self) -> None:
        """Raise `ConfigError` for axes and metrics that are not there, or stand twice."""
        for axis in (*self.lines, *self.columns):
            if axis not in AXES:
                raise ConfigError(f"unknown axis '{axis}'", did_you_mean(axis, AXES))
        for metric in self.metrics:
            if metric not in METRICS:
                raise ConfigError(f"unknown metric '{metric}'", did_you_mean(metric, METRICS))
        used = [*self.lines, *self.columns]
        if twice := sorted({axis for axis in used if used.count(axis) > 1}):
            raise ConfigError(f"axis '{twice[0]}' stands twice", "an axis makes lines or columns")


@dataclass(frozen=True)
class Part:
    """One number: `best` among the defenses it competes with, or `close`, not distinguishable from the best."""

    text: str
    value: float | None
    best: bool = False
    close: bool = False


@dataclass(frozen=True)
class Box:
    """One cell of a table: its numbers, or a status; `note` is the number of a footnote; `row` what is behind it."""

    parts: tuple[Part, ...]
    status: str = ""
    note: int | None = None
    row: Row | None = None

    def text(self, mark_best: str = "{}", close: str = "≈") -> str:
        """The numbers joined, the best ones in `mark_best`; or the status."""
        shown = [mark_best.format(p.text) if p.best else p.text + close * p.close for p in self.parts]
        return (" / ".join(shown) or self.status) + ("" if self.note is None else f" [{self.note}]")


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
    grants = {column: text for row in rows for column, text in _grants(row, layout)}
    notes: list[str] = []
    boxes: dict[tuple[str, ...], dict[str, Box]] = defaultdict(dict)
    columns: dict[str, None] = {}
    for row in rows:
        line = tuple(str(getattr(row, axis)) for axis in axes)
        column = " · ".join(str(getattr(row, axis)) for axis in layout.columns)
        columns[column] = None
        box = _box(row, metrics, ranks, notes)
        while column in boxes[line]:  # equal labels of different parameters stand in lines of their own
            line = (*line[:-1], line[-1] + "′")
        boxes[line][column] = box
    names = [column + "*" * (column in grants) for column in columns]
    lines = [(line, [found.get(column) for column in columns]) for line, found in boxes.items()]
    fixed = [axis for axis in LINE_AXES if axis not in (*axes, *layout.columns) and axis != "trainer"]
    title = " · ".join([*(str(getattr(rows[0], axis)) for axis in fixed if rows), describe_seeds(rows)])
    footnotes = [_legend(metrics, rows, tested), *describe_ranks(rows, metrics)]
    footnotes += [f"* {name} was {text}" for name, text in grants.items()]
    footnotes += [f"[{number}] {note}" for number, note in enumerate(notes, 1)]
    return Pivot(title, axes, names, lines, metrics, footnotes)


def _line_axes(rows: Sequence[Row], layout: Layout) -> tuple[str, ...]:
    free = [axis for axis in AXES if axis not in (*layout.columns, *layout.lines)]
    varying = [axis for axis in free if len({getattr(row, axis) for row in rows}) > 1]
    if layout.lines:
        return (*layout.lines, *varying)
    return tuple(varying) or (("attack",) if "attack" not in layout.columns else ("defense",))


def _box(row: Row, metrics: Sequence[Metric], ranks: Mapping[tuple[int, str], str], notes: list[str]) -> Box:
    note = None
    if row.status != "done":
        text = f"{row.status}: {row.reason}"
        if text not in notes:
            notes.append(text)
        note = notes.index(text) + 1
    if row.ba is None:
        return Box((), row.status, note, row)
    parts = []
    for metric in metrics:
        value, deviation = getattr(row, metric.name), row.deviations.get(metric.name)
        text = metric.show(value) + (f" ±{metric.show(deviation)}" if deviation is not None else "")
        rank = ranks.get((id(row), metric.name), "")
        parts.append(Part(text, value, rank == "best", rank == "close"))
    return Box(tuple(parts), row.status, note, row)


def rank_rows(rows: Sequence[Row], metrics: Iterable[str]) -> tuple[dict[tuple[int, str], str], bool]:
    """For each row and metric "best" among the defenses of equal other axes, or "close" to it; and whether anything
    could be tested. Baselines and defenses that are told the truth do not compete.
    """
    groups: dict[object, list[Row]] = defaultdict(list)
    for row in rows:
        if row.ba is not None and not row.is_baseline and not row.sees_ground_truth:
            groups[row.rest].append(row)
    found: dict[tuple[int, str], str] = {}
    tested = False
    for group in groups.values():
        for name in metrics if len(group) > 1 else ():
            tested |= _rank_group(group, METRICS[name], found)
    return found, tested


def _rank_group(group: Sequence[Row], metric: Metric, found: dict[tuple[int, str], str]) -> bool:
    having = [row for row in group if getattr(row, metric.name) is not None]
    if len(having) < 2 or len({getattr(row, metric.name) for row in having}) == 1:
        return False
    choose = max if metric.better == "higher" else min
    goal = choose(getattr(row, metric.name) for row in having)
    best = [row for row in having if getattr(row, metric.name) == goal]
    found.update({(id(row), metric.name): "best" for row in best})
    tested = False
    for row in having:
        if row not in best and (distinguishable := are_distinguishable(best[0], row, metric.name)) is not None:
            tested = True
            if not distinguishable:
                found[id(row), metric.name] = "close"
    return tested


def mean_ranks(rows: Sequence[Row], metric: Metric) -> tuple[dict[str, float], int]:
    """The mean rank of each competing defense, 1 the best and ties averaged, over the combinations of the other axes
    in which all of them have a number; and how many these are.
    """
    competing = [row for row in rows if not row.is_baseline and not row.sees_ground_truth]
    defenses = list(dict.fromkeys(row.defense for row in competing))
    groups: dict[object, dict[str, float]] = defaultdict(dict)
    for row in competing:
        if (value := getattr(row, metric.name)) is not None:
            groups[row.rest][row.defense] = value
    ranks = [
        rank_with_ties([group[defense] for defense in defenses], metric.better == "higher")
        for group in groups.values()
        if len(group) == len(defenses)
    ]
    if len(defenses) < 2 or not ranks:
        return {}, 0
    totals = [sum(rank or 0.0 for rank in column) for column in zip(*ranks, strict=True)]
    return {name: total / len(ranks) for name, total in zip(defenses, totals, strict=True)}, len(ranks)


def describe_ranks(rows: Sequence[Row], metrics: Sequence[Metric]) -> Iterable[str]:
    """A note on mean ranks, where there are several combinations to take a mean over."""
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


def _grants(row: Row, layout: Layout) -> Iterable[tuple[str, str]]:
    """What a defense was granted beyond the untrusted training set, by its column."""
    if "defense" not in layout.columns:
        return
    column = " · ".join(str(getattr(row, axis)) for axis in layout.columns)
    if row.sees_ground_truth:
        yield column, "told which samples are poisoned: an upper bound, not a defense"
    elif row.clean_fraction:
        yield column, f"given {100 * row.clean_fraction:g} % of the training set as clean data"


def _legend(metrics: Sequence[Metric], rows: Sequence[Row], tested: bool) -> str:
    cells = " / ".join(metric.title for metric in metrics)
    arrows = "; ".join(f"{metric.meaning}, {metric.better} is better" for metric in metrics)
    spread = ", ± standard deviation over seeds" if any(row.deviations for row in rows) else ""
    close = "; ≈ not distinguishable from the best by a paired t test over seeds at 5 %" if tested else ""
    return f"Each cell: {cells}{spread}. {arrows}{close}"


def describe_seeds(rows: Sequence[Row]) -> str:
    """How many seeds the means are over."""
    counts = {len(row.seeds) for row in rows if row.seeds}
    if not counts:
        return "no results yet"
    if counts == {1}:
        return "1 seed"
    return f"mean over {min(counts)} seeds" if len(counts) == 1 else f"mean over {min(counts)} to {max(counts)} seeds"
