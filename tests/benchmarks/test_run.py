"""The default benchmark's running time against the sum of its stages, in one slot."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from backdoor_bench_none.cli.init import default_benchmark
from backdoor_bench_none.cli.main import run_cli
from backdoor_bench_none.results.store import Store


def test_run_against_its_stages(benchmark: BenchmarkFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("benchmark.yaml").write_text(default_benchmark())
    started = time.perf_counter()
    assert benchmark.pedantic(run_cli, args=(["run", "-j1", "-q"],), rounds=1) == 0
    whole = time.perf_counter() - started
    stages = {}
    for record in Store(Path("results")).records():
        for stage, cost in record.costs.items():
            stages[stage, record.upstream.get(stage, record.key)] = cost.seconds
    ratio = whole / sum(stages.values())
    benchmark.extra_info["run / sum of stages"] = ratio
    assert ratio <= 1.05
