"""What only a CUDA device shows; skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from backdoor_bench_none.cli.main import run_cli
from backdoor_bench_none.results.store import Store

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

BENCHMARK = """
version: 1
name: gpu
matrix:
  attack: badnets
  defense: [no_defense, none, dp_sgd, nad, ac, abl]
  architecture: {name: resnet18, params: {width: 0.25}}
"""


def test_all_defenses_run_on_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("benchmark.yaml").write_text(BENCHMARK)
    assert run_cli(["run", "--device", "cuda", "-q"]) == 0
    records = Store(Path("results")).records()
    assert len(records) == 6
    for record in records:
        assert record.provenance["device"] == torch.cuda.get_device_name()
        assert record.costs["defense"].peak_memory
