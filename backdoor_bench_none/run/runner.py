"""Runs a plan: chooses the cells to run, packs them into jobs, and writes a record for every cell that ended."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Literal, Protocol

from backdoor_bench_none.contracts.cell import Cell
from backdoor_bench_none.contracts.executor import Event, Executor
from backdoor_bench_none.contracts.job import CELL, Job, Outcome, Settings
from backdoor_bench_none.contracts.record import Failure, Record
from backdoor_bench_none.planning.plan import Plan
from backdoor_bench_none.planning.stage_table import artifact_keys, find_stage, record_key, stage_keys, uses_device
from backdoor_bench_none.registry.components import Registry
from backdoor_bench_none.results.index import read_measurements
from backdoor_bench_none.results.store import Store
from backdoor_bench_none.run.blame import name_suspects
from backdoor_bench_none.run.provenance import name_providers
from backdoor_bench_none.run.scheduler import Scheduler
from backdoor_bench_none.words import LONGEST_LINE, shorten

#: which cells to run: those without results, those that failed, or all again
Only = Literal["missing", "failed", "all"]


@dataclass(frozen=True)
class Options:
    """The options of a run."""

    results: Path
    device: str = "auto"
    slots: int | None = None
    only: Only = "missing"
    max_failures: int | None = None


class Reporter(Protocol):
    """Shows the course of a run."""

    def start(self, name: str, jobs: list[Job], cached: int, skipped: int) -> None:
        """The run begins; `cached` cells have their results already."""

    def job_started(self, job: Job) -> None:
        """A job begins."""

    def job_progress(self, event: Event) -> None:
        """A job has finished some of its epochs."""

    def job_finished(self, job: Job, outcome: Outcome) -> None:
        """A job ended."""

    def cell_finished(self, record: Record) -> None:
        """A cell has its record."""

    def note(self, text: str) -> None:
        """Show a message."""

    def stop(self) -> None:
        """The run ended, in whatever way."""


@dataclass
class Summary:
    """How a run ended."""

    done: int = 0
    cached: int = 0
    skipped: int = 0
    not_run: int = 0
    failed: list[Record] = field(default_factory=list)
    seconds: float = 0.0
    interrupted: bool = False


def run_plan(plan: Plan, registry: Registry, options: Options, reporter: Reporter) -> Summary:
    """Run the cells of `plan` that `options` choose and return how the run ended; records are in the results folder."""
    store = Store(options.results)
    store.create()
    started = time.monotonic()
    todo = [cell for cell in choose_cells(plan, store, options.only) if record_key(cell) not in plan.skipped]
    skipped = [cell for cell in plan.cells if record_key(cell) in plan.skipped]
    summary = Summary(skipped=len(skipped))
    if options.only != "all":
        summary.cached = count_done(plan, store)
    for cell in skipped:
        _record_skip(store, cell, plan.skipped[record_key(cell)], registry)
    if options.only == "all":
        _forget(store, todo)
    jobs = pack_jobs(todo, store)
    executor = _executor(plan, registry, options)
    executor.check()
    budget = plan.config.budget
    plugins = registry.plugins
    settings = Settings(
        options.results, options.device, budget.cell_timeout, plugins.bbnfile, budget.memory, plugins.external,
        plugins.disabled,
    )  # fmt: skip
    reporter.start(plan.config.name, jobs, summary.cached, summary.skipped)
    try:
        with executor.open(settings) as pool, _count_interrupts(reporter, executor) as interrupts:
            scheduler = Scheduler(
                executor.group(jobs), pool, reporter.job_progress, reporter.job_started,
                finishes_running=not executor.outlives_run,
            )  # fmt: skip
            cells = {record_key(cell): cell for cell in todo}

            def keep_going() -> bool:
                return not interrupts and (options.max_failures is None or len(summary.failed) < options.max_failures)

            for job, outcome in scheduler.run(keep_going):
                _report(reporter, job, outcome)
                if job.kind == CELL:
                    _finish(cells[job.id.partition(":")[2]], outcome, store, registry, reporter, summary)
            summary.interrupted = bool(interrupts)
            if interrupts and executor.outlives_run:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        summary.interrupted = True
    finally:
        reporter.stop()
    summary.not_run = len(todo) - summary.done - len(summary.failed)
    summary.seconds = time.monotonic() - started
    return summary


def choose_cells(plan: Plan, store: Store, only: Only) -> list[Cell]:
    """The cells to run. A failed cell counts as missing."""
    if only == "all":
        return plan.cells
    statuses = read_statuses(store)
    cells = [(cell, statuses.get(record_key(cell))) for cell in plan.cells]
    if only == "failed":
        return [cell for cell, status in cells if status in ("failed", "timeout")]
    return [cell for cell, status in cells if status != "done"]


def read_statuses(store: Store) -> dict[str, str]:
    """How the cells ended that have a record, by key."""
    return {measured.key: measured.status for measured in read_measurements(store.root)}


def count_done(plan: Plan, store: Store) -> int:
    """The number of cells of the plan that have results."""
    statuses, keys = read_statuses(store), map(record_key, plan.cells)
    return [statuses.get(key) for key in keys if key not in plan.skipped].count("done")


def find_missing_stages(cells: list[Cell], store: Store) -> dict[str, str]:
    """The names of the shared stages without an artifact, by the id of the job that computes it."""
    made: dict[str, set[str]] = {}
    missing: dict[str, str] = {}
    for cell in cells:
        for name, key in stage_keys(cell).items():
            stage = find_stage(name)
            if not stage.shared:
                continue
            folder = str(stage.folder)
            if folder not in made:
                made[folder] = store.artifact_keys(folder)
            if key not in made[folder]:
                missing.setdefault(f"{folder}:{key}", name)
    return missing


def pack_jobs(cells: list[Cell], store: Store) -> list[Job]:
    """One job per cell and one per shared stage without an artifact, each before the jobs that need it."""
    jobs: dict[str, Job] = {}
    missing = find_missing_stages(cells, store)
    for cell in cells:
        ids, spec, title = _job_ids(cell), cell.spec(), cell.title
        needs: list[str] = []
        for name, job_id in ids.items():
            stage = find_stage(name)
            needed = [ids[need] for need in stage.needs(cell) if need in ids]
            if not stage.shared:
                needs += needed
            elif job_id in missing and job_id not in jobs:
                waits_for = tuple(need for need in needed if need in jobs)
                jobs[job_id] = Job(job_id, name, title, spec, waits_for, uses_device(cell, name))
        job_id, waits_for = f"{CELL}:{record_key(cell)}", tuple(need for need in dict.fromkeys(needs) if need in jobs)
        jobs[job_id] = Job(job_id, CELL, title, spec, waits_for)
    return list(jobs.values())


def _job_ids(cell: Cell) -> dict[str, str]:
    """The ids of the jobs of a cell's stages, by the name of the stage.

    They are equal for stages with the same artifact: the benign network of one cell is the victim of another.
    """
    return {name: f"{find_stage(name).folder}:{key}" for name, key in stage_keys(cell).items()}


def _executor(plan: Plan, registry: Registry, options: Options) -> Executor:
    entry = plan.config.executor
    params = dict(entry.params)
    if options.slots is not None:
        params["slots"] = options.slots
    return registry.create_as(Executor, entry.name, params)


def _forget(store: Store, cells: list[Cell]) -> None:
    """Remove the artifacts of `cells`, so that everything is computed again; decoded data sets are kept."""
    for cell in cells:
        for name, key in artifact_keys(cell).items():
            path = store.find_artifact(str(find_stage(name).folder), key)
            if path is not None and name != "data":
                path.unlink(missing_ok=True)


def _finish(
    cell: Cell, outcome: Outcome, store: Store, registry: Registry, reporter: Reporter, summary: Summary
) -> None:
    record = None
    if outcome.status == "done":
        record = store.read_record(record_key(cell))
    if record is not None:
        summary.done += 1
    else:
        record = _failure_record(cell, outcome, registry)
        store.write_record(record)
        summary.failed.append(record)
    reporter.cell_finished(record)
    registry.plugins.cell_finished(cell, record)


def _failure_record(cell: Cell, outcome: Outcome, registry: Registry) -> Record:
    """The record of a cell without results: the first line of the error, and the components that may have caused it."""
    status: Literal["failed", "timeout"] = "timeout" if outcome.status == "timeout" else "failed"
    reason = outcome.message
    if outcome.traceback:
        reason = f"{outcome.error}: {outcome.message or 'without a message'}"
    first_line = next(iter((reason or status).splitlines()), status)
    reasons = [shorten(first_line, LONGEST_LINE), *name_suspects(cell, outcome, registry)]
    return Record.of(
        cell, record_key(cell), status, reason="; ".join(reasons),
        failure=Failure(type=outcome.error, message=outcome.message, traceback=outcome.traceback),
        provenance={"providers": name_providers(cell, registry)},
    )  # fmt: skip


def _record_skip(store: Store, cell: Cell, reason: str, registry: Registry) -> None:
    record = Record.of(cell, record_key(cell), "skipped", reason=reason)
    before = store.read_record(record_key(cell))
    if before != record and (before is None or before.status != "done"):
        store.write_record(record)
        registry.plugins.cell_finished(cell, record)


def _report(reporter: Reporter, job: Job, outcome: Outcome) -> None:
    reporter.job_finished(job, outcome)
    for text in outcome.warnings:
        reporter.note(text)


@contextmanager
def _count_interrupts(reporter: Reporter, executor: Executor) -> Iterator[list[int]]:
    """Yield a list that grows with every Ctrl-C; the second one raises `KeyboardInterrupt`."""
    received: list[int] = []
    stopping = "running stages are finished and kept; Ctrl-C again stops at once"
    if executor.outlives_run:
        stopping = "what is queued or runs goes on, and `bbn run` comes back to it"

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt
        reporter.note(f"stopping: {stopping}")

    try:
        before = signal.signal(signal.SIGINT, receive)
    except ValueError:  # not in the main thread, where the caller has another way to stop
        yield received
        return
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, before)
