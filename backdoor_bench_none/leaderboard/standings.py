"""The standings of a track: an entry for each submission, with claimed, submitted and verified numbers apart."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from backdoor_bench_none.contracts.record import Record
from backdoor_bench_none.errors import BenchError
from backdoor_bench_none.leaderboard.submission import (
    MANIFEST,
    Submission,
    hash_file,
    open_submission,
    read_json,
    read_submission,
)
from backdoor_bench_none.leaderboard.verification import Verification, verification_path
from backdoor_bench_none.maths.statistics import Spread, compare_paired, rank_with_ties, spread_over_seeds
from backdoor_bench_none.results.measurement import Measurement
from backdoor_bench_none.results.metrics import METRICS
from backdoor_bench_none.results.rows import Row, rows_of_measurements

#: the distribution whose no_defense is the baseline of a track
OWN = "backdoor-bench-none"
#: the metrics of a standing, in its order; ranks are by the first
SCORED = ("der", "asr", "ba", "ra", "cost_ratio")


@dataclass
class Entry:
    """One submission of a track.

    `submitted` and `verified` are spreads over seeds of the means over attacked cells; `verified` rests on the counts
    that a verifier computed from the weights. `rank` is by the mean of DER.
    """

    submission: Submission
    records: Mapping[str, Record]
    verification: Verification | None
    #: the hash of its manifest
    sha256: str
    submitted: dict[str, Spread] = field(default_factory=dict)
    verified: dict[str, Spread] = field(default_factory=dict)
    clean_ba: Spread | None = None
    rank: float | None = None
    #: whether it is not distinguishable from the best of its track; None if that cannot be tested
    is_close: bool | None = None
    rows: list[Row] = field(default_factory=list)

    @property
    def slug(self) -> str:
        """The name of its page, which is unique: it ends in part of the manifest's hash."""
        parts = (self.submission.defense.name, self.submission.source.distribution, self.submission.source.version)
        words = re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")[:60]
        return f"{words}-{self.sha256[:8]}"

    @property
    def status(self) -> str:
        """`unverified`, or the verdict of the verification."""
        return "unverified" if self.verification is None else self.verification.verdict

    @property
    def competes(self) -> bool:
        """Whether it is ranked: its models were evaluated by a verifier, and it is no baseline and no oracle."""
        baseline = self.submission.defense.name == "no_defense"
        return not baseline and not self.submission.sees_ground_truth and self.status in ("verified", "reevaluated")


@dataclass(frozen=True)
class Refused:
    """A submission that is not listed, and the reason."""

    name: str
    reason: str


def find_submissions(paths: Sequence[Path]) -> list[Path]:
    """The submissions at or below `paths`: folders with submission.json, and zip archives."""
    submissions: list[Path] = []
    for path in paths:
        if path.is_file() or (path / MANIFEST).is_file():
            submissions.append(path)
        else:
            submissions += sorted({*(p.parent for p in path.rglob(MANIFEST)), *path.rglob("*.zip")})
    return submissions


def read_entries(paths: Sequence[Path], verifications: Path) -> tuple[list[Entry], list[Refused]]:
    """All submissions that can be read, each with its verification from the folder `verifications`; and the others."""
    entries: list[Entry] = []
    refused: list[Refused] = []
    for path in find_submissions(paths):
        try:
            with open_submission(path) as folder:
                submission, records = read_submission(folder)
                sha256 = hash_file(folder / MANIFEST)
        except (BenchError, OSError) as error:
            refused.append(Refused(path.name, str(error).partition("\n")[0]))
            continue
        if any(entry.sha256 == sha256 for entry in entries):
            refused.append(Refused(path.name, "the same submission is listed already"))
            continue
        verification = read_verification(verification_path(verifications, sha256), sha256)
        entries.append(Entry(submission, records, verification, sha256))
    return entries, refused


def read_verification(path: Path, submission_sha256: str) -> Verification | None:
    """The verification in a file; None unless it is a readable one of the submission with this hash."""
    if not path.is_file() or path.is_symlink():
        return None
    try:
        verification = Verification.model_validate(read_json(path))
    except (ValidationError, BenchError):
        return None
    return verification if verification.submission_sha256 == submission_sha256 else None


def rank_entries(entries: Sequence[Entry]) -> list[Entry]:
    """Score the entries of one track against the submitted baseline, and sort them by rank."""
    submitted = _rows_as_submitted(entries)
    verified = _rows_as_verified(entries)
    for entry, rows, verified_rows in zip(entries, submitted, verified, strict=True):
        entry.rows = rows
        entry.submitted = _score(rows)
        entry.verified = _score(verified_rows)
        entry.verified.pop("cost_ratio", None)  # seconds are those of the submitter's machine
        clean = [row for row in rows if row.asr is None and row.ba is not None]
        entry.clean_ba = _means_over_seeds(clean, "ba")
    competing = [entry for entry in entries if entry.competes and "der" in entry.submitted]
    ranks = rank_with_ties([_best_known(entry).mean for entry in competing], higher_is_better=True)
    for entry, rank in zip(competing, ranks, strict=True):
        entry.rank = rank
    competing.sort(key=lambda entry: entry.rank or 0.0)
    for entry in competing[1:]:
        entry.is_close = _is_close(competing[0], entry)
    return sorted(entries, key=lambda entry: (entry.rank is None, entry.rank or 0.0, entry.submission.title))


def _best_known(entry: Entry) -> Spread:
    return entry.verified.get("der") or entry.submitted["der"]


def _rows_as_submitted(entries: Sequence[Entry]) -> list[list[Row]]:
    """The rows of each entry, by the counts in its records."""
    return _make_rows(entries, [list(entry.records.values()) for entry in entries])


def _rows_as_verified(entries: Sequence[Entry]) -> list[list[Row]]:
    """The rows of each entry, by the counts that a verifier computed; none for cells that were not evaluated."""
    records: list[list[Record]] = []
    for entry in entries:
        recounted: list[Record] = []
        if entry.verification is not None:
            counts = entry.verification.reevaluated
            recounted = [
                record.model_copy(update={"counts": counts[key]})
                for key, record in entry.records.items()
                if key in counts
            ]
        records.append(recounted)
    return _make_rows(entries, records)


def _make_rows(entries: Sequence[Entry], records: Sequence[Sequence[Record]]) -> list[list[Row]]:
    """The rows of each entry's records, with DER against the no_defense of the track.

    Every entry becomes a defense labelled with its index: two submissions of one defense are then two rows, and only
    the chosen baseline counts as no_defense.
    """
    baseline = choose_baseline(entries)
    measured: list[Measurement] = []
    for index, entry in enumerate(entries):
        name = "no_defense" if entry is baseline else f"entry {index}"
        for record in records[index]:
            axes = dict(record.axes)
            axes["defense"] = axes["defense"].model_copy(update={"label": str(index), "name": name})
            measured.append(Measurement.of(record.model_copy(update={"axes": axes})))
    rows: list[list[Row]] = [[] for _ in entries]
    for row in rows_of_measurements(measured):
        rows[int(row.defense)].append(row)
    return rows


def choose_baseline(entries: Sequence[Entry]) -> Entry | None:
    """The no_defense that all others are measured against: this package's own with the best verification status."""
    order = ("verified", "reevaluated", "unverified")  # a refused one is none
    own = [
        entry
        for entry in entries
        if entry.submission.defense.name == "no_defense"
        and entry.submission.source.distribution == OWN
        and entry.status in order
    ]
    return min(own, key=lambda entry: order.index(entry.status), default=None)


def _score(rows: Sequence[Row]) -> dict[str, Spread]:
    """Spreads over seeds of the means over attacked cells."""
    attacked = [row for row in rows if row.asr is not None]
    spreads = {name: _means_over_seeds(attacked, name) for name in SCORED}
    return {name: spread for name, spread in spreads.items() if spread is not None}


def _means_over_seeds(rows: Sequence[Row], metric: str) -> Spread | None:
    """The spread over seeds of the means over rows; None where no row has a number."""
    by_seed: dict[int, list[float]] = {}
    for row in rows:
        for seed, value in zip(row.seeds, row.per_seed.get(metric, ()), strict=False):
            if value is not None:
                by_seed.setdefault(seed, []).append(value)
    means = [sum(values) / len(values) for _, values in sorted(by_seed.items())]
    if not means:
        return None
    spread = spread_over_seeds(means)
    return replace(spread, interval=spread.interval and METRICS[metric].bound(spread.interval))


def _is_close(best: Entry, other: Entry) -> bool | None:
    """Whether a paired t test over seeds and cells cannot tell the two DERs apart; None where it cannot be made."""
    values: dict[tuple[object, int], list[float | None]] = {}
    for side, entry in enumerate((best, other)):
        for row in entry.rows:
            for seed, value in zip(row.seeds, row.per_seed.get("der", ()), strict=False):
                values.setdefault((row.rest, seed), [None, None])[side] = value
    pairs = [pair for pair in values.values() if None not in pair]
    comparison = compare_paired([float(a or 0) for a, _ in pairs], [float(b or 0) for _, b in pairs])
    if comparison.distinguishable is None:
        return None
    return not comparison.distinguishable


def as_table(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """One flat mapping for each entry, for CSV and JSON: claimed, submitted and verified numbers apart."""
    return [_flat(entry) for entry in entries]


def _flat(entry: Entry) -> dict[str, Any]:
    submission = entry.submission
    line: dict[str, Any] = {
        "rank": entry.rank, "defense": submission.defense.label, "distribution": submission.source.distribution,
        "version": submission.source.version, "status": entry.status, "stage": submission.stage,
        "clean_fraction": submission.clean_fraction, "sees_ground_truth": submission.sees_ground_truth,
        "clean_ba": entry.clean_ba and entry.clean_ba.mean,
    }  # fmt: skip
    for name in SCORED:
        line[f"claimed_{name}"] = submission.claims.get(name)  # type: ignore[call-overload]
        for source in ("submitted", "verified"):
            spread: Spread | None = getattr(entry, source).get(name)
            interval = spread and spread.interval
            line[f"{source}_{name}"] = spread and spread.mean
            line[f"{source}_{name}_low"] = interval and interval.low
            line[f"{source}_{name}_high"] = interval and interval.high
    return line


def show(spread: Spread | None, metric: str) -> str:
    """A mean and its interval, as tables show them."""
    if spread is None:
        return "–"
    facts = METRICS[metric]
    if spread.interval is None:
        return facts.show(spread.mean)
    return f"{facts.show(spread.mean)} [{facts.show(spread.interval.low)}, {facts.show(spread.interval.high)}]"
