"""Planning 10,000 cells, and the start of `bbn list`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import yaml
from pytest_benchmark.fixture import BenchmarkFixture

from backdoor_bench_none.planning.plan import plan_config
from backdoor_bench_none.planning.reading import parse_config
from backdoor_bench_none.planning.stage_table import record_key
from backdoor_bench_none.registry.components import Registry
from backdoor_bench_none.registry.plugins import Plugins
from backdoor_bench_none.scaffold import write_package


def test_plan_ten_thousand_cells(benchmark: BenchmarkFixture) -> None:
    rates = [round(0.01 + i / 1000, 3) for i in range(50)]
    matrix = {
        "attack": [{"name": "badnets", "sweep": {"poison_rate": rates}}],
        "defense": ["no_defense", "none"],
        "architecture": ["nin", "vgg11", "vgg16", "resnet18", "alexnet"],
        "activation": ["relu", "elu", "gelu", "silu"],
    }
    text = yaml.safe_dump({"version": 1, "name": "large", "seeds": [0, 1, 2, 3, 4], "matrix": matrix})
    registry = Registry(Plugins(external=False))
    plan_config(*parse_config(text.replace("'0'", "0")), registry)

    def plan() -> int:
        cells = plan_config(*parse_config(text), registry).cells
        return len({record_key(cell) for cell in cells})

    assert benchmark.pedantic(plan, rounds=3) == 10_000
    assert benchmark.stats.stats.median <= 2.0


def test_list_starts_at_once(benchmark: BenchmarkFixture) -> None:
    code = "import sys, backdoor_bench_none.cli.main as m; m.run_cli(['list']); sys.exit('torch' in sys.modules)"
    work = [sys.executable, "-c", code]
    benchmark.pedantic(subprocess.run, args=(work,), kwargs={"check": True}, rounds=5, warmup_rounds=1)
    assert benchmark.stats.stats.median <= 0.6


def test_list_starts_at_once_with_ten_packages_of_strangers(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    names = [f"stranger_{index}" for index in range(10)]
    for name in names:
        for kind in ("attack", "defense", "architecture"):
            write_package(kind, f"{name}_{kind}", tmp_path / name / kind)
        sources = sorted((tmp_path / name).glob("*/src/*"))
        metadata = tmp_path / "site" / f"{name}-1.0.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        points = "".join(f"{folder.name} = {folder.name}\n" for folder in sources)
        (metadata / "entry_points.txt").write_text(f"[backdoor_bench_none]\n{points}")
        for folder in sources:
            folder.rename(tmp_path / "site" / folder.name)
    code = "import sys, backdoor_bench_none.cli.main as m; m.run_cli(['list']); sys.exit('torch' in sys.modules)"
    given = {"env": {**os.environ, "PYTHONPATH": str(tmp_path / "site")}, "check": True, "capture_output": True}
    work = [sys.executable, "-c", code]
    listed = subprocess.run(work, text=True, **given).stdout
    assert all(
        listed.count(f" {name}_{kind} ") == 1 for name in names for kind in ("attack", "defense", "architecture")
    )
    benchmark.pedantic(subprocess.run, args=(work,), kwargs=given, rounds=5, warmup_rounds=1)
    assert benchmark.stats.stats.median <= 0.8
