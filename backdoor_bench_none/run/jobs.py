"""Jobs: what a worker process is asked to do, and what it answers. They carry keys and JSON values, no tensors."""

from __future__ import annotations

import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

JobKind = Literal["data", "crafter", "backbone", "poison", "benign", "victim", "cell"]
#: told (epochs done, epochs in all)
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Settings:
    """What all jobs of a run share."""

    results: Path
    device: str = "auto"
    timeout: float | None = None
    bbnfile: Path | None = None
    #: bytes that a process may allocate
    memory: int | None = None
    #: whether installed plugins are loaded
    external: bool = True


@dataclass(frozen=True)
class Job:
    """Compute one stage of a cell; for `cell` jobs, its defense,
    evaluation and record. `needs` are the ids of jobs to wait for.
    """

    id: str
    kind: JobKind
    title: str
    spec: Mapping[str, Any]
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """How a job ended."""

    status: Literal["done", "failed", "timeout"]
    error: str = ""
    message: str = ""
    traceback: str | None = None
    warnings: tuple[str, ...] = ()
    #: the kind of the job that ended so; a job that needed it ends with the same
    kind: JobKind | None = None


def run_job(job: Job, settings: Settings, device: str, threads: int | None, progress: Progress) -> Outcome:
    """Do `job` in this process; every error becomes an outcome."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            _do(job, settings, device, threads, progress)
            outcome = Outcome("done")
        except Exception as error:
            outcome = _outcome_of(error)
    return replace(outcome, warnings=_worth_telling(caught), kind=job.kind)


def _do(job: Job, settings: Settings, device: str, threads: int | None, progress: Progress) -> None:
    import torch

    from backdoor_bench_none.cell import Cell
    from backdoor_bench_none.context import Context, choose_amp, choose_device
    from backdoor_bench_none.plugins import Plugins
    from backdoor_bench_none.registry import Registry
    from backdoor_bench_none.results.store import Store
    from backdoor_bench_none.run.provenance import describe
    from backdoor_bench_none.run.stages import Stages

    if threads is not None:
        torch.set_num_threads(threads)
    registry = Registry(Plugins(external=settings.external, bbnfile=settings.bbnfile))
    cell = Cell.from_spec(job.spec, registry)
    chosen = choose_device(device)
    torch.backends.cudnn.benchmark = chosen.type == "cuda"  # batches have one size, so the search pays
    deadline = None if settings.timeout is None else time.monotonic() + settings.timeout
    amp = None if cell.recipe.precision == "float32" else choose_amp(chosen)
    context = Context(chosen, 0, amp, deadline, progress=progress)
    stages = Stages(cell, Store(settings.results), context, describe(cell, context, registry))
    if job.kind != "cell":
        getattr(stages, job.kind)()
        return
    stages.store.write_record(stages.evaluate())


def _outcome_of(error: Exception) -> Outcome:
    from backdoor_bench_none.context import DeadlineError
    from backdoor_bench_none.errors import BenchError

    if isinstance(error, DeadlineError):
        return Outcome("timeout", "DeadlineError", error.message)
    if isinstance(error, BenchError):
        return Outcome("failed", type(error).__name__, str(error).replace("\nhint: ", "; "))
    return Outcome("failed", type(error).__name__, str(error), traceback.format_exc())


def _worth_telling(caught: Iterable[warnings.WarningMessage]) -> tuple[str, ...]:
    """Damaged artifacts; a worker's plugins warn as the parent's did."""
    from backdoor_bench_none.results.store import DamagedArtifactWarning

    return tuple(str(warning.message) for warning in caught if issubclass(warning.category, DamagedArtifactWarning))
