"""The report in words and numbers: who is best and how sure that is, what is missing, and what to beware of."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from backdoor_bench_none.contracts.cell import AXES
from backdoor_bench_none.report.html.source import Source, Trial
from backdoor_bench_none.report.html.texts import LABEL, clean_line, clean_value, finite, show_number
from backdoor_bench_none.report.pivot import mean_ranks, rank_rows
from backdoor_bench_none.results.metrics import METRICS, Metric
from backdoor_bench_none.results.rows import Row

PRAISED = ("asr", "ba", "der")
#: an undefended ASR below this is an attack that does not work
WORKS = 0.5
STATUSES = ("done", "failed", "timeout", "skipped", "missing")


@dataclass(frozen=True)
class Group:
    """Cells without numbers of one status and reason; `rows` are the rows they belong to, each with its seeds."""

    status: str
    reason: str
    rows: Sequence[tuple[int, str, str]]
    count: int


def count_statuses(trials: Iterable[Trial]) -> dict[str, int]:
    """How many cells have each status; all statuses are there."""
    counts = Counter(trial.status for trial in trials)
    return {status: counts[status] for status in STATUSES}


def describe_facts(source: Source) -> dict[str, str]:
    """The size of it all, by name."""
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
        facts[word if count == 1 else f"{word}s"] = f"{count:,}"
    for word, part in (("clean test images", "benign_accuracy"), ("triggered test images", "attack_success_rate")):
        if totals := _totals(trials, part):
            facts[word] = _spread(totals)
    return facts


def _totals(trials: Iterable[Trial], part: str) -> list[int]:
    counts = [trial.record.counts for trial in trials if trial.record is not None and trial.record.counts is not None]
    return [count.total for found in counts if (count := getattr(found, part)) is not None]


def _spread(numbers: Sequence[int]) -> str:
    if not numbers:
        return "–"
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def describe_hardware(trials: Iterable[Trial]) -> list[tuple[str, int]]:
    """Devices, precision and versions, each with the number of records made so; the most common first."""
    counts = Counter(_place(trial.record.provenance) for trial in trials if trial.record is not None)
    del counts[""]
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _place(provenance: Mapping[str, object]) -> str:
    libraries = provenance.get("libraries")
    versions = libraries.items() if isinstance(libraries, dict) else ()
    threads = provenance.get("threads")
    parts = [
        provenance.get("device"), provenance.get("precision"),
        None if threads is None else f"{clean_value(threads)} thread{'s' * (threads != 1)}",
        provenance.get("cuda") and f"CUDA {clean_value(provenance['cuda'])}",
        provenance.get("python") and f"Python {clean_value(provenance['python'])}",
        *(f"{name} {clean_value(version)}" for name, version in versions if name in ("torch", "torchvision", "numpy")),
    ]  # fmt: skip
    return clean_line(" · ".join(clean_value(part) for part in parts if part), 200)


def describe_best(rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    """For each metric who is best among the competing defenses, how often, and with which numbers: title and text."""
    ranks, _ = rank_rows(rows, PRAISED)
    for metric in (METRICS[name] for name in PRAISED):
        groups: dict[object, list[Row]] = defaultdict(list)
        for row in rows:
            if (id(row), metric.name) in ranks:
                groups[row.rest].append(row)
        wins = Counter(name for g in groups.values() for name in {r.defense for r in _ranked(g, ranks, metric, "best")})
        if wins:
            yield metric.heading, _praise(rows, metric, wins, len(groups), _count_close(groups, ranks, metric))


def _ranked(group: Iterable[Row], ranks: Mapping[tuple[int, str], str], metric: Metric, rank: str) -> list[Row]:
    return [row for row in group if ranks.get((id(row), metric.name)) == rank]


def _count_close(groups: Mapping[object, list[Row]], ranks: Mapping[tuple[int, str], str], metric: Metric) -> int:
    return sum(bool(_ranked(group, ranks, metric, "close")) for group in groups.values())


def _praise(rows: Sequence[Row], metric: Metric, wins: Counter[str], groups: int, close: int) -> str:
    top = max(wins.values())
    names = [name for name, count in wins.items() if count == top]
    word = "lowest" if metric.better == "lower" else "highest"
    verb = "is" if len(names) == 1 else "are"
    where = "" if groups == 1 else f" in {top} of {groups} combinations{' each' * (len(names) > 1)}"
    text = f"{_join(names)} {verb} {word}{where}"
    own = [row for row in rows if row.defense == names[0] and finite(getattr(row, metric.name)) is not None]
    own.sort(key=lambda row: getattr(row, metric.name), reverse=metric.better == "higher")
    text += f": {_number(own[0], metric)}" if len(own) == 1 else ""
    if len(own) > 1:
        axes = [axis for axis in AXES if axis != "defense" and len({getattr(row, axis) for row in own}) > 1]
        best, worst = (f"{_number(row, metric)} on {_labels(row, axes)}" for row in (own[0], own[-1]))
        text += f". {_quote(names[0])} goes from {best} to {worst}"
    if close:
        text += (
            f". {'There' if groups == 1 else f'In {close} of {groups}'} another is not distinguishable from the best"
        )
    means, count = mean_ranks(rows, metric)
    if count > 1:
        order = sorted(means, key=lambda name: means[name])[:4]
        shown = ", ".join(f"{_quote(name)} {means[name]:.2g}" for name in order)
        text += f". Mean ranks over {count} combinations that all defenses share: {shown}"
    return text


def _number(row: Row, metric: Metric) -> str:
    unit = " %" if metric.is_share else ""
    text, interval = show_number(getattr(row, metric.name), metric) + unit, row.intervals.get(metric.name)
    if interval is None:
        return text
    return f"{text} (95 %: {show_number(interval.low, metric)} to {show_number(interval.high, metric)})"


def _labels(row: Row, axes: Iterable[str]) -> str:
    return " · ".join(clean_line(getattr(row, axis), LABEL) for axis in axes)


def _join(names: Sequence[str]) -> str:
    shown = [_quote(name) for name in names]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def _quote(name: str) -> str:
    return f"'{clean_line(name, LABEL)}'"


def describe_cautions(source: Source) -> Iterator[str]:
    """What to beware of."""
    rows = source.rows
    counts = Counter(len(row.seeds) for row in rows if row.seeds)
    if counts[1]:
        yield (
            f"{counts[1]:,} of {sum(counts.values()):,} combinations rest on one seed: nothing can be tested there, "
            "and intervals are over test images alone"
        )
    if oracles := _defenses(row for row in rows if row.sees_ground_truth):
        yield f"{_join(oracles)}: told which samples are poisoned; an upper bound that does not compete"
    granted: dict[float, list[str]] = defaultdict(list)
    for row in rows:
        if row.clean_fraction and not row.sees_ground_truth and row.defense not in granted[row.clean_fraction]:
            granted[row.clean_fraction].append(row.defense)
    for share, names in granted.items():
        if names:
            yield f"{_join(names)}: given {100 * share:g} % of the training set as clean data, which others do without"
    weak = [row for row in rows if row.is_baseline and row.asr is not None and row.asr < WORKS]
    if weak:
        where = ", ".join(dict.fromkeys(clean_line(row.attack, LABEL) for row in weak))
        yield (
            f"In {len(weak)} combination{'s' * (len(weak) > 1)} the attack fails without any defense (ASR of "
            f"no_defense below {100 * WORKS:g} %): a low ASR is no merit there ({clean_line(where, 300)})"
        )
    places = describe_hardware(source.trials)
    if len(places) > 1:
        yield f"Made in {len(places)} different settings of hardware and software: seconds and costs are not comparable"
    if not any(row.is_baseline for row in rows):
        yield "no_defense is not among the cells: there is no DER, and nothing to see a defense's effect by"


def _defenses(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(row.defense for row in rows))


def group_failures(source: Source) -> list[Group]:
    """Cells without numbers, by status and reason."""
    found: dict[tuple[str, str], dict[int, list[Trial]]] = defaultdict(lambda: defaultdict(list))
    for index, trials in enumerate(source.groups):
        for trial in trials:
            if trial.status != "done":
                reason = clean_line(trial.reason or "no reason given")
                found[trial.status, reason][index].append(trial)
    groups = []
    axes = [axis for axis in AXES if len({getattr(row, axis) for row in source.rows}) > 1] or ["attack", "defense"]
    for (status, reason), by_row in found.items():
        rows = [
            (index, _labels(source.rows[index], axes), _seeds(trials, source.groups[index]))
            for index, trials in by_row.items()
        ]
        groups.append(Group(status, reason, rows, sum(map(len, by_row.values()))))
    return sorted(groups, key=lambda group: (STATUSES.index(group.status), -group.count))


def _seeds(trials: Sequence[Trial], group: Sequence[Trial]) -> str:
    """The seeds, unless they are all of the row's."""
    return "" if len(trials) == len(group) else f"seed {', '.join(str(trial.seed) for trial in trials)}"
