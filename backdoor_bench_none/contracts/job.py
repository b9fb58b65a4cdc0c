"""Jobs for worker processes and their outcomes; they carry keys and JSON values, no tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

#: the kind of the job that computes the stages a cell does not share, and writes its record
CELL = "cell"
#: called with (epochs done, total epochs)
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
    #: plugins and distributions that are left out; None: those of `BBN_DISABLE_PLUGINS`
    disabled: frozenset[str] | None = None

    def absolute(self) -> Settings:
        """The same with absolute paths, for processes with another working directory."""
        bbnfile = None if self.bbnfile is None else self.bbnfile.absolute()
        return replace(self, results=self.results.absolute(), bbnfile=bbnfile)


@dataclass(frozen=True)
class Job:
    """One stage of a cell to compute.

    A job of kind `CELL` computes all stages that the cell does not share. `needs` are the ids of jobs to wait for.
    """

    id: str
    #: the name of a stage, or `CELL`
    kind: str
    title: str
    spec: Mapping[str, Any]
    needs: tuple[str, ...] = ()
    #: whether it computes with networks; other jobs take no place on a GPU
    uses_device: bool = True


@dataclass(frozen=True)
class Outcome:
    """How a job ended."""

    status: Literal["done", "failed", "timeout"]
    error: str = ""
    message: str = ""
    traceback: str | None = None
    warnings: tuple[str, ...] = ()
    #: the kind of the job that ended this way first; jobs that needed it end with the same outcome
    kind: str | None = None
    #: bytes of its GPU that the process had at the end, its CUDA context included; None on a CPU
    device_memory: int | None = None
