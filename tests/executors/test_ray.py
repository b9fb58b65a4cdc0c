"""The executor `ray` on a real cluster of three nodes on this machine: nothing is lost when a node or the run is."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.executors.conftest import (
    CELLS,
    HALF,
    ONE_SEED,
    ROOT,
    are_part_of,
    check_refused,
    eventually,
    finish,
    notes,
    results_of,
    start,
    write_files,
)

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A cluster of three nodes with a core each, which see this checkout, and of a head to which runs connect."""
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    paths = [str(ROOT), str(ROOT / "attacks"), str(ROOT / "defenses")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # 15 by default: nothing moves beside other work
        cluster = cluster_utils.Cluster()
        try:
            for cores in (0, 1, 1, 1):
                cluster.add_node(num_cpus=cores, object_store_memory=200 * 2**20, include_dashboard=False)
            yield cluster
        finally:
            cluster.shutdown()


@pytest.fixture
def cluster(nodes: Any) -> str:
    """Its address."""
    return str(nodes.address)


def without_warnings(results: dict[str, Any]) -> dict[str, Any]:
    return {key: {**result, "warnings": []} for key, result in results.items()}


def test_cells_on_all_nodes_have_the_records_of_one_machine(
    cluster: str, tmp_path: Path, local_results: dict[str, Any]
) -> None:
    write_files(tmp_path, f"{{name: ray, address: '{cluster}'}}")
    assert f"{CELLS} done" in finish(start(tmp_path))
    assert results_of(tmp_path) == local_results
    assert len({note.split()[1] for note in notes(tmp_path, "ended")}) == 3
    assert f"{CELLS} done before" in finish(start(tmp_path))


def test_a_run_that_was_stopped_goes_on(cluster: str, tmp_path: Path, local_results: dict[str, Any]) -> None:
    write_files(tmp_path, f"{{name: ray, address: '{cluster}'}}", seconds=4)
    run = start(tmp_path, *ONE_SEED)
    assert eventually(lambda: bool(notes(tmp_path, "ended")))
    run.send_signal(signal.SIGINT)
    output, _ = run.communicate(timeout=200)
    assert run.returncode == 130, output
    ended = Counter(note.split()[0] for note in notes(tmp_path, "ended"))
    assert f"{HALF} done" not in output
    finish(start(tmp_path, *ONE_SEED))
    assert are_part_of(results_of(tmp_path), local_results)
    again = Counter(note.split()[0] for note in notes(tmp_path, "ended"))
    assert set(again.values()) == {1}
    assert again >= ended


def test_nodes_that_do_not_see_the_results_send_them(
    cluster: str, tmp_path: Path, local_results: dict[str, Any]
) -> None:
    write_files(tmp_path, f"{{name: ray, address: '{cluster}', shared: false}}")
    assert f"{HALF} done" in finish(start(tmp_path, *ONE_SEED))
    assert are_part_of(results_of(tmp_path), local_results)
    victims = list((tmp_path / "results/artifacts/victim").rglob("*.safetensors"))
    assert len(victims) == 4
    # artifacts that are there already travel to the nodes
    for record in (tmp_path / "results/records").rglob("*.json"):
        if "/none/" in json.loads(record.read_bytes())["title"]:
            record.unlink()
    before = {path: path.stat().st_mtime_ns for path in victims}
    assert "4 done" in finish(start(tmp_path, *ONE_SEED))
    assert are_part_of(results_of(tmp_path), local_results)
    assert {path: path.stat().st_mtime_ns for path in victims} == before


def test_bad_requests_are_refused_before_anything_runs(cluster: str, tmp_path: Path) -> None:
    refused = {
        f"{{name: ray, address: '{cluster}', gpus: 2}}": "no node has 1 cores and 2 GPUs",
        f"{{name: ray, address: '{cluster}', cpus: 9}}": "no node has 9 cores and 0 GPUs",
        "{name: ray, address: '127.0.0.1:1'}": "no cluster answers at '127.0.0.1:1'",
    }
    for executor, reason in refused.items():
        check_refused(tmp_path, executor, reason)


def test_the_jobs_of_a_killed_node_end_elsewhere_and_say_so(
    cluster: str, tmp_path: Path, local_results: dict[str, Any]
) -> None:
    write_files(tmp_path, f"{{name: ray, address: '{cluster}'}}", seconds=5)
    run = start(tmp_path)
    assert eventually(lambda: len({note.split()[1] for note in notes(tmp_path, "began")}) == 3)
    os.kill(int(notes(tmp_path, "began")[-1].split()[1]), signal.SIGKILL)
    assert f"{CELLS} done" in finish(run)
    results = results_of(tmp_path)
    assert without_warnings(results) == local_results
    told = [key for key, result in results.items() if result["warnings"]]
    assert 1 <= len(told) <= 3  # the cells of one victim
    assert all("was lost while it computed this" in results[key]["warnings"][0] for key in told)
