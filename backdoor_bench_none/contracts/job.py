"""Jobs: what a worker process is asked to do, and what it answers. They carry keys and JSON values, no tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

#: the kind of the job that computes what a cell does not share, and writes its record
CELL = "cell"
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
    """Compute one stage of a cell; a job of kind `CELL` computes everything that the cell does not share. `needs` are
    the ids of jobs to wait for.
    """

    id: str
    #: the name of a stage, or `CELL`
    kind: str
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
    kind: str | None = None
