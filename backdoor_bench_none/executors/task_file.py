"""The file of a task, which says what to run, and the file beside it that its node writes reports into."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from backdoor_bench_none.contracts.executor import Event
from backdoor_bench_none.contracts.job import Outcome
from backdoor_bench_none.executors.place import pack_event, unpack_event

#: seconds between two reports of a job's epochs
SELDOM = 10.0


@dataclass
class Task:
    """A task of an array, by its file: what it was given, and what it has reported so far."""

    path: Path
    jobs: tuple[str, ...]
    #: bytes of its reports that were read
    read: int = 0
    ended: dict[str, Outcome] = field(default_factory=dict)
    #: how often each job has begun
    begun: Counter[str] = field(default_factory=Counter)
    #: when it was first seen to be in the queue no longer, in seconds of `time.monotonic`
    gone_since: float | None = None

    @classmethod
    def of(cls, path: Path) -> Task:
        """The task of a file."""
        return cls(path, tuple(job["id"] for job in json.loads(path.read_bytes())["jobs"]))

    @property
    def is_over(self) -> bool:
        """Whether all its jobs have ended."""
        return self.ended.keys() >= set(self.jobs)

    def read_events(self) -> list[Event]:
        """What it has reported since the last call."""
        try:
            with self.path.with_suffix(".jsonl").open("rb") as file:
                file.seek(self.read)
                text = file.read()
        except FileNotFoundError:
            return []
        whole = text[: text.rfind(b"\n") + 1]  # the last line may still be written
        self.read += len(whole)
        events = [unpack_event(json.loads(line)) for line in whole.splitlines()]
        self.begun.update(event.job for event in events if event.outcome is None and not event.total)
        self.ended |= {event.job: event.outcome for event in events if event.outcome is not None}
        return events


class Reports:
    """A file of events, one JSON line each, which the run reads as it grows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._last: dict[str, float] = {}

    def write(self, event: Event) -> None:
        """Append an event; epochs of a job that was reported on a moment ago are left out."""
        now = time.monotonic()
        if event.outcome is None and event.total and now < self._last.get(event.job, -SELDOM) + SELDOM:
            return
        self._last[event.job] = now
        with self.path.open("a") as file:
            file.write(json.dumps(pack_event(event)) + "\n")
