"""The data of a report as JSON values: texts as they are shown, and what many cells share only once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from backdoor_bench_none.contracts.cell import AXES
from backdoor_bench_none.contracts.measures import Count
from backdoor_bench_none.contracts.record import Record
from backdoor_bench_none.planning.stage_table import in_order
from backdoor_bench_none.report.html.command import Commands
from backdoor_bench_none.report.html.previews import Preview
from backdoor_bench_none.report.html.source import Pair, Source, Trial
from backdoor_bench_none.report.html.texts import LABEL, Pool, clean_line, clean_lines, clean_value, finite, show_number
from backdoor_bench_none.report.pivot import rank_rows
from backdoor_bench_none.results.metrics import METRICS, Metric
from backdoor_bench_none.results.rows import Row

#: points of a curve, lines of a block, and significant digits of a loss
POINTS, LINES, DIGITS = 60, 80, 4
#: stages whose costs are shown: a hostile record may name any number
MOST_COSTS = 12
Block = tuple[tuple[str, str], ...]
Curve = tuple[float | None, ...]


def measured_metrics(rows: Sequence[Row]) -> list[Metric]:
    """The metrics of which at least one row has a number."""
    return [m for m in METRICS.values() if any(finite(getattr(row, m.name)) is not None for row in rows)]


class Payload:
    """Collects the data of a report. Rows are called by their place among `source.rows`."""

    def __init__(self, source: Source, previews: Mapping[Pair, Preview]) -> None:
        self.source = source
        self.metrics = measured_metrics(source.rows)
        self.ranks, self.tested = rank_rows(source.rows, [metric.name for metric in self.metrics])
        self._previews = previews
        self._commands = Commands(source.trials, source.file)
        self._labels = {axis: Pool[str]() for axis in AXES}
        self._texts, self._blocks, self._curves = Pool[str](), Pool[Block](), Pool[Curve]()

    def collect(self) -> dict[str, Any]:
        """All of it, as JSON values."""
        rows = [self._row(row, group) for row, group in zip(self.source.rows, self.source.groups, strict=True)]
        return {
            "axes": AXES,
            "labels": {axis: _labels(pool) for axis, pool in self._labels.items()},
            "metrics": [self._metric(metric) for metric in self.metrics],
            "previews": self._previews_by_number(),
            "rows": rows,
            "texts": self._texts.values(),
            "blocks": self._blocks.values(),
            "curves": self._curves.values(),
        }  # fmt: skip

    def _metric(self, metric: Metric) -> dict[str, Any]:
        return {"name": metric.name, "title": metric.title, "heading": metric.heading, "meaning": metric.meaning,
                "lower": metric.better == "lower", "share": metric.is_share}  # fmt: skip

    def _previews_by_number(self) -> dict[str, tuple[str, str]]:
        numbers = [{label: i for i, label in enumerate(self._labels[axis].values())} for axis in ("dataset", "attack")]
        return {
            f"{numbers[0][dataset]},{numbers[1][attack]}": (preview.source, preview.text)
            for (dataset, attack), preview in self._previews.items()
            if dataset in numbers[0] and attack in numbers[1]
        }

    def _row(self, row: Row, trials: Sequence[Trial]) -> dict[str, Any]:
        found: dict[str, Any] = {
            "labels": [self._labels[axis].add(getattr(row, axis)) for axis in AXES],
            "status": row.status,
            "values": [self._value(row, metric) for metric in self.metrics],
            "seeds": row.seeds,
            "trials": [self._trial(trial) for trial in trials],
        }
        if row.reason:
            found["reason"] = self._texts.add(clean_line(row.reason))
        if len(row.seeds) > 1:
            found["each"] = [self._each(row, metric) for metric in self.metrics]
        if notes := list(_notes(row)):
            found["notes"] = [self._texts.add(note) for note in notes]
        if trials:
            command, others = self._commands.of(trials)
            found["command"] = command
            if others:
                shown = ", ".join(clean_line(title, LABEL) for title in others[:3])
                found["others"] = self._texts.add(
                    f"It also runs {len(others)} other cell{'s' * (len(others) > 1)}, as {shown}"
                )
        if (record := next((t.record for t in trials if t.record is not None), None)) is not None:
            found["parts"] = [self._texts.add(text) for text in _components(record)]
            found["recipe"] = self._blocks.add(_block(record.recipe))
        return found

    def _value(self, row: Row, metric: Metric) -> list[str] | None:
        """Mean, standard deviation, ends of the interval, and "best" or "close"."""
        if finite(getattr(row, metric.name)) is None:
            return None
        interval, deviation = row.intervals.get(metric.name), row.deviations.get(metric.name)
        ends = [None, None] if interval is None else [interval.low, interval.high]
        numbers = [getattr(row, metric.name), deviation, *ends]
        shown = ["" if number is None else show_number(number, metric) for number in numbers]
        return _trim([*shown, self.ranks.get((id(row), metric.name), "")])

    def _each(self, row: Row, metric: Metric) -> list[str]:
        return [show_number(value, metric) for value in row.per_seed.get(metric.name, ())]

    def _trial(self, trial: Trial) -> dict[str, Any]:
        record = trial.record
        found: dict[str, Any] = {"seed": trial.seed, "key": clean_line(trial.key, LABEL)}
        if trial.status != "done":
            found |= {"status": trial.status, "reason": self._texts.add(clean_line(trial.reason or "no reason given"))}
        if record is None:
            return found
        if record.failure is not None and record.failure.traceback:
            found["traceback"] = self._texts.add(clean_lines(record.failure.traceback))
        if record.counts is not None:
            counts = record.counts
            parts = (counts.benign_accuracy, counts.attack_success_rate, counts.robust_accuracy)
            found["counts"] = [_count(count) for count in parts]
        if record.costs:
            found["costs"] = _costs(record)
        if curve := shorten(record.victim_losses):
            found["curve"] = [self._curves.add(curve), len(record.victim_losses)]
        blocks = {"found": _found(record), "where": _block(flatten(record.provenance)), "upstream": _upstream(record)}
        return found | {name: self._blocks.add(block) for name, block in blocks.items() if block}


def _labels(pool: Pool[str]) -> list[str]:
    return [clean_line(label, LABEL) for label in pool.values()]


def _trim(values: list[str]) -> list[str]:
    while values and not values[-1]:
        values.pop()
    return values


def _notes(row: Row) -> list[str]:
    """What a reader must know before comparing it."""
    notes = ["A baseline: it does not compete"] if row.is_baseline else []
    if row.sees_ground_truth:
        notes.append("Told which samples are poisoned: an upper bound, not a defense; it does not compete")
    if row.clean_fraction:
        notes.append(f"Given {100 * row.clean_fraction:g} % of the training set as clean data")
    if len(row.seeds) == 1:
        notes.append(
            "One seed: its intervals are Wilson's over test images, without what another training would change"
        )
    return notes


def _block(values: Mapping[str, object]) -> Block:
    shown = [(clean_line(name, LABEL), clean_value(value)) for name, value in list(values.items())[:LINES]]
    return tuple(shown) if len(values) <= LINES else (*shown, ("…", f"{len(values) - LINES} more"))


def flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """One level of mappings within a mapping as `outer inner` names; nothing where there is None."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        inner = value.items() if isinstance(value, dict) else [(None, value)]
        found |= {name if key is None else f"{name} {key}": part for key, part in inner if part is not None}
    return found


def _components(record: Record) -> list[str]:
    """Name, revision and parameters of the component on every axis."""
    lines = []
    for axis in AXES:
        value = record.axes[axis]
        params = ", ".join(f"{name}={clean_value(param)}" for name, param in list(value.params.items())[:LINES])
        lines.append(clean_line(f"{value.name}, revision {value.revision}{'; ' if params else ''}{params}"))
    return lines


def _found(record: Record) -> Block:
    values: dict[str, Any] = {}
    if (seen := record.detection) is not None:
        poisoned = seen.true_positive + seen.false_negative
        values["flagged"] = (
            f"{seen.true_positive} of {poisoned} poisoned samples, and {seen.false_positive} benign ones"
        )
    values |= {} if record.infected is None else {"says the network is infected": record.infected}
    values |= record.metrics | flatten(record.extras)
    values |= {f"trigger {number}": trigger for number, trigger in enumerate(record.triggers, 1)}
    values |= {f"warning {number}": text for number, text in enumerate(record.warnings, 1)}
    return _block(values)


def _upstream(record: Record) -> Block:
    wanted = ("poisoned_samples", "dataset_sha256")
    values = {name.replace("_", " "): record.upstream[name] for name in wanted if record.upstream.get(name) is not None}
    return _block(values)


def _count(count: Count | None) -> str:
    return "–" if count is None else f"{count.hits:,} of {count.total:,}"


def _costs(record: Record) -> list[str]:
    lines = []
    for stage in in_order(record.costs)[:MOST_COSTS]:
        cost = record.costs[stage]
        seconds = finite(cost.seconds)
        text = "– s" if seconds is None else f"{seconds:.2f} s" if abs(seconds) < 1e9 else f"{seconds:.3g} s"
        memory = "" if cost.peak_memory is None else f", {show_number(cost.peak_memory, METRICS['peak_memory'])} MiB"
        lines.append(f"{clean_line(stage, 40)} {text}{memory}")
    return lines


def shorten(losses: Sequence[float]) -> Curve:
    """At most `POINTS` losses, evenly chosen with the first and the last, of `DIGITS` digits; None where not finite."""
    count = min(len(losses), POINTS)
    places = [round(i * (len(losses) - 1) / max(1, count - 1)) for i in range(count)]
    values = [finite(losses[place]) for place in places]
    return tuple(None if value is None else float(f"{value:.{DIGITS}g}") for value in values)


def embed(payload: object) -> str:
    """JSON that cannot end the script element it stands in: ASCII, without `<`."""
    text = json.dumps(payload, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
