"""Shows a run: progress bars on a terminal, one line per finished cell elsewhere."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from backdoor_bench_none.contracts.executor import Event
from backdoor_bench_none.contracts.job import CELL, Job, Outcome
from backdoor_bench_none.contracts.record import Record
from backdoor_bench_none.planning.stage_table import in_order
from backdoor_bench_none.run.runner import Reporter
from backdoor_bench_none.words import plural, wrap


def name_of_kind(kind: str) -> str:
    """The name of a kind of job in messages."""
    return "defense" if kind == CELL else kind


class Lines(Reporter):
    """One line per finished cell; only failures if `quiet`."""

    def __init__(self, console: Console, quiet: bool = False) -> None:
        self.console = console
        self.quiet = quiet
        self._left = 0

    def start(self, name: str, jobs: list[Job], cached: int, skipped: int) -> None:
        """See `Reporter`."""
        self._left = [job.kind for job in jobs].count(CELL)
        if not self.quiet:
            self._print(f"{name}: {plural('cell', self._left)} to run, {cached} done before, {skipped} skipped")

    def job_started(self, job: Job) -> None:
        """Nothing to show."""

    def job_progress(self, event: Event) -> None:
        """Nothing to show."""

    def job_finished(self, job: Job, outcome: Outcome) -> None:
        """Nothing to show."""

    def cell_finished(self, record: Record) -> None:
        """See `Reporter`."""
        self._left -= 1
        if not self.quiet or record.status != "done":
            self._print(describe_record(record) + f"  ({self._left} left)")

    def note(self, text: str) -> None:
        """See `Reporter`."""
        self._print(text)

    def stop(self) -> None:
        """Nothing to show."""

    def _print(self, text: str) -> None:
        self.console.print(wrap(text), markup=False, highlight=False, soft_wrap=True)


class Bars(Lines):
    """One bar per kind of job, and one for each running job."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._progress = Progress(TextColumn("{task.description}"), *columns, console=console, transient=True)
        self._bars: dict[str, TaskID] = {}
        self._jobs: dict[str, TaskID] = {}

    def start(self, name: str, jobs: list[Job], cached: int, skipped: int) -> None:
        """See `Reporter`."""
        super().start(name, jobs, cached, skipped)
        kinds = [job.kind for job in jobs]
        for kind in (*in_order(set(kinds) - {CELL}), CELL):
            if kind in kinds:
                self._bars[kind] = self._progress.add_task(name_of_kind(kind), total=kinds.count(kind))
        self._progress.start()

    def job_started(self, job: Job) -> None:
        """See `Reporter`."""
        self._jobs[job.id] = self._progress.add_task(f"  [dim]{name_of_kind(job.kind)} {job.title}", total=None)

    def job_progress(self, event: Event) -> None:
        """See `Reporter`."""
        self._progress.update(self._jobs[event.job], completed=event.done, total=event.total)

    def job_finished(self, job: Job, outcome: Outcome) -> None:
        """See `Reporter`."""
        if job.id in self._jobs:
            self._progress.remove_task(self._jobs.pop(job.id))
        self._progress.advance(self._bars[job.kind])

    def stop(self) -> None:
        """See `Reporter`."""
        self._progress.stop()


def describe_record(record: Record) -> str:
    """How a cell ended, in one line."""
    if record.counts is None:
        return f"{record.status.upper():7} {record.key}  {record.title} - {record.reason}"
    counts = record.counts
    parts = [f"BA {counts.benign_accuracy.rate:.3f}"]
    if counts.attack_success_rate is not None:
        parts.append(f"ASR {counts.attack_success_rate.rate:.3f}")
    if record.detection is not None and record.detection.tpr is not None and record.detection.fpr is not None:
        parts.append(f"TPR {record.detection.tpr:.3f} FPR {record.detection.fpr:.3f}")
    parts.append(f"{record.costs['defense'].seconds:.1f} s")
    return f"done    {record.key}  {record.title}  {'  '.join(parts)}"
