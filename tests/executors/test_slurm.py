"""The executor `slurm` on a real cluster of two nodes: nothing is lost when nodes, tasks or the run are."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from backdoor_bench_none.executors import slurm
from backdoor_bench_none.executors.slurm import count_states, read_queue
from tests.executors.conftest import (
    CELLS,
    HALF,
    ONE_SEED,
    are_part_of,
    check_refused,
    eventually,
    finish,
    notes,
    results_of,
    start,
    write_files,
)

NODES = Path(__file__).with_name("slurm_nodes.sh")


def ask(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def idle_nodes() -> set[str]:
    return set(ask("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split())


@pytest.fixture(scope="module")
def nodes() -> None:
    """Two nodes that are ready."""
    if shutil.which("sinfo") is None or subprocess.run(["sinfo"], check=False, capture_output=True).returncode:
        pytest.skip("there is no Slurm cluster; tests/executors/slurm_nodes.sh start")
    if not eventually(lambda: idle_nodes() == {"n1", "n2"}, 60):
        pytest.skip(f"the nodes of the Slurm cluster are not ready: {ask('sinfo', '-N')}")


@pytest.fixture
def cluster(nodes: None) -> Iterator[None]:
    """Both nodes, with an empty queue before and after."""
    assert eventually(lambda: idle_nodes() == {"n1", "n2"}, 60)
    yield
    subprocess.run(["scancel", "--me"], check=False)
    eventually(lambda: not read_queue(), 60)


pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("cluster")]


def test_cells_on_both_nodes_have_the_records_of_one_machine(tmp_path: Path, local_results: dict[str, Any]) -> None:
    write_files(tmp_path, "{name: slurm, partition: debug, time: 10m}")
    output = finish(start(tmp_path))
    assert f"{CELLS} done" in output
    assert results_of(tmp_path) == local_results
    assert {note.split()[1] for note in notes(tmp_path, "ended")} == {"n1", "n2"}
    assert count_states(tmp_path / "results") == {"queued": 0, "running": 0, "done": 8, "lost": 0}
    assert f"{CELLS} done before" in finish(start(tmp_path))


def test_the_jobs_of_a_lost_node_end_elsewhere(tmp_path: Path, local_results: dict[str, Any]) -> None:
    write_files(tmp_path, "{name: slurm, time: 10m, groups: 2}", seconds=10)
    run = start(tmp_path, *ONE_SEED)
    assert eventually(lambda: any(note.endswith("n2") for note in notes(tmp_path, "began")))
    ask("bash", str(NODES), "lose", "n2")
    try:
        output = finish(run)
    finally:
        ask("bash", str(NODES), "restore", "n2")
    assert f"{HALF} done" in output
    assert are_part_of(results_of(tmp_path), local_results)


def test_a_time_limit_shorter_than_its_group_computes_nothing_twice(
    tmp_path: Path, local_results: dict[str, Any]
) -> None:
    """A task that waits for a minute and a half: the warning, which may come a minute early, comes in its middle."""
    write_files(tmp_path, "{name: slurm, time: 2m, warning: 30s, groups: 8}", seconds=12)
    run = start(tmp_path)
    while run.poll() is None:
        time.sleep(1)
        # Slurm lets a task that was queued again wait for two minutes
        for identity in ask("squeue", "-h", "-r", "--me", "-t", "PENDING", "-o", "%A").split():
            subprocess.run(["scontrol", "update", f"JobId={identity}", "StartTime=now"], check=False)
    output = finish(run)
    assert f"{CELLS} done" in output
    assert results_of(tmp_path) == local_results
    ended = Counter(note.split()[0] for note in notes(tmp_path, "ended"))
    assert len(ended) == 8  # one for each victim
    assert set(ended.values()) == {1}
    logs = (tmp_path / "results/slurm").rglob("*_log.out")
    assert sum(log.read_text().count("Requeued job") for log in logs) >= 1


def test_a_run_that_was_stopped_finds_its_tasks_again(tmp_path: Path, local_results: dict[str, Any]) -> None:
    write_files(tmp_path, "{name: slurm, time: 10m}", seconds=5)
    run = start(tmp_path, *ONE_SEED)
    assert eventually(lambda: bool(notes(tmp_path, "began")))
    run.send_signal(signal.SIGINT)
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 130, output
    assert "comes back to it" in output
    before = {queued.id.partition("_")[0] for queued in read_queue().values()}
    assert len(before) == 1  # one array, which goes on
    finish(start(tmp_path, *ONE_SEED))
    assert are_part_of(results_of(tmp_path), local_results)
    assert set(Counter(note.split()[0] for note in notes(tmp_path, "ended")).values()) == {1}
    arrays = {path.parent for path in (tmp_path / "results/slurm").rglob("task-*.json")}
    assert len(arrays) == 1  # nothing was submitted again


def test_a_cancelled_task_fails_its_cells_and_nothing_else(tmp_path: Path) -> None:
    write_files(tmp_path, "{name: slurm, time: 10m}", seconds=5)
    run = start(tmp_path, *ONE_SEED)
    assert eventually(lambda: bool(notes(tmp_path, "began")))
    waiting = [queued.id for queued in read_queue().values() if queued.state == "PENDING"]
    ask("scancel", waiting[-1])
    output, _ = run.communicate(timeout=400)
    assert run.returncode == 1, output
    statuses = Counter(result["status"] for result in results_of(tmp_path).values())
    assert statuses == {"done": HALF - 3, "failed": 3}
    assert output.count("ended without a result") >= 3
    assert "3 done" in finish(start(tmp_path, "--only", "failed"))


def test_bad_requests_are_refused_before_anything_runs(tmp_path: Path) -> None:
    refused = {
        "{name: slurm, partition: gpuu}": "there is no partition 'gpuu'",
        "{name: slurm, gpus: 2}": "sbatch failed",
        "{name: slurm, cpus: 64}": "Requested node configuration is not available",
        "{name: slurm, memory: 900G}": "Requested node configuration is not available",
    }
    for executor, reason in refused.items():
        check_refused(tmp_path, executor, reason)
    assert not (tmp_path / "results" / "slurm").exists()
    assert slurm.read_queue() == {}
