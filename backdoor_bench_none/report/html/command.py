"""The command line that runs one row of a report again, and nothing else."""

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
    """Makes the commands of rows; all `trials` are known, so that one that selects others too is narrowed by -k."""

    def __init__(self, trials: Sequence[Trial], file: Path | None) -> None:
        self._file = str(file or "benchmark.yaml")
        self._titles: dict[Labels, set[str]] = defaultdict(set)
        self._known: list[dict[str, set[str]]] = [defaultdict(set) for _ in AXES]
        for trial in trials:
            self._titles[trial.labels].add(trial.title)
            for known, label, name in zip(self._known, trial.labels, trial.names, strict=True):
                known[label].add(name)

    def of(self, trials: Sequence[Trial]) -> tuple[str, list[str]]:
        """The command for the trials of one row, into a folder of its own, and titles it selects besides them."""
        labels, seeds = trials[0].labels, sorted({trial.seed for trial in trials})
        words = ["bbn", "run", f"./{self._file}" if self._file.startswith("-") else self._file]
        for axis, label in zip(AXES, labels, strict=True):
            words += [OPTIONS[axis], _pattern(label)] if axis in OPTIONS else []
        words += [word for seed in seeds for word in ("-s", str(seed))]
        others = [title for rival in self._rivals(labels) for title in self._titles[rival]]
        expression, left = _tell_apart(self._titles[labels], others)
        words += ["-k", expression] if expression else []
        return shlex.join([*words, "--results", "reproduced"]), left

    def _rivals(self, labels: Labels) -> Iterable[Labels]:
        """Other rows that the options select as well: theirs match labels, names and wildcards, and no trainer."""
        similar = []
        for axis, known, label in zip(AXES, self._known, labels, strict=True):
            selected = set(known) if axis not in OPTIONS else {x for x in known if _selects(label, {x, *known[x]})}
            similar.append(selected)
        found: Iterable[Labels] = itertools.product(*similar)
        if math.prod(map(len, similar)) > len(self._titles):  # labels that are wildcards
            found = (r for r in self._titles if all(x in chosen for x, chosen in zip(r, similar, strict=True)))
        return [rival for rival in found if rival != labels and rival in self._titles]


def _selects(label: str, names: Iterable[str]) -> bool:
    pattern = _pattern(label).replace("[", "[[]")
    return any(fnmatchcase(name, pattern) for name in names)


def _pattern(label: str) -> str:
    """A label as an option; what cannot be pasted into a terminal becomes a wildcard."""
    return "".join(c if c.isprintable() else "?" for c in label)


def _tell_apart(own: set[str], others: Sequence[str]) -> tuple[str, list[str]]:
    """An expression that holds for all `own` titles and for none of the others, and the others it holds for."""
    words: list[str] = []
    left = list(others)
    for title in others:
        if title not in left:
            continue
        against = next((name for name in _names(title) if not any(name in mine for mine in own)), None)
        if against is not None:
            words.append(f"not {against}")
            left = [other for other in left if against not in other]
            continue
        common = set[str].intersection(*(set(_names(mine)) for mine in own))
        if (only := next((name for name in sorted(common) if name not in title), None)) is not None:
            words.append(only)
            left = [other for other in left if only in other]
    return " and ".join(words), left


def _names(title: str) -> list[str]:
    return [name for name in IDENTIFIER.findall(title) if not keyword.iskeyword(name)]
