"""Planning 10,000 cells, and the start of `bbn list`."""

from __future__ import annotations

import subprocess
import sys

import yaml
from pytest_benchmark.fixture import BenchmarkFixture

from backdoor_bench_none.config import parse_config
from backdoor_bench_none.plan import plan_config
from backdoor_bench_none.plugins import Plugins
from backdoor_bench_none.registry import Registry


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
        return len({cell.key for cell in cells})

    assert benchmark.pedantic(plan, rounds=3) == 10_000
    assert benchmark.stats.stats.median <= 2.0


def test_list_starts_at_once(benchmark: BenchmarkFixture) -> None:
    code = "import sys, backdoor_bench_none.cli.main as m; m.run_cli(['list']); sys.exit('torch' in sys.modules)"
    work = [sys.executable, "-c", code]
    benchmark.pedantic(subprocess.run, args=(work,), kwargs={"check": True}, rounds=5, warmup_rounds=1)
    assert benchmark.stats.stats.median <= 0.6
