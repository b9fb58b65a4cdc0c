"""Which jobs find room on a machine with GPUs that are not there, and on one without."""

from __future__ import annotations

from typing import Any

import pytest

from backdoor_bench_none.contracts.job import CELL, Job
from backdoor_bench_none.executors.room import Gpu, Room

GIB = 2**30
TWO = (Gpu("cuda:0", 80 * GIB), Gpu("cuda:1", 80 * GIB))


def job(kind: str = CELL, defense: str = "none", architecture: str = "resnet18", **given: Any) -> Job:
    names = {"dataset": "cifar10", "architecture": architecture, "trainer": "centralized", "attack": "badnets"}
    spec: dict[str, Any] = {axis: {"name": name, "params": {}} for axis, name in (*names.items(), ("defense", defense))}
    return Job(f"{kind}:1", kind, "", {**spec, "recipe": {"batch_size": 128}}, **given)


def test_a_cpu_has_a_slot_for_each_core_with_one_thread() -> None:
    room = Room("auto", (), 4)
    running = [(job(), "cpu")] * 3
    assert (room.find_device(job(), running), room.threads) == ("cpu", 1)
    assert room.find_device(job(), [*running, *running]) is None
    assert Room("cpu", (), 8, slots=2).threads == 4


def test_a_first_job_of_its_kind_has_a_gpu_for_itself() -> None:
    room = Room("auto", TWO, 16)
    assert room.find_device(job(), []) == "cuda:0"
    assert room.find_device(job(), [(job(), "cuda:0")]) == "cuda:1"
    assert room.find_device(job(), [(job(), "cuda:0"), (job(), "cuda:1")]) is None


def test_then_as_many_as_its_memory_allows() -> None:
    room = Room("auto", TWO[:1], 16)
    room.note_memory(job(), 20 * GIB)
    assert room.find_device(job(), [(job(), "cuda:0")] * 2) == "cuda:0"
    assert room.find_device(job(), [(job(), "cuda:0")] * 3) is None  # 80 of 80 GiB
    room.note_memory(job(), 30 * GIB)  # the largest counts
    assert room.find_device(job(), [(job(), "cuda:0")] * 2) is None


@pytest.mark.parametrize(
    "other", [job(defense="dp_sgd"), job(architecture="vgg16"), job(kind="victim")], ids=["defense", "network", "stage"]
)
def test_a_job_of_another_kind_waits_for_a_gpu_of_its_own(other: Job) -> None:
    room = Room("auto", TWO[:1], 16)
    room.note_memory(job(), GIB)
    assert room.find_device(other, [(job(), "cuda:0")]) is None
    assert room.find_device(job(), [(other, "cuda:0")]) is None
    assert room.find_device(other, []) == "cuda:0"


def test_a_gpu_has_no_more_jobs_than_cores() -> None:
    room = Room("auto", TWO, 4)
    room.note_memory(job(), GIB)
    assert room.find_device(job(), [(job(), "cuda:0"), (job(), "cuda:0"), (job(), "cuda:1")]) == "cuda:1"
    assert room.find_device(job(), [(job(), "cuda:0"), (job(), "cuda:0")] + [(job(), "cuda:1")] * 2) is None


def test_a_number_for_each_gpu_is_kept() -> None:
    room = Room("cuda", TWO, 16, per_gpu=2)
    assert room.threads == 4
    assert room.find_device(job(), [(job(), "cuda:0")] * 2 + [(job(), "cuda:1")]) == "cuda:1"
    assert room.find_device(job(), [(job(), "cuda:0")] * 2 + [(job(), "cuda:1")] * 2) is None


def test_slots_are_those_of_all_gpus() -> None:
    room = Room("cuda", TWO, 16, slots=3)
    assert room.find_device(job(), [(job(), "cuda:0"), (job(), "cuda:1")]) == "cuda:0"
    assert room.find_device(job(), [(job(), "cuda:0")] * 2 + [(job(), "cuda:1")]) is None


def test_jobs_without_networks_take_no_gpu() -> None:
    room = Room("auto", TWO[:1], 2)
    reading = job(kind="data", uses_device=False)
    assert room.find_device(reading, [(job(), "cuda:0")]) == "cpu"
    assert room.find_device(reading, [(reading, "cpu")] * 2) is None
    assert room.find_device(job(), [(reading, "cpu")] * 2) == "cuda:0"
