"""A small benchmark whose results folder is treated badly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BENCHMARK = """\
version: 1
name: campaign
matrix:
  dataset: {name: digits, params: {image_size: 8}, recipe: {epochs: 2}}
  attack: [clean, badnets]
  defense: [no_defense, {name: none, params: {epochs: 1}}]
  architecture: {name: mlp, params: {hidden: 16, depth: 1}}
"""
#: an executor without processes of its own, so that killing this one kills everything
BBNFILE = '''\
from contextlib import contextmanager
from backdoor_bench_none.api import Event, Executor, hookimpl
from backdoor_bench_none.run.jobs import run_job

class Inline(Executor):
    """Runs jobs in this process, one after the other."""

    @contextmanager
    def open(self, settings):
        yield Pool(settings)

class Pool:
    def __init__(self, settings):
        self.settings, self.events = settings, []

    def has_room(self, group):
        return not self.events

    def submit(self, group):
        (job,) = group
        outcome = run_job(job, self.settings, "cpu", 1, lambda done, total: None)
        self.events.append(Event(job.id, outcome=outcome))

    def wait(self, timeout):
        events, self.events = self.events, []
        return events

@hookimpl
def bbn_executors(): return {"inline": Inline}
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with a benchmark of four cells, the current one."""
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path)
    return tmp_path


def write_files(folder: Path) -> None:
    """The benchmark with processes, that without, and the plugin for the latter."""
    (folder / "b.yaml").write_text(BENCHMARK)
    (folder / "inline.yaml").write_text(f"{BENCHMARK}executor: inline\n")
    (folder / "bbnfile.py").write_text(BBNFILE)


def results_of(folder: Path) -> dict[str, Any]:
    """What was measured in each finished cell: all of a record but its costs and its provenance."""
    records = [json.loads(path.read_bytes()) for path in sorted((folder / "records").glob("*/*.json"))]
    kept = ("counts", "detection", "outcomes", "extras", "victim_losses", "upstream", "status")
    return {record["key"]: {name: record[name] for name in kept} for record in records}


@pytest.fixture
def count(record_property: Callable[[str, object], None]) -> Callable[[str, int, int], None]:
    """Notes how often something was tried and how often it was survived; tests/conftest.py prints the figures."""
    return lambda what, tried, survived: record_property("campaign", [what, tried, survived])
