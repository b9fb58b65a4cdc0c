"""bbn table over 20,000 records, after they are indexed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from pytest_benchmark.fixture import BenchmarkFixture

from backdoor_bench_none.contracts.record import Record
from backdoor_bench_none.results.store import Store

COUNT, SEEDS = 20_000, 5


def test_table_of_twenty_thousand_records(
    benchmark: BenchmarkFixture, tmp_path: Path, make_record: Callable[..., Record]
) -> None:
    store = Store(tmp_path / "results")
    for number in range(COUNT):
        combination, seed = divmod(number, SEEDS)
        axes = {"attack": f"attack{combination // 8:03}", "defense": f"defense{combination % 8}"}
        record = make_record(
            f"{number * 2654435761 % 2**64:016x}", ba=80 + seed, asr=combination % 100, seed=seed, axes=axes
        )
        path = store.record_path(record.key)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(record.model_dump_json(by_alias=True))
    code = "import sys, backdoor_bench_none.cli.main as m; sys.exit(m.run_cli(sys.argv[1:]))"
    work = [sys.executable, "-c", code, "table", "--all", "--results", str(store.root), "--format", "markdown"]
    started = time.perf_counter()
    subprocess.run(work, check=True, capture_output=True)
    benchmark.extra_info["seconds of indexing and one table"] = time.perf_counter() - started
    made = benchmark.pedantic(
        subprocess.run, args=(work,), kwargs={"check": True, "capture_output": True}, rounds=5, warmup_rounds=1
    )
    assert made.stdout.decode().count("attack") > COUNT / SEEDS / 8
    assert json.dumps(benchmark.extra_info)
    assert benchmark.stats.stats.median <= 1.0
