"""A benchmark that takes long enough to be disturbed, and what is compared of its records."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
#: 24 cells: 4 victims of 2 seeds, 3 defenses
BENCHMARK = """\
version: 1
name: cluster
seeds: [0, 1]
matrix:
  dataset: {name: digits, params: {image_size: 8}, recipe: {epochs: 2}}
  attack: [clean, {name: badnets, sweep: {poison_rate: [0.05, 0.1, 0.2]}}]
  defense: [no_defense, {name: none, params: {epochs: 1}}, {name: waits, params: {seconds: SECONDS}}]
  architecture: {name: mlp, params: {hidden: 16, depth: 1}}
executor: EXECUTOR
"""
CELLS = 24
#: `bbn run` with them runs half of the cells, those of four victims
ONE_SEED = ("-s", "0")
HALF = CELLS // 2
#: a defense that takes its time, and notes when it begins and ends
BBNFILE = """\
import os, time
from pathlib import Path
from typing import Annotated, ClassVar
from pydantic import Field
from backdoor_bench_none.api import Defense, DefenseResult, Incidental, Stage, hookimpl

NOTES = Path(__file__).with_name("notes")

class Waits(Defense):
    stage: ClassVar[Stage] = Stage.POST_TRAINING
    starts_from_victim: ClassVar[bool] = True
    seconds: Annotated[float, Incidental] = Field(0.0)

    def run(self, task, context):
        self.note("began", context)
        time.sleep(self.seconds)
        self.note("ended", context)
        return DefenseResult(task.victim())

    def note(self, word, context):
        node = os.environ.get("SLURMD_NODENAME") or os.environ.get("RAY_RAYLET_PID")
        with NOTES.open("a") as file:
            file.write(f"{word} {context.seed} {node}\\n")

@hookimpl
def bbn_defenses():
    return {"waits": Waits}
"""


def write_files(folder: Path, executor: str, seconds: float = 0.0) -> None:
    """The benchmark and its plugin; the defense `waits` takes so many seconds."""
    folder.mkdir(exist_ok=True)
    (folder / "benchmark.yaml").write_text(
        BENCHMARK.replace("EXECUTOR", executor).replace("SECONDS", str(seconds)), encoding="utf-8"
    )
    (folder / "bbnfile.py").write_text(BBNFILE, encoding="utf-8")


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """`bbn run` in a folder."""
    paths = [str(ROOT), str(ROOT / "attacks"), str(ROOT / "defenses")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-c", "from backdoor_bench_none.cli.main import main; main()", "run", *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen[str], seconds: float = 400.0) -> str:
    """What a run printed; it must end well."""
    output, _ = process.communicate(timeout=seconds)
    assert process.returncode == 0, output
    return output


def check_refused(folder: Path, executor: str, reason: str) -> None:
    """A run with this executor ends at once as a wrong usage, with the reason."""
    write_files(folder, executor)
    run = start(folder)
    output, _ = run.communicate(timeout=120)
    assert run.returncode == 2, output
    assert reason in output
    assert "Traceback" not in output


def notes(folder: Path, word: str) -> list[str]:
    """What the defense noted: the seed of the stage and the node, each time it began or ended."""
    path = folder / "notes"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line.partition(" ")[2] for line in lines if line.startswith(word)]


def eventually(condition: Callable[[], bool], seconds: float = 200.0) -> bool:
    """Whether a condition comes true in time."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
    return True


def are_part_of(results: dict[str, Any], others: dict[str, Any]) -> bool:
    """Whether these are half of the results, each equal to the other of its key."""
    return len(results) == HALF and results == {key: others[key] for key in results}


def results_of(folder: Path) -> dict[str, Any]:
    """What was measured in each cell: all of a record but its costs, its provenance and what they are part of."""
    records = [json.loads(path.read_bytes()) for path in sorted((folder / "results/records").glob("*/*.json"))]
    kept = ("status", "counts", "detection", "outcomes", "extras", "victim_losses", "keys", "warnings")
    return {record["key"]: {name: record.get(name) for name in kept} for record in records}


@pytest.fixture(scope="module")
def local_results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of the benchmark on this machine."""
    folder = tmp_path_factory.mktemp("local")
    write_files(folder, "local")
    finish(start(folder))
    results = results_of(folder)
    assert len(results) == CELLS
    assert {result["status"] for result in results.values()} == {"done"}
    return results
