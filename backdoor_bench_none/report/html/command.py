"""Command lines that run one row of a report again."""

from __future__ import annotations

import itertools
import keyword
import math
import re
import shlex
from collections import defaultdict
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from backdoor_bench_none.contracts.cell import AXES
from backdoor_bench_none.report.html.source import Trial
from backdoor_bench_none.results.rows import Labels

OPTIONS = {"dataset": "--dataset", "attack": "-a", "defense": "-d", "architecture": "-m", "activation": "--activation"}
IDENTIFIER = re.compile(r"[A-Za-z_]\w*", re.ASCII)


class Commands:
    """Makes the commands of rows.

    A command whose options would select other rows of `trials` too is narrowed by -k.
    """

    def __init__(self, trials: Sequence[Trial], file: Path | None) -> None:
        self._file = str(file or "benchmark.yaml")
        if self._file.startswith("-"):  # it would be taken for an option
            self._file = f"./{self._file}"
        self._titles: dict[Labels, set[str]] = defaultdict(set)
        self._known: list[dict[str, set[str]]] = [defaultdict(set) for _ in AXES]
        for trial in trials:
            self._titles[trial.labels].add(trial.title)
            for known, label, name in zip(self._known, trial.labels, trial.names, strict=True):
                known[label].add(name)

    def of(self, trials: Sequence[Trial]) -> tuple[str, list[str]]:
        """The command for the trials of one row, into a separate folder, and the titles of other cells it runs too."""
        labels = trials[0].labels
        words = ["bbn", "run", self._file]
        for axis, label in zip(AXES, labels, strict=True):
            if axis in OPTIONS:
                words += [OPTIONS[axis], _pattern(label)]
        for seed in sorted({trial.seed for trial in trials}):
            words += ["-s", str(seed)]
        others: list[str] = []
        for rival in self._rivals(labels):
            others += sorted(self._titles[rival])  # a set of texts has no stable order
        expression, left = _tell_apart(self._titles[labels], others)
        if expression:
            words += ["-k", expression]
        return shlex.join([*words, "--results", "reproduced"]), left

    def _rivals(self, labels: Labels) -> Iterable[Labels]:
        """The other rows that the options select as well: options match labels, names and wildcards, on any trainer."""
        similar = []
        for axis, known, label in zip(AXES, self._known, labels, strict=True):
            selected = set(known)
            if axis in OPTIONS:
                selected = {other for other in known if _selects(label, {other, *known[other]})}
            similar.append(selected)
        rivals: Iterable[Labels] = itertools.product(*similar)
        if math.prod(map(len, similar)) > len(self._titles):  # labels with wildcards, or a large matrix
            rivals = (row for row in self._titles if _is_among(row, similar))
        return [rival for rival in rivals if rival != labels and rival in self._titles]


def _is_among(labels: Labels, choices: Sequence[set[str]]) -> bool:
    return all(label in chosen for label, chosen in zip(labels, choices, strict=True))


def _selects(label: str, names: Iterable[str]) -> bool:
    pattern = _pattern(label).replace("[", "[[]")
    return any(fnmatchcase(name, pattern) for name in names)


def _pattern(label: str) -> str:
    """A label as an option; characters that cannot be pasted into a terminal become wildcards."""
    return "".join(map(_printable, label))


def _printable(character: str) -> str:
    return character if character.isprintable() else "?"


def _tell_apart(own: set[str], others: Sequence[str]) -> tuple[str, list[str]]:
    """An expression that holds for all `own` titles and, if possible, for no others; and the others it holds for."""
    words: list[str] = []
    left = list(others)
    own_text = "\n".join(own)  # a name has no line break, so it is in this text if it is in any title
    common = set[str].intersection(*(set(_names(title)) for title in own))
    for title in others:
        if title not in left:
            continue
        foreign = next((name for name in _names(title) if name not in own_text), None)
        if foreign is not None:
            words.append(f"not {foreign}")
            left = [other for other in left if foreign not in other]
            continue
        shared = next((name for name in sorted(common) if name not in title), None)
        if shared is not None:
            words.append(shared)
            left = [other for other in left if shared in other]
    return " and ".join(words), left


def _names(title: str) -> list[str]:
    return [name for name in IDENTIFIER.findall(title) if not keyword.iskeyword(name)]
