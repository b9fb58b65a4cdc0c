"""Which jobs run beside each other on the devices of a machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from backdoor_bench_none.contracts.job import CELL, Job
from backdoor_bench_none.seeds import canonical_json

#: the share of a GPU's memory that jobs are given, by what others of their kind took
SHARE = 0.9


@dataclass(frozen=True)
class Gpu:
    """A GPU, as `cuda:N`, and its memory in bytes."""

    device: str
    memory: int


@dataclass
class Room:
    """The places for jobs on one machine.

    On a CPU there are `slots`, one for each core by default. On GPUs a first job of its kind has one for itself; then
    as many run beside each other as the memory that it took allows, or `per_gpu`, or `slots` in all. Jobs that use no
    device have the cores.
    """

    device: str
    gpus: Sequence[Gpu]
    cores: int
    slots: int | Literal["auto"] = "auto"
    per_gpu: int | Literal["auto"] = "auto"
    #: the largest memory that a job took, by its kind
    _taken: dict[str, int] = field(default_factory=dict)

    @property
    def threads(self) -> int:
        """The threads of a process."""
        places = self.slots
        if places == "auto":
            places = self.cores
            if self.gpus:
                places = len(self.gpus) * (1 if self.per_gpu == "auto" else self.per_gpu)
        return max(1, self.cores // places)

    def find_device(self, job: Job, running: Sequence[tuple[Job, str]]) -> str | None:
        """The device on which a job can start, beside the `running` ones and theirs; None if there is no room."""
        busy = Counter(device for _, device in running)
        if not self.gpus:
            slots = self.cores if self.slots == "auto" else self.slots
            name = "cpu" if self.device == "auto" else self.device
            return name if len(running) < slots else None
        if not job.uses_device:
            return "cpu" if busy["cpu"] < self.cores else None
        if self.slots != "auto" and len(running) - busy["cpu"] >= self.slots:
            return None
        fitting = [gpu.device for gpu in self.gpus if self._fits(job, gpu, running)]
        return min(fitting, key=busy.__getitem__) if fitting else None

    def _fits(self, job: Job, gpu: Gpu, running: Sequence[tuple[Job, str]]) -> bool:
        beside = [other for other, device in running if device == gpu.device]
        if self.per_gpu != "auto":
            return len(beside) < self.per_gpu
        if self.slots != "auto":
            return len(beside) < -(-self.slots // len(self.gpus))
        if not beside:
            return True
        taken = [self._taken.get(_kind_of(one)) for one in (job, *beside)]
        known = [memory for memory in taken if memory is not None]
        is_small_enough = len(known) == len(taken) and sum(known) <= SHARE * gpu.memory
        return is_small_enough and len(taken) <= max(1, self.cores // len(self.gpus))

    def note_memory(self, job: Job, memory: int | None) -> None:
        """Note how many bytes a job took of its GPU, for the next of its kind; None if it has none."""
        if memory is not None:
            kind = _kind_of(job)
            self._taken[kind] = max(memory, self._taken.get(kind, 0))


def _kind_of(job: Job) -> str:
    """What jobs that take the same memory have in common: stage, network, data, and the defense of a cell."""
    axes = ["dataset", "architecture", "trainer", "attack"]
    if job.kind == CELL:
        axes.append("defense")
    parts = [(job.spec[axis]["name"], job.spec[axis]["params"]) for axis in axes[:2]]
    names = [job.spec[axis]["name"] for axis in axes[2:]]
    return canonical_json([job.kind, parts, names, job.spec["recipe"].get("batch_size")])
