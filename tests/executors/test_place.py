"""What travels to a place on a cluster, and what a place refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backdoor_bench_none.contracts.executor import Event
from backdoor_bench_none.contracts.job import Job, Outcome, Settings
from backdoor_bench_none.errors import StoreError
from backdoor_bench_none.executors.local import Local
from backdoor_bench_none.executors.place import (
    find_versions,
    pack_event,
    pack_group,
    run_group,
    unpack_event,
    unpack_group,
)
from backdoor_bench_none.executors.task_file import Reports, Task
from backdoor_bench_none.executors.travel import list_files, write_file

TEXT = st.text(max_size=20)
OUTCOMES = st.builds(
    Outcome, st.sampled_from(["done", "failed", "timeout"]), TEXT, TEXT, st.none() | TEXT,
    st.lists(TEXT, max_size=2).map(tuple), st.none() | TEXT, st.none() | st.integers(0, 2**40),
)  # fmt: skip
SETTINGS = Settings(
    Path("/results"), "cpu", 5.0, Path("/somewhere/bbnfile.py"), 2**30, False, frozenset({"one", "two"})
)
JOBS = (Job("data:1", "data", "a title", {"seed": 1}, (), False), Job("cell:2", "cell", "b", {"x": [1]}, ("data:1",)))


def sent(value: Any) -> Any:
    """A value after its way through JSON."""
    return json.loads(json.dumps(value))


@given(st.builds(Event, TEXT, st.none() | OUTCOMES, st.integers(0, 9), st.integers(0, 9)))
def test_events_arrive_as_they_were(event: Event) -> None:
    assert unpack_event(sent(pack_event(event))) == event


@pytest.mark.parametrize(
    "settings", [SETTINGS, replace(SETTINGS, bbnfile=None, disabled=None, timeout=None)], ids=["all", "few"]
)
def test_groups_arrive_as_they_were(settings: Settings) -> None:
    assert unpack_group(sent(pack_group(JOBS, settings, {"a": "1"}))) == (JOBS, settings, {"a": "1"})


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ({"backdoor-bench-none": "99.0"}, "backdoor-bench-none has version 0.1.0, here it is 99.0; install the same"),
        ({"bbn-stranger": "1.2"}, "bbn-stranger 1.2 is not installed; install there what is installed here"),
    ],
)
def test_a_node_with_other_software_fails_its_jobs_by_name(
    wanted: dict[str, str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.node", lambda: "n7")
    settings = Settings(tmp_path, "cpu", external=False)
    events: list[Event] = []
    run_group(JOBS, settings, {**find_versions(settings), **wanted}, Local(), events.append)
    assert [event.job for event in events] == ["data:1", "cell:2"]
    for event in events:
        assert event.outcome is not None
        assert event.outcome.message.startswith(f"node n7: {reason}")


def test_a_node_that_does_not_see_the_results_says_so(tmp_path: Path) -> None:
    settings = Settings(tmp_path / "absent", "cpu", external=False)
    events: list[Event] = []
    run_group(JOBS[:1], settings, find_versions(settings), Local(), events.append)
    assert events[0].outcome is not None
    assert f"the results folder {tmp_path / 'absent'} is not there; choose one that all nodes see" in (
        events[0].outcome.message
    )


def test_reports_are_read_as_they_grow_and_half_a_line_is_left(tmp_path: Path) -> None:
    path = tmp_path / "task-0.json"
    path.write_text(json.dumps(pack_group(JOBS, SETTINGS, {})))
    task, reports = Task.of(path), Reports(path.with_suffix(".jsonl"))
    assert (task.read_events(), task.is_over) == ([], False)
    reports.write(Event("data:1"))
    reports.write(Event("data:1", done=1, total=9))  # a moment after another report of this job
    reports.write(Event("data:1", Outcome("done")))
    with reports.path.open("a") as file:
        file.write('{"job": "cell:2", "outcome": nu')
    assert task.read_events() == [Event("data:1"), Event("data:1", Outcome("done"))]
    assert list(task.ended) == ["data:1"]
    with reports.path.open("a") as file:
        file.write('ll, "done": 0, "total": 0}\n')
    reports.write(Event("cell:2", Outcome("failed", "E", "why")))
    assert [event.outcome is None for event in task.read_events()] == [True, False]
    assert task.is_over


@pytest.mark.parametrize(
    "name",
    [
        "../records/ab/abcd.json", "records/ab/abcd.json.py", "bbnfile.py", "/etc/passwd", "records/ab/../../x.json",
        "artifacts/data/ab/ab.cd.pkl", "artifacts/../ab/ab.cd.safetensors",
    ],
)  # fmt: skip
def test_other_machines_write_artifacts_and_records_only(name: str, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no file of a results folder"):
        write_file(tmp_path, name, b"{}")
    assert list(tmp_path.rglob("*")) == []


def test_files_that_travel_are_the_artifacts_and_the_records(tmp_path: Path) -> None:
    names = {"artifacts/data/ab/ab12.cd34.safetensors", "records/ab/ab12.json"}
    for name in names:
        write_file(tmp_path, name, b"x")
    (tmp_path / "index.sqlite").touch()
    (tmp_path / "records/ab/.ab13.json.77").touch()
    assert list_files(tmp_path) == names


def test_a_job_that_never_ends_in_its_task_has_failed_and_so_have_those_that_need_it(tmp_path: Path) -> None:
    slurm_task = pytest.importorskip("backdoor_bench_none.executors.slurm_task")
    settings = Settings(tmp_path, "cpu", external=False)
    path = tmp_path / "task-0.json"
    path.write_text(json.dumps(pack_group(JOBS, settings, find_versions(settings))))
    task, slurm = Task.of(path), slurm_task.SlurmTask(Local())
    for count in range(slurm_task.MOST_BEGINNINGS):
        assert task.read_events() == []
        Reports(path.with_suffix(".jsonl")).write(Event("data:1"))
        task.read_events()
        assert (task.begun["data:1"], dict(task.ended)) == (count + 1, {})
        slurm.checkpoint(str(path))
    (ended,) = task.read_events()
    assert ended.outcome is not None
    assert ended.outcome.status == "timeout"
    assert "begun 5 times and never ended" in ended.outcome.message
    slurm(str(path))  # in the next task the cell that needs the data is not tried
    assert task.read_events() == [Event("cell:2", ended.outcome)]
    assert task.is_over
