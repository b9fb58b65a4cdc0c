"""Runs a job in this process."""

from __future__ import annotations

import time
import traceback
import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from backdoor_bench_none.contracts.job import CELL, Job, Outcome, Progress, Settings
from backdoor_bench_none.words import LONGEST_TEXT, shorten, text_of, visible

if TYPE_CHECKING:
    from backdoor_bench_none.results.store import Artifact

#: bytes of a GPU that a process has beside those that torch manages: its CUDA context, roughly
CONTEXT = 600 * 2**20


def run_job(
    job: Job, settings: Settings, device: str, threads: int | None, progress: Progress,
    kept: dict[str, Artifact] | None = None,
) -> Outcome:  # fmt: skip
    """Run `job` in this process; every error becomes an outcome.

    `kept` holds the artifacts of the job before it in this process, and is left with what the next one may use.
    """
    memory = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            memory = _run(job, settings, device, threads, progress, {} if kept is None else kept)
            outcome = Outcome("done")
        except BaseException as error:  # third-party code may raise anything
            outcome = _outcome_of(error)
    return replace(outcome, warnings=_damage_reports(caught), kind=job.kind, device_memory=memory)


def _run(
    job: Job, settings: Settings, device: str, threads: int | None, progress: Progress, kept: dict[str, Artifact]
) -> int | None:
    """Run a job; the bytes of its GPU that this process has then."""
    import torch

    from backdoor_bench_none.contracts.context import Context, choose_amp, choose_device
    from backdoor_bench_none.planning.choices import cell_from_spec
    from backdoor_bench_none.registry.components import Registry
    from backdoor_bench_none.registry.plugins import Plugins
    from backdoor_bench_none.results.store import Store
    from backdoor_bench_none.run.devices import prepare_device
    from backdoor_bench_none.run.isolation import isolated
    from backdoor_bench_none.run.provenance import describe
    from backdoor_bench_none.run.stages import Stages

    if threads is not None:
        torch.set_num_threads(threads)
    store = Store(settings.results.absolute())
    with isolated("a plugin"):
        registry = Registry(Plugins(external=settings.external, bbnfile=settings.bbnfile, disabled=settings.disabled))
        cell = cell_from_spec(job.spec, registry)
    chosen = choose_device(device)
    prepare_device(chosen, settings.memory)
    deadline, amp = None, None
    if settings.timeout is not None:
        deadline = time.monotonic() + settings.timeout
    if cell.recipe.precision != "float32":
        amp = choose_amp(chosen)
    context = Context(chosen, 0, amp, deadline, progress=progress)
    stages = Stages(cell, store, context, describe(cell, context, registry), kept=kept)
    if job.kind == CELL:
        stages.store.write_record(stages.evaluate())
    else:
        stages.run(job.kind)
    if chosen.type != "cuda":
        return None
    return CONTEXT + torch.cuda.memory_reserved(chosen)


def _outcome_of(error: BaseException) -> Outcome:
    from backdoor_bench_none.errors import BenchError, DeadlineError

    name, message = visible(type(error).__name__), text_of(error)
    if isinstance(error, DeadlineError):
        return Outcome("timeout", "DeadlineError", error.message)
    if isinstance(error, BenchError):
        return Outcome("failed", name, message.replace("\nhint: ", "; "))
    if isinstance(error, MemoryError) and not message:
        message = "no memory is left within budget.memory"
    return Outcome("failed", name, message, shorten(visible(traceback.format_exc()), LONGEST_TEXT))


def _damage_reports(caught: Iterable[warnings.WarningMessage]) -> tuple[str, ...]:
    """The warnings of damaged artifacts; others, such as those of broken plugins, the parent has shown already."""
    from backdoor_bench_none.results.store import DamagedArtifactWarning

    return tuple(str(warning.message) for warning in caught if issubclass(warning.category, DamagedArtifactWarning))
