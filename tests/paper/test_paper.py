"""The paper's benchmark files can be planned and written, at both scales."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backdoor_bench_none.contracts.cell import AXES, Cell
from backdoor_bench_none.errors import ConfigError
from backdoor_bench_none.paper.experiments import experiments_of, read_tables
from backdoor_bench_none.paper.presets import benchmark_names, benchmark_text, merge_blocks
from backdoor_bench_none.planning.plan import plan_config
from backdoor_bench_none.planning.reading import parse_config
from backdoor_bench_none.registry.components import Registry
from backdoor_bench_none.registry.plugins import Plugins

#: table or figure -> number of cells; table 10 has one cell twice
CELLS = {
    "table1": 150, "table2": 12, "table3": 18, "table4": 12, "table5": 18, "table6": 8, "table7": 10, "table9": 14,
    "table10": 7, "table11": 4, "table12": 8, "fig2": 2, "fig4": 2, "fig5": 1, "fig6": 4, "fig7": 4,
    "fig8": 25, "fig9": 37, "fig10": 6,
}  # fmt: skip


@pytest.mark.parametrize("name", CELLS)
def test_benchmarks_of_the_paper_can_be_planned(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BBN_DATA", str(tmp_path))
    config, source = parse_config(benchmark_text(name), f"{name}.yaml")
    plan = plan_config(config, source, Registry(Plugins(external=False)))
    assert len(plan.cells) == CELLS[name]
    assert not plan.skipped


def test_sweeps_are_the_papers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BBN_DATA", str(tmp_path))

    def swept(name: str, parameter: str) -> list[Any]:
        config, source = parse_config(benchmark_text(name))
        cells = plan_config(config, source, Registry(Plugins(external=False))).cells
        return list(dict.fromkeys(getattr(cell.attack.component, parameter) for cell in cells))

    assert swept("table4", "size") == [3, 5, 7, 9, 15, 20]
    assert swept("table4", "trigger_kind") == ["dynamic"]
    assert swept("table5", "trigger_kind") == ["dynamic", "static", "watermark"]
    assert swept("table6", "poison_rate") == [0.005, 0.05, 0.1, 0.2]
    assert swept("table12", "alpha") == [1e-4, 1e-3, 1e-2, 1e-1]


def test_every_benchmark_is_known_here() -> None:
    assert set(benchmark_names()) == {*CELLS, "hidden_trigger"}


def test_imagenet_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    config, source = parse_config(benchmark_text("hidden_trigger"))
    with pytest.raises(ConfigError, match=r"alexnet.pth' cannot be read|imagenet is not a folder"):
        plan_config(config, source, Registry(Plugins(external=False)))


def test_init_writes_them(bbn: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "table4.yaml"
    assert bbn("init", path, "--from", "table4").code == 0
    assert path.read_text(encoding="utf-8") == benchmark_text("table4")
    said = bbn("init", tmp_path / "b.yaml", "--from", "table44")
    assert said.code == 2
    assert "table4" in said.err


@pytest.mark.parametrize("table", read_tables())
def test_every_row_is_a_whole_cell_or_says_why_not(table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BBN_DATA", str(tmp_path))
    config, source = parse_config(benchmark_text(table))
    cells = plan_config(config, source, Registry(Plugins(external=False))).cells
    planned = {tuple(cell.choices[axis].label for axis in AXES): cell for cell in cells}
    experiments = experiments_of(table)
    assert {each.labels for each in experiments if not each.unavailable} == set(planned)
    for each in experiments:
        assert tuple(each.entries) == AXES
        if not each.unavailable:
            assert_is_the_row(planned[each.labels], each.row, table)


def assert_is_the_row(cell: Cell, row: Mapping[str, Any], table: str) -> None:
    """What the row of the paper names is what the cell has."""
    attack, defense = cell.attack.component.model_dump(), cell.defense.component.model_dump()
    assert cell.architecture.name == row.get("network", "ResNet18").lower()
    assert cell.architecture.component.model_dump()["width"] == 1
    if table != "table11":
        assert (cell.recipe.epochs, cell.recipe.lr, cell.recipe.schedule) == (200, 0.1, "step")
    for name, parameter in (("trigger_size", "size"), ("poison_rate", "poison_rate"), ("alpha", "alpha")):
        if name in row:
            assert attack[parameter] == float(row[name])
    for name in {"lambda_h", "lambda_l"} & set(row):
        assert defense[name] == row[name]
    if "selection_threshold" in row:
        shares = {"1": 0.0, "0.5%": 0.005, "1%": 0.01, "10%": 0.1, "30%": 0.3, "50%": 0.5, "100%": 1.0}
        assert defense["r2"] == shares[row["selection_threshold"]]
    assert (attack.get("label_mode") == "all_to_all") == ("all-to-all" in row["attack"])


def test_rows_without_data_are_left_out_with_the_reason(bbn: Callable[..., Any], tmp_path: Path) -> None:
    assert bbn("init", tmp_path / "b.yaml", "--from", "table2").code == 0
    assert "# Left out: TrojAI's training sets were never published." in (tmp_path / "b.yaml").read_text()
    reasons = {each.row["dataset"]: each.unavailable for each in experiments_of("table1") if each.unavailable}
    assert list(reasons) == ["ImageNet-pair"]


@pytest.mark.parametrize(("table", "cells"), [("table1", 15 * 7 * 3), ("table4", 6 * 3 * 3), ("table12", 4 * 3 * 3)])
def test_a_table_at_the_small_scale(
    table: str, cells: int, bbn: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """15 rows of Table 1 are on MNIST and CIFAR-10; each has the paper's six columns and one more, and three seeds."""
    monkeypatch.setenv("BBN_DATA", str(tmp_path))
    path = tmp_path / "small.yaml"
    assert bbn("init", path, "--from", table, "--scale", "small").code == 0
    config, source = parse_config(path.read_text(), "small.yaml")
    plan = plan_config(config, source, Registry(Plugins(external=False)))
    assert len(plan.cells) == cells
    for cell in plan.cells:
        assert cell.dataset.component.model_dump()["first"] == cell.info.train_size == 10_000
        assert cell.architecture.component.model_dump()["width"] == 0.25
        assert not cell.recipe.augment
        if cell.defense.name == "abl":
            assert cell.defense.component.unlearning_epochs == 16
    assert {cell.defense.name for cell in plan.cells} >= {"no_defense", "none", "none_retrain"}


@pytest.mark.parametrize("figure", ["fig2", "fig4", "fig5", "fig8", "fig9", "fig10"])
def test_a_figure_at_the_small_scale(figure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BBN_DATA", str(tmp_path))
    config, source = parse_config(benchmark_text(figure, "small"), f"{figure}.yaml")
    plan = plan_config(config, source, Registry(Plugins(external=False)))
    assert len(plan.cells) == CELLS[figure]
    for cell in plan.cells:
        assert (cell.dataset.name, cell.info.train_size) == ("cifar10", 10_000)
        assert cell.architecture.component.model_dump()["width"] == 0.25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--from", "fig6", "--scale", "small"], "'fig6' has no scale 'small'; tables have, and fig2,"),
     (["--scale", "small"], "--scale goes with --from"),
     (["--from", "digits-v1", "--scale", "small"], "'digits-v1'")],
)  # fmt: skip
def test_what_has_no_small_scale(arguments: list[str], message: str, bbn: Callable[..., Any], tmp_path: Path) -> None:
    said = bbn("init", tmp_path / "b.yaml", *arguments)
    assert said.code == 2
    assert message in said.err


VARIED = ("dataset", "attack", "defense")
ENTRIES = st.fixed_dictionaries({axis: st.sampled_from([{"name": name} for name in "abc"]) for axis in VARIED})


@given(cells=st.lists(ENTRIES, min_size=1, max_size=12))
def test_merged_blocks_cross_to_exactly_their_cells(cells: list[dict[str, dict[str, str]]]) -> None:
    blocks = merge_blocks([{**cell, "architecture": {"name": "x"}, "activation": {"name": "y"}} for cell in cells])
    crossed: list[tuple[str, ...]] = []
    for block in blocks:
        crossed += itertools.product(*([entry["name"] for entry in block[axis]] for axis in VARIED))
    assert sorted(crossed) == sorted({tuple(cell[axis]["name"] for axis in VARIED) for cell in cells})
