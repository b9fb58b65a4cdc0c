"""Summary: best defenses with their uncertainty, missing cells, warnings."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from backdoor_bench_none.report.html.source import Source, Trial
from backdoor_bench_none.report.html.texts import LABEL, clean_line, clean_value, finite, show_number
from backdoor_bench_none.report.pivot import mean_ranks, rank_rows, varying_axes
from backdoor_bench_none.results.metrics import METRICS, Metric
from backdoor_bench_none.results.rows import Row
from backdoor_bench_none.words import many, plural

#: the metrics by which the best defenses are named
SUMMARIZED = ("asr", "ba", "der")
#: an attack with an undefended ASR below this does not work
LEAST_ASR = 0.5
STATUSES = ("done", "failed", "timeout", "skipped", "missing")


@dataclass(frozen=True)
class Group:
    """Cells without numbers of one status and reason.

    `rows` are the rows they belong to: index, labels, and seeds unless they are all of the row's.
    """

    status: str
    reason: str
    rows: Sequence[tuple[int, str, str]]
    count: int


def count_statuses(trials: Iterable[Trial]) -> dict[str, int]:
    """The number of cells with each status, 0 included."""
    counts = Counter(trial.status for trial in trials)
    return {status: counts[status] for status in STATUSES}


def describe_facts(source: Source) -> dict[str, str]:
    """The numbers of cells, seeds, components and test images, by name."""
    trials, rows = source.trials, source.rows
    done = count_statuses(trials)["done"]
    axes = {"data set": "dataset", "attack": "attack", "defense": "defense", "architecture": "architecture",
            "activation": "activation"}  # fmt: skip
    facts = {
        "cells with numbers": f"{done:,} of {len(trials):,}",
        "seeds": _spread([len(row.seeds) for row in rows if row.seeds]),
    }
    for word, axis in axes.items():
        count = len({getattr(row, axis) for row in rows})
        name = word if count == 1 else many(word)
        facts[name] = f"{count:,}"
    for word, part in (("clean test images", "benign_accuracy"), ("triggered test images", "attack_success_rate")):
        if totals := _totals(trials, part):
            facts[word] = _spread(totals)
    return facts


def _totals(trials: Iterable[Trial], part: str) -> list[int]:
    """The number of images behind a count in every record that has it."""
    totals = []
    for trial in trials:
        if trial.record is None or trial.record.counts is None:
            continue
        count = getattr(trial.record.counts, part)
        if count is not None:
            totals.append(count.total)
    return totals


def _spread(numbers: Sequence[int]) -> str:
    if not numbers:
        return "–"
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def describe_hardware(trials: Iterable[Trial]) -> list[tuple[str, int]]:
    """The settings of hardware and software, each with the number of records made in it; the most common first."""
    counts = Counter(_setting(trial.record.provenance) for trial in trials if trial.record is not None)
    del counts[""]
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _setting(provenance: Mapping[str, object]) -> str:
    """Device, precision, threads and versions in one line, without those that a record does not state."""
    parts = [provenance.get("device"), provenance.get("precision")]
    threads = provenance.get("threads")
    if threads is not None:
        word = "thread" if threads == 1 else many("thread")  # a record may hold anything but a number here
        parts.append(f"{clean_value(threads)} {word}")
    for name, title in (("cuda", "CUDA"), ("python", "Python")):
        if provenance.get(name):
            parts.append(f"{title} {clean_value(provenance[name])}")
    libraries = provenance.get("libraries")
    if isinstance(libraries, dict):
        shown = [name for name in libraries if name in ("torch", "torchvision", "numpy")]
        parts += [f"{name} {clean_value(libraries[name])}" for name in shown]
    return clean_line(" · ".join(clean_value(part) for part in parts if part), 200)


def describe_best(rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    """For each metric the best of the competing defenses, how often they are, and their numbers: title and text."""
    ranks, _ = rank_rows(rows, SUMMARIZED)
    for metric in (METRICS[name] for name in SUMMARIZED):
        groups: dict[object, list[Row]] = defaultdict(list)
        for row in rows:
            if (id(row), metric.name) in ranks:
                groups[row.rest].append(row)
        wins: Counter[str] = Counter()
        close = 0
        for group in groups.values():
            by_rank: dict[str, dict[str, None]] = {"best": {}, "close": {}}
            for row in group:
                by_rank[ranks[id(row), metric.name]][row.defense] = None
            wins.update(by_rank["best"].keys())
            if by_rank["close"]:
                close += 1
        if wins:
            yield metric.heading, _describe_wins(rows, metric, wins, len(groups), close)


def _describe_wins(rows: Sequence[Row], metric: Metric, wins: Counter[str], groups: int, close: int) -> str:
    """Which defenses have the most `wins` in `groups` of rows; in `close` of them others are not distinguishable."""
    top = max(wins.values())
    names = [name for name, count in wins.items() if count == top]
    verb = "is" if len(names) == 1 else "are"
    word = "lowest" if metric.better == "lower" else "highest"
    text = f"{_join(names)} {verb} {word}"
    if groups > 1:
        text += f" in {top} of {groups} combinations"
        if len(names) > 1:
            text += " each"
    text += _describe_range(rows, metric, names[0])
    if close:
        where = "There" if groups == 1 else f"In {close} of {groups}"
        text += f". {where} another is not distinguishable from the best"
    means, count = mean_ranks(rows, metric)
    if count > 1:
        order = sorted(means, key=lambda name: means[name])[:4]
        shown = ", ".join(f"{_quote(name)} {means[name]:.2g}" for name in order)
        text += f". Mean ranks over {count} combinations that all defenses share: {shown}"
    return text


def _describe_range(rows: Sequence[Row], metric: Metric, defense: str) -> str:
    """The number of a defense, or its best and its worst one with their combinations."""
    own = [row for row in rows if row.defense == defense and finite(getattr(row, metric.name)) is not None]
    own.sort(key=lambda row: getattr(row, metric.name), reverse=metric.better == "higher")
    if not own:
        return ""
    if len(own) == 1:
        return f": {_number(own[0], metric)}"
    axes = [axis for axis in varying_axes(own) if axis != "defense"]
    best, worst = (f"{_number(row, metric)} on {_labels(row, axes)}" for row in (own[0], own[-1]))
    return f". {_quote(defense)} goes from {best} to {worst}"


def _number(row: Row, metric: Metric) -> str:
    """The mean of a row and its interval."""
    text, interval = show_number(getattr(row, metric.name), metric), row.intervals.get(metric.name)
    if metric.is_share:
        text += " %"
    if interval is None:
        return text
    return f"{text} (95 %: {show_number(interval.low, metric)} to {show_number(interval.high, metric)})"


def _labels(row: Row, axes: Iterable[str]) -> str:
    return " · ".join(clean_line(getattr(row, axis), LABEL) for axis in axes)


def _join(names: Sequence[str]) -> str:
    shown = list(map(_quote, names))
    if len(shown) == 1:
        return shown[0]
    return f"{', '.join(shown[:-1])} and {shown[-1]}"


def _quote(name: str) -> str:
    return f"'{clean_line(name, LABEL)}'"


def describe_cautions(source: Source) -> Iterator[str]:
    """Warnings: what limits the comparison of the numbers."""
    rows = source.rows
    counts = Counter(len(row.seeds) for row in rows if row.seeds)
    if counts[1]:
        yield (
            f"{counts[1]:,} of {sum(counts.values()):,} combinations rest on one seed: nothing can be tested there, "
            "and intervals are over test images alone"
        )
    yield from _describe_grants(rows)
    weak = [row for row in rows if row.is_baseline and row.asr is not None and row.asr < LEAST_ASR]
    if weak:
        attacks = ", ".join(dict.fromkeys(clean_line(row.attack, LABEL) for row in weak))
        yield (
            f"In {plural('combination', len(weak))} the attack fails without any defense (ASR of no_defense below "
            f"{100 * LEAST_ASR:g} %): a low ASR is no merit there ({clean_line(attacks, 300)})"
        )
    settings = describe_hardware(source.trials)
    if len(settings) > 1:
        yield f"{len(settings)} different settings of hardware and software: seconds and costs are not comparable"
    if not any(row.is_baseline for row in rows):
        yield "no_defense is not among the cells: there is no DER, and no baseline to compare defenses with"


def _describe_grants(rows: Sequence[Row]) -> Iterator[str]:
    """Which defenses were given more than the untrusted training set."""
    oracles: dict[str, None] = {}
    granted: dict[float, dict[str, None]] = defaultdict(dict)
    for row in rows:
        if row.sees_ground_truth:
            oracles[row.defense] = None
        elif row.clean_fraction:
            granted[row.clean_fraction][row.defense] = None
    if oracles:
        yield f"{_join(list(oracles))}: told which samples are poisoned; an upper bound that does not compete"
    for share, names in granted.items():
        grant = f"given {100 * share:g} % of the training set as clean data"
        yield f"{_join(list(names))}: {grant}, which others do without"


def group_failures(source: Source) -> list[Group]:
    """Cells without numbers, by status and reason."""
    failures: dict[tuple[str, str], dict[int, list[Trial]]] = defaultdict(lambda: defaultdict(list))
    for index, trials in enumerate(source.groups):
        for trial in trials:
            if trial.status != "done":
                reason = clean_line(trial.reason or "no reason given")
                failures[trial.status, reason][index].append(trial)
    groups = []
    axes = varying_axes(source.rows) or ["attack", "defense"]
    for (status, reason), by_row in failures.items():
        rows = [
            (index, _labels(source.rows[index], axes), _seeds(trials, source.groups[index]))
            for index, trials in by_row.items()
        ]
        groups.append(Group(status, reason, rows, sum(map(len, by_row.values()))))
    return sorted(groups, key=lambda group: (STATUSES.index(group.status), -group.count))


def _seeds(trials: Sequence[Trial], group: Sequence[Trial]) -> str:
    """The seeds of some trials, unless they are all of the row's."""
    if len(trials) == len(group):
        return ""
    seeds = ", ".join(str(trial.seed) for trial in trials)
    return f"seed {seeds}"
