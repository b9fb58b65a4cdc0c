"""A study of 1,000 cells on eight places whose stages take a simulated time, and what is asked of larger ones."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml
from pytest_benchmark.fixture import BenchmarkFixture

from backdoor_bench_none.contracts.record import Record
from backdoor_bench_none.planning.plan import plan_config
from backdoor_bench_none.planning.reading import parse_config
from backdoor_bench_none.registry.components import Registry
from backdoor_bench_none.registry.plugins import Plugins
from backdoor_bench_none.results.store import Store

PROGRAM = """
from backdoor_bench_none.cli.main import main
from backdoor_bench_none.system import read_peak_memory
try:
    main()
finally:
    print("peak", read_peak_memory())
"""
#: eight places whose jobs take a minute for a cell and five for a victim, of a clock that runs a hundred times as fast
BBNFILE = """
import heapq, json, time
from contextlib import contextmanager
from pathlib import Path
from backdoor_bench_none.api import Event, Executor, Outcome, Record, Registry, Store, hookimpl
from backdoor_bench_none.contracts.measures import Count, Counts
from backdoor_bench_none.planning.choices import cell_from_spec
from backdoor_bench_none.registry.plugins import Plugins
from backdoor_bench_none.run.grouping import group_by_network

PLACES, SCALE = 8, 100.0
TAKES = {"data": 10.0, "poison": 10.0, "victim": 300.0, "cell": 60.0}
TENTH = Count(hits=1, total=10)
COUNTS = Counts(benign_accuracy=TENTH, attack_success_rate=TENTH, robust_accuracy=TENTH)

class Simulated(Executor):
    def group(self, jobs):
        return group_by_network(jobs)

    @contextmanager
    def open(self, settings):
        pool = Pool(Store(settings.results))
        yield pool
        Path("worked.json").write_text(json.dumps(pool.worked / SCALE / PLACES))

class Pool:
    def __init__(self, store):
        self.store, self.ends, self.worked, self.busy = store, [], 0.0, {}
        self.registry = Registry(Plugins(external=False))

    def has_room(self, group):
        return len(self.busy) < PLACES

    def submit(self, group):
        self.busy[group[-1].id] = group
        ends = time.perf_counter()
        for job in group:
            self.worked += TAKES[job.kind]
            ends += TAKES[job.kind] / SCALE
            heapq.heappush(self.ends, (ends, job.id, job.spec))

    def wait(self, timeout):
        time.sleep(max(0.0, min(timeout, self.ends[0][0] - time.perf_counter())))
        events = []
        while self.ends and self.ends[0][0] <= time.perf_counter():
            _, job, spec = heapq.heappop(self.ends)
            kind, key = job.split(":")
            self.busy.pop(job, None)
            if kind == "cell":
                self.store.write_record(Record.of(cell_from_spec(spec, self.registry), key, "done", counts=COUNTS))
            events.append(Event(job, Outcome("done")))
        return events

@hookimpl
def bbn_executors():
    return {"simulated": Simulated}
"""


def study(cells: int) -> str:
    """A benchmark of so many cells, ten for each victim."""
    rates = [round(0.01 + index / 10_000, 4) for index in range(cells // 100)]
    matrix = {
        "attack": [{"name": "badnets", "sweep": {"poison_rate": rates}}],
        "defense": ["no_defense", *({"name": "none", "params": {"epochs": n}, "as": f"none{n}"} for n in range(1, 10))],
        "architecture": ["mlp"],
    }
    return yaml.safe_dump({"version": 1, "name": "study", "seeds": list(range(10)), "matrix": matrix})


def test_the_overhead_of_a_study_is_at_most_five_per_cent(tmp_path: Path) -> None:
    (tmp_path / "benchmark.yaml").write_text(study(1_000) + "executor: simulated\n")
    (tmp_path / "bbnfile.py").write_text(BBNFILE)
    command = [sys.executable, "-c", PROGRAM, "run", "-q"]
    output = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    summary = next(line for line in output.splitlines() if line.startswith("1000 done in "))
    took, ideal = float(summary.split()[3]), json.loads((tmp_path / "worked.json").read_text())
    print(f"\n1,000 cells: {took:.0f} s, and {ideal:.1f} s of work for each of 8 places: {took / ideal - 1:+.1%}")
    peak = int(output.split()[-1])
    print(f"peak memory of the run: {peak / 2**20:.0f} MiB")
    assert took <= 1.05 * ideal
    assert peak < 500 * 2**20


def test_ten_thousand_cells_are_planned_and_their_state_is_told(
    benchmark: BenchmarkFixture, tmp_path: Path, make_record: Callable[..., Record]
) -> None:
    path = tmp_path / "benchmark.yaml"
    path.write_text(study(10_000))
    registry = Registry(Plugins(external=False))
    store = Store(tmp_path / "results")
    for cell in plan_config(*parse_config(study(10_000)), registry).cells:
        record = make_record(cell.memo["record_key"])
        file = store.record_path(record.key)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(record.model_dump_json(by_alias=True))
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", PROGRAM, "plan"], cwd=tmp_path, check=True, capture_output=True)
    seconds = time.perf_counter() - started
    print(f"\nbbn plan of 10,000 cells, whose records were indexed: {seconds:.1f} s")
    assert seconds <= 10
    work = [sys.executable, "-c", PROGRAM, "status"]
    told = benchmark.pedantic(
        subprocess.run, args=(work,), kwargs={"cwd": tmp_path, "check": True, "capture_output": True}, rounds=3
    )
    assert b"10000 done" in told.stdout
    assert benchmark.stats.stats.median <= 2.0
