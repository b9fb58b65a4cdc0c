"""A GPU is chosen, bounded and started before the first stage, and a stage's clock counts its own work alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from backdoor_bench_none.contracts.job import Job, Settings
from backdoor_bench_none.planning.plan import Plan
from backdoor_bench_none.run import devices
from backdoor_bench_none.run.devices import prepare_device
from backdoor_bench_none.run.isolation import isolated
from backdoor_bench_none.run.jobs import run_job
from backdoor_bench_none.run.measuring import measure_stage
from backdoor_bench_none.testing.pretend_cuda import pretend_cuda
from backdoor_bench_none.testing.pretended_device import Sightings

SECOND = torch.device("cuda", 1)


@pytest.fixture
def gpu() -> Iterator[Sightings]:
    with pretend_cuda() as seen:
        yield seen


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put back what a process sets for its GPU."""
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "benchmark", cudnn.benchmark)
    monkeypatch.setattr(cudnn, "allow_tf32", True)


@pytest.fixture
def called(gpu: Sightings, monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Notes how a GPU is chosen and bounded."""
    calls = Mock()
    for name in ("set_device", "set_per_process_memory_fraction"):
        monkeypatch.setattr(torch.cuda, name, getattr(calls, name))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (30 << 30, 40 << 30))
    return calls


def test_the_gpu_of_a_process_is_its_current_one(called: Mock) -> None:
    prepare_device(SECOND)
    called.set_device.assert_called_once_with(SECOND)
    called.set_per_process_memory_fraction.assert_not_called()


def test_without_an_index_the_current_gpu_stays(called: Mock) -> None:
    prepare_device(torch.device("cuda"))
    called.set_device.assert_not_called()


@pytest.mark.parametrize(("memory", "share"), [(10 << 30, 0.25), (80 << 30, 1.0)])
def test_memory_is_bounded_as_a_share_of_the_gpus(called: Mock, memory: int, share: float) -> None:
    prepare_device(SECOND, memory)
    called.set_per_process_memory_fraction.assert_called_once_with(share, 1)


def test_float32_is_not_tf32_on_a_gpu(gpu: Sightings) -> None:
    prepare_device(torch.device("cuda"))
    assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.benchmark


def test_a_cpu_needs_no_preparation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_start", Mock(side_effect=AssertionError))
    prepare_device(torch.device("cpu"), 1 << 30)
    assert torch.backends.cudnn.allow_tf32
    assert not torch.backends.cudnn.benchmark


def test_a_gpu_has_started_when_it_is_prepared(gpu: Sightings) -> None:
    prepare_device(torch.device("cuda"))
    assert [kind for kind, _ in gpu.waits] == ["synchronize"]


def test_a_job_prepares_its_gpu(
    called: Mock, tiny_plan: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cell,) = tiny_plan(defense="no_defense").cells
    prepared: list[tuple[Any, ...]] = []
    monkeypatch.setattr(devices, "prepare_device", lambda *arguments: prepared.append(arguments))
    settings = Settings(tmp_path / "results", memory=3 << 30, external=False)
    outcome = run_job(Job("a", "data", "the data", cell.spec()), settings, "cuda:0", 1, lambda done, total: None)
    assert outcome.status == "done", outcome
    assert prepared == [(torch.device("cuda", 0), 3 << 30)]


def test_the_clock_of_a_stage_starts_when_the_gpu_is_idle(gpu: Sightings) -> None:
    with measure_stage(torch.device("cuda")):
        assert sum(gpu.waits.values()) == 1
    assert sum(gpu.waits.values()) == 2


def test_what_a_component_draws_on_a_gpu_is_not_missed_by_the_next(gpu: Sightings) -> None:
    before = torch.cuda.get_rng_state()
    with isolated("the defense"):
        torch.manual_seed(3)
        torch.rand(5, device="cuda")
        np.random.rand()
    assert torch.equal(torch.cuda.get_rng_state(), before)
