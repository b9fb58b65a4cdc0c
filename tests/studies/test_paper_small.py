"""The study studies/paper-small: its files are the presets, and its records are what a run gives."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from backdoor_bench_none.api import Context
from backdoor_bench_none.contracts.cell import Cell
from backdoor_bench_none.contracts.record import Record
from backdoor_bench_none.leaderboard.agreement import compare_runs, is_made_on
from backdoor_bench_none.paper.presets import benchmark_text
from backdoor_bench_none.planning.plan import make_plan
from backdoor_bench_none.planning.reading import parse_config
from backdoor_bench_none.planning.stage_table import record_key
from backdoor_bench_none.registry.components import Registry
from backdoor_bench_none.registry.plugins import Plugins
from backdoor_bench_none.report.paper import compare_with_paper
from backdoor_bench_none.results.measurement import Measurement
from backdoor_bench_none.results.rows import rows_of_measurements
from backdoor_bench_none.results.store import Store
from backdoor_bench_none.run.provenance import describe
from backdoor_bench_none.run.stages import Stages

STUDY = Path(__file__).parents[2] / "studies" / "paper-small"
RESULTS = STUDY / "results"
REAL = Path(os.environ.get("BBN_TEST_DATA", "nowhere"))
#: as many of the cells that were computed fastest are computed again
REPEATED = 3


@pytest.mark.parametrize("name", ["table1", "table4", "table6", "table7", "table12"])
def test_its_files_are_the_presets(name: str) -> None:
    path = STUDY / f"{name}.yaml"
    config = parse_config(path.read_text(encoding="utf-8"), path.name)[0]
    assert config.results == Path("studies/paper-small/results")
    preset = parse_config(benchmark_text(path.stem, "small"), path.name)[0]
    assert config.model_copy(update={"results": preset.results}) == preset


def test_its_records_are_small_and_done() -> None:
    records = Store(RESULTS).records()
    assert records
    assert {record.status for record in records} == {"done"}
    sizes = [path.stat().st_size for path in (RESULTS / "records").rglob("*.json")]
    assert len(sizes) == len(records)
    assert max(sizes) < 50_000


def test_they_stand_beside_the_papers_numbers_only_with_their_differences() -> None:
    store, registry = Store(RESULTS), Registry(Plugins(external=False))
    rows = rows_of_measurements(map(Measurement.of, store.records()))
    exact = compare_with_paper(rows, store, registry, "table1")
    assert {line[exact.header.index("ours BA / ASR")] for line in exact.lines} == {"–"}
    near = compare_with_paper(rows, store, registry, "table1", near=True)
    shown = [line for line in near.lines if line[near.header.index("ours BA / ASR")] != "–"]
    assert shown
    assert all(line[near.header.index("differs")] for line in shown)
    assert any("dataset.first 10000" in note for note in near.footnotes)


def choose_cells(cells: list[Cell], records: dict[str, Record]) -> list[Cell]:
    """Those that took the least time, with all the stages that they need."""
    recorded = [cell for cell in cells if record_key(cell) in records]
    return sorted(recorded, key=lambda cell: sum(cost.seconds for cost in records[record_key(cell)].costs.values()))


@pytest.mark.slow
@pytest.mark.skipif(not (REAL / "MNIST").is_dir(), reason="BBN_TEST_DATA names no folder with MNIST")
def test_cells_computed_again_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal counts on the same machine; elsewhere within three deviations over seeds, or a point."""
    monkeypatch.setenv("BBN_DATA", str(REAL))
    registry, store = Registry(Plugins(external=False)), Store(tmp_path)
    store.create()
    records = {record.key: record for record in Store(RESULTS).records()}
    cells = make_plan(STUDY / "table1.yaml", registry).cells
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as each of two processes has
    try:
        for cell in choose_cells(cells, records)[:REPEATED]:
            context = Context(torch.device("cpu"), 0)
            provenance = describe(cell, context, registry)
            recorded = records[record_key(cell)]
            again = Stages(cell, store, context, provenance).evaluate()
            exact = is_made_on(recorded, provenance)
            assert compare_runs(recorded, again, list(records.values()), exact) == "", cell.title
    finally:
        torch.set_num_threads(before)
