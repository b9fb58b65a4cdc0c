"""The data of a report as JSON values: texts as they are shown, with one copy of what many cells share."""

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
from backdoor_bench_none.report.html.texts import (
    HUGE,
    LABEL,
    Pool,
    clean_line,
    clean_lines,
    clean_value,
    finite,
    show_number,
)
from backdoor_bench_none.report.pivot import UNCHANGED, rank_rows
from backdoor_bench_none.results.metrics import METRICS, Metric
from backdoor_bench_none.results.rows import Row
from backdoor_bench_none.words import plural

#: points of a curve, lines of a block, and significant digits of a loss
POINTS, LINES, DIGITS = 60, 80, 4
#: the most stages whose costs are shown: a hostile record may name any number
MOST_COSTS = 12
#: what the `upstream` of a record holds besides the keys of stages
DATA_FACTS = ("poisoned_samples", "dataset_sha256")
Block = tuple[tuple[str, str], ...]
Curve = tuple[float | None, ...]


def measured_metrics(rows: Sequence[Row]) -> list[Metric]:
    """The metrics of which at least one row has a number."""
    return [metric for metric in METRICS.values() if _is_measured(metric, rows)]


def _is_measured(metric: Metric, rows: Sequence[Row]) -> bool:
    return any(finite(getattr(row, metric.name)) is not None for row in rows)


class Payload:
    """Collects the data of a report, in which rows are referred to by their index in `source.rows`."""

    def __init__(self, source: Source, previews: Mapping[Pair, Preview]) -> None:
        self.source = source
        self.metrics = measured_metrics(source.rows)
        self.ranks, self.tested = rank_rows(source.rows, [metric.name for metric in self.metrics])
        self._previews = previews
        self._commands = Commands(source.trials, source.file)
        self._labels = {axis: Pool[str]() for axis in AXES}
        self._texts, self._blocks, self._curves = Pool[str](), Pool[Block](), Pool[Curve]()

    def collect(self) -> dict[str, Any]:
        """All data of the report as JSON values."""
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
        """The previews by the numbers of their data set and attack; those of labels that no row has are left out."""
        datasets, attacks = self._labels["dataset"].numbers(), self._labels["attack"].numbers()
        return {
            f"{datasets[dataset]},{attacks[attack]}": (preview.source, preview.text)
            for (dataset, attack), preview in self._previews.items()
            if dataset in datasets and attack in attacks
        }

    def _row(self, row: Row, trials: Sequence[Trial]) -> dict[str, Any]:
        values: dict[str, Any] = {
            "labels": [self._labels[axis].add(getattr(row, axis)) for axis in AXES],
            "status": row.status,
            "values": [self._value(row, metric) for metric in self.metrics],
            "seeds": row.seeds,
            "trials": [self._trial(trial) for trial in trials],
        }
        if row.reason:
            values["reason"] = self._texts.add(clean_line(row.reason))
        if len(row.seeds) > 1:
            values["each"] = [self._each(row, metric) for metric in self.metrics]
        if notes := _notes(row):
            values["notes"] = [self._texts.add(note) for note in notes]
        if trials:
            command, others = self._commands.of(trials)
            values["command"] = command
            if others:
                shown = ", ".join(clean_line(title, LABEL) for title in others[:3])
                values["others"] = self._texts.add(f"It also runs {plural('other cell', len(others))}, as {shown}")
        record = next((trial.record for trial in trials if trial.record is not None), None)
        if record is not None:
            values["parts"] = [self._texts.add(text) for text in _components(record)]
            values["recipe"] = self._blocks.add(_block(record.recipe))
        return values

    def _value(self, row: Row, metric: Metric) -> list[str] | None:
        """Mean, standard deviation, ends of the interval, and "best" or "close"; empty texts for what is missing."""
        mean = getattr(row, metric.name)
        if finite(mean) is None:
            return None
        shown = [show_number(mean, metric), "", "", ""]
        deviation = row.deviations.get(metric.name)
        if deviation is not None:
            shown[1] = show_number(deviation, metric)
        interval = row.intervals.get(metric.name)
        if interval is not None:
            shown[2:] = show_number(interval.low, metric), show_number(interval.high, metric)
        return _trim([*shown, self.ranks.get((id(row), metric.name), "")])

    def _each(self, row: Row, metric: Metric) -> list[str]:
        return [show_number(value, metric) for value in row.per_seed.get(metric.name, ())]

    def _trial(self, trial: Trial) -> dict[str, Any]:
        record = trial.record
        values: dict[str, Any] = {"seed": trial.seed, "key": clean_line(trial.key, LABEL)}
        if trial.status != "done":
            values |= {"status": trial.status, "reason": self._texts.add(clean_line(trial.reason or "no reason given"))}
        if record is None:
            return values
        if record.failure is not None and record.failure.traceback:
            values["traceback"] = self._texts.add(clean_lines(record.failure.traceback))
        if record.counts is not None:
            counts = record.counts
            parts = (counts.benign_accuracy, counts.attack_success_rate, counts.robust_accuracy)
            values["counts"] = [_count(count) for count in parts]
        if record.costs:
            values["costs"] = _costs(record)
        if curve := shorten(record.victim_losses):
            values["curve"] = [self._curves.add(curve), len(record.victim_losses)]
        blocks = {"found": _outcome(record), "where": _block(flatten(record.provenance))}
        blocks |= {"upstream": _data_facts(record), "stages": _stage_keys(record)}
        return values | {name: self._blocks.add(block) for name, block in blocks.items() if block}


def _labels(pool: Pool[str]) -> list[str]:
    return [clean_line(label, LABEL) for label in pool.values()]


def _trim(values: list[str]) -> list[str]:
    while values and not values[-1]:
        values.pop()
    return values


def _notes(row: Row) -> list[str]:
    """What a reader must know before comparing a row with others."""
    notes = []
    if row.is_baseline:
        notes.append("A baseline: it does not compete")
    if row.sees_ground_truth:
        notes.append("Told which samples are poisoned: an upper bound, not a defense; it does not compete")
    if row.unchanged and not row.is_baseline:
        notes.append(f"{UNCHANGED[0].upper()}{UNCHANGED[1:]}")
    if row.clean_fraction:
        notes.append(f"Given {100 * row.clean_fraction:g} % of the training set as clean data")
    if len(row.seeds) == 1:
        notes.append("One seed: intervals are Wilson's over test images, and ignore what retraining would change")
    return notes


def _block(values: Mapping[str, object]) -> Block:
    """Names and values as lines, at most `LINES` and a count of those left out."""
    shown = [(clean_line(name, LABEL), clean_value(value)) for name, value in list(values.items())[:LINES]]
    if len(values) > LINES:
        shown.append(("…", f"{len(values) - LINES} more"))
    return tuple(shown)


def flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping with one inner level as `outer inner` names, without values that are None."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= {f"{name} {key}": part for key, part in value.items() if part is not None}
        elif value is not None:
            flat[name] = value
    return flat


def _components(record: Record) -> list[str]:
    """Name, revision and parameters of the component on every axis."""
    lines = []
    for axis in AXES:
        value = record.axes[axis]
        line = f"{value.name}, revision {value.revision}"
        if value.params:
            params = [f"{name}={clean_value(param)}" for name, param in list(value.params.items())[:LINES]]
            line += f"; {', '.join(params)}"
        lines.append(clean_line(line))
    return lines


def _outcome(record: Record) -> Block:
    """What the defense and the attack report, besides counts."""
    values: dict[str, Any] = {}
    detection = record.detection
    if detection is not None:
        poisoned = detection.true_positive + detection.false_negative
        hits = f"{detection.true_positive} of {poisoned} poisoned samples"
        values["flagged"] = f"{hits}, and {detection.false_positive} benign ones"
    if record.infected is not None:
        values["says the network is infected"] = record.infected
    values |= record.metrics | flatten(record.extras)
    values |= {f"trigger {number}": trigger for number, trigger in enumerate(record.triggers, 1)}
    values |= {f"warning {number}": text for number, text in enumerate(record.warnings, 1)}
    return _block(values)


def _data_facts(record: Record) -> Block:
    names = [name for name in DATA_FACTS if record.upstream.get(name) is not None]
    return _block({name.replace("_", " "): record.upstream[name] for name in names})


def _stage_keys(record: Record) -> Block:
    """The content keys of the stages behind a record, in the order of the stage table."""
    stages = in_order(set(record.upstream).difference(DATA_FACTS))
    return _block({stage: record.upstream[stage] for stage in stages if record.upstream[stage] is not None})


def _count(count: Count | None) -> str:
    return "–" if count is None else f"{count.hits:,} of {count.total:,}"


def _costs(record: Record) -> list[str]:
    lines = []
    for stage in in_order(record.costs)[:MOST_COSTS]:
        cost = record.costs[stage]
        line = f"{clean_line(stage, 40)} {_seconds(cost.seconds)} s"
        if cost.peak_memory is not None:
            line += f", {show_number(cost.peak_memory, METRICS['peak_memory'])} MiB"
        lines.append(line)
    return lines


def _seconds(value: float) -> str:
    if finite(value) is None:
        return "–"
    return f"{value:.2f}" if abs(value) < HUGE else f"{value:.3g}"


def shorten(losses: Sequence[float]) -> Curve:
    """At most `POINTS` losses, evenly spaced from first to last, with `DIGITS` digits; None where not finite."""
    count = min(len(losses), POINTS)
    epochs = [round(point * (len(losses) - 1) / max(1, count - 1)) for point in range(count)]
    return tuple(_rounded(losses[epoch]) for epoch in epochs)


def _rounded(loss: float) -> float | None:
    if finite(loss) is None:
        return None
    return float(f"{loss:.{DIGITS}g}")


def embed(payload: object) -> str:
    """JSON for a script element, which it cannot end: ASCII, without `<`."""
    text = json.dumps(payload, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
