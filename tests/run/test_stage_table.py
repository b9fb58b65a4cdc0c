"""The stage table is the only place where a stage is declared: one row and one method add one everywhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backdoor_bench_none.contracts.record import Cost, Record
from backdoor_bench_none.planning import stage_table
from backdoor_bench_none.planning.plan import Plan
from backdoor_bench_none.planning.stage_table import STAGES, artifact_keys, in_order, needs_of, stages_of
from backdoor_bench_none.registry.components import Registry
from backdoor_bench_none.results.store import Store
from backdoor_bench_none.run.runner import pack_jobs
from backdoor_bench_none.run.stages import Stages

#: adds the stage `ranking`, in this process and in those that compute; its artifact tells one computation from another
ADDITION = """
import time
import torch
from backdoor_bench_none.contracts.cell import AXES
from backdoor_bench_none.planning import stage_table
from backdoor_bench_none.results.store import Artifact
from backdoor_bench_none.run.stages import Stages
from backdoor_bench_none.seeds import content_key


def ranking(self):
    return self._artifact("ranking", lambda: Artifact({"time": torch.tensor(time.time_ns())}, {}))


row = stage_table.Stage(
    "ranking", "rankings", lambda cell: content_key("ranking", stage_table.NEEDED_key(cell)),
    lambda cell: ("NEEDED",), "ranking of samples", SHARED, AXES,
)
if not any(stage.name == "ranking" for stage in stage_table.STAGES):
    stage_table.STAGES = (*stage_table.STAGES[:-1], row, stage_table.STAGES[-1])
Stages.ranking = ranking
"""


@pytest.fixture
def add_stage(write_benchmark: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], Path]:
    """Writes a tiny benchmark and a bbnfile.py that adds a stage; both are taken back in the end."""
    monkeypatch.setattr(stage_table, "STAGES", STAGES)
    monkeypatch.setattr(Stages, "ranking", None, raising=False)

    def add(shared: bool) -> Path:
        needed = "poison" if shared else "defense"
        path = write_benchmark()
        code = ADDITION.replace("SHARED", str(shared)).replace("NEEDED", needed)
        (path.parent / "bbnfile.py").write_text(code)
        return path

    return add


def artifacts(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "results/artifacts/rankings").rglob("*.safetensors")}


def the_record(folder: Path, defense: str = "none") -> Record:
    (record,) = [one for one in Store(folder / "results").records() if one.axes["defense"].name == defense]
    return record


@pytest.mark.parametrize("shared", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_row_and_a_method_add_a_stage(shared: bool, add_stage: Callable[[bool], Path], bbn: Any) -> None:
    folder = add_stage(shared).parent
    said = bbn("plan")
    assert ("1 ranking of samples" in said.out) == shared  # packed: one job for both cells, or part of theirs
    assert bbn("run").code == 0  # run
    kept = artifacts(folder)
    assert len(kept) == (1 if shared else 2)  # kept
    record = the_record(folder)
    assert "ranking" in record.costs
    assert any(name.startswith(str(record.upstream["ranking"])) for name in kept)
    shown = bbn("results", "show", record.key).out.splitlines()
    first_words = [line.split(" ")[0] for line in shown]
    assert first_words.index("defense") < first_words.index("ranking") < first_words.index("evaluate")  # shown
    assert bbn("run").code == 0
    assert artifacts(folder) == kept
    assert bbn("run", "--only", "all").code == 0
    assert not set(artifacts(folder)) & set(kept)  # forgotten


def test_a_record_of_another_version_is_shown_as_it_is(
    write_benchmark: Callable[..., Path], make_record: Callable[..., Record], bbn: Any, tmp_path: Path
) -> None:
    write_benchmark()
    costs = {"evaluate": Cost(seconds=1), "warp drive": Cost(seconds=2, peak_memory=2**20), "data": Cost(seconds=3)}
    record = make_record().model_copy(update={"costs": costs})
    Store(tmp_path / "results").write_record(record)
    said = bbn("results", "show", record.key)
    assert said.code == 0
    lines = [line for line in said.out.splitlines() if line.split(" ")[0] in ("data", "evaluate", "warp")]
    assert [line.split()[0] for line in lines] == ["data", "evaluate", "warp"]
    assert "2.00 s, 1 MiB at most" in lines[-1]
    page = tmp_path / "report.html"
    assert bbn("report", "--output", page).code == 0


def test_unknown_names_come_last_by_name() -> None:
    assert in_order({"zeta", "victim", "alpha", "data"}) == ["data", "victim", "alpha", "zeta"]


def test_every_row_has_a_method() -> None:
    assert all(callable(getattr(Stages, stage.name)) for stage in STAGES)


def test_every_stage_comes_after_those_that_it_needs(tiny_plan: Callable[..., Plan]) -> None:
    attacks = "clean, badnets, natural, adaptive, {name: label_consistent, params: {class_rate: 0.5}}"
    plan = tiny_plan(attack=attacks, defense="no_defense, none, dp_sgd", trainer="centralized, transfer")
    for cell in plan.cells:
        names = [stage.name for stage in stages_of(cell)]
        for stage in stages_of(cell):
            assert all(names.index(need.name) < names.index(stage.name) for need in needs_of(stage, cell))


def test_a_cell_has_the_stages_that_its_components_ask_for(tiny_plan: Callable[..., Plan]) -> None:
    def names(**axes: str) -> list[str]:
        return list(artifact_keys(tiny_plan(**axes).cells[0]))

    assert names(attack="badnets", defense="none") == ["data", "poison", "victim", "defense"]
    assert names(attack="badnets", defense="dp_sgd") == ["data", "poison", "defense"]
    assert names(attack="adaptive", defense="none") == ["data", "poison", "benign", "victim", "defense"]
    assert names(attack="adaptive", defense="dp_sgd") == ["data", "poison", "defense"]
    assert names(attack="natural", defense="none") == ["data", "poison", "victim", "defense", "search"]
    crafted = "{name: label_consistent, params: {class_rate: 0.5}}"
    assert names(attack=crafted, defense="none") == ["data", "crafter", "poison", "victim", "defense"]
    whole = names(attack="hidden_trigger", defense="none", trainer="transfer")
    assert whole == ["data", "backbone", "poison", "victim", "defense"]


def test_jobs_wait_for_all_that_they_read(tiny_plan: Callable[..., Plan], tmp_path: Path) -> None:
    plan = tiny_plan(attack="adaptive, badnets", defense="none", trainer="centralized")
    jobs = {job.id: job for job in pack_jobs(plan.cells, Store(tmp_path / "empty"))}
    kinds = {job.id: job.kind for job in jobs.values()}
    assert len(jobs) == 1 + 2 + 1 + 2 + 2  # data, poisoned sets, one benign network, victims, cells
    for job in jobs.values():
        needed = sorted(kinds[need] for need in job.needs)
        expected = {"data": [], "poison": ["data"], "benign": ["data"], "cell": ["data", "poison", "victim"]}
        if job.kind == "victim":
            assert needed in (["data", "poison"], ["benign", "data", "poison"])
        else:
            assert needed == expected[job.kind]


def test_plugins_of_another_registry_see_the_table_as_it_was() -> None:
    Registry.default()
    assert [stage.name for stage in stage_table.STAGES] == [
        "data", "crafter", "backbone", "poison", "benign", "victim", "defense", "search", "evaluate",
    ]  # fmt: skip
