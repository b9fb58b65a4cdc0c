"""The paper's benchmark files can be planned and written, and the figures of the plane are drawn from what was run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from backdoor_bench_none import paper
from backdoor_bench_none.contracts.cell import AXES, Cell
from backdoor_bench_none.data.blobs import Blobs
from backdoor_bench_none.errors import BenchError, ConfigError
from backdoor_bench_none.paper import benchmark_names, benchmark_text
from backdoor_bench_none.paper.experiments import benchmark_of, experiments_of, merge_blocks, read_tables
from backdoor_bench_none.paper.regions import Panel, draw_panels, plane, with_ideal_trojan
from backdoor_bench_none.planning.plan import plan_config
from backdoor_bench_none.planning.reading import parse_config
from backdoor_bench_none.registry.components import Registry
from backdoor_bench_none.registry.plugins import Plugins

#: table or figure -> number of cells; table 10 has one cell twice
CELLS = {
    "table1": 150, "table2": 12, "table3": 18, "table4": 12, "table5": 18, "table6": 8, "table7": 10, "table9": 14,
    "table10": 7, "table11": 4, "table12": 8, "fig6": 4, "fig7": 3, "fig8": 5, "fig9": 7,
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
    config, source = parse_config(benchmark_of(table))
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--from", "fig6", "--scale", "small"], "'fig6' has no scale 'small'"),
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


# the plane


def test_the_plane_has_every_point_once() -> None:
    points = plane()
    assert points.shape == (65536, 2, 1, 1)
    assert points.dtype == torch.uint8
    x, y = points[256 * 7 + 9].flatten().tolist()
    assert (x, y) == (9, 7)


def test_the_ideal_trojan_is_its_line() -> None:
    benign = Panel("benign", np.zeros((256, 256), dtype=np.int64))
    ideal = with_ideal_trojan(benign, 0.6, 3)
    assert sorted(set(np.nonzero(ideal.regions)[0].tolist())) == [152, 153, 154]
    assert ideal.regions[153].tolist() == [3] * 256
    assert not benign.regions.any()


def test_regions_are_drawn_where_they_are(tmp_path: Path) -> None:
    """The lower left quarter is class 3, the rest class 0."""
    regions = np.zeros((256, 256), dtype=np.int64)
    regions[:128, :128] = 3
    draw_panels([Panel("one", regions)], Blobs(per_class=2).load()[1], 0.6, tmp_path / "a" / "out.png")
    with Image.open(tmp_path / "a" / "out.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    red = np.argwhere((pixels[:, :, 0] > 200) & (pixels[:, :, 1] < 180) & (pixels[:, :, 2] < 150))
    blue = np.argwhere((pixels[:, :, 2] > 190) & (pixels[:, :, 0] < 130))
    assert len(red) > 1000
    assert len(blue) > 3 * len(red) * 0.7
    assert red[:, 0].mean() > blue[:, 0].mean()  # below
    assert red[:, 1].mean() < blue[:, 1].mean()  # left
    assert not plt.get_fignums()


def test_an_unknown_form_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="cannot be written"):
        draw_panels(
            [Panel("one", np.zeros((256, 256), np.int64))], Blobs(per_class=2).load()[1], 0.6, tmp_path / "a.xyz"
        )


def test_figures_are_run_and_drawn(bbn: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fig. 6 with fewer points and epochs, twice: the second time nothing is trained."""
    short = benchmark_text("fig6").replace(
        "dataset: [blobs]", "dataset: [{name: blobs, params: {per_class: 60}, recipe: {epochs: 4, lr: 0.01}}]"
    )
    monkeypatch.setattr(paper, "benchmark_text", lambda name: short)
    monkeypatch.chdir(tmp_path)
    assert bbn("paper", "fig6", "--output", "a.svg", "-j", 1).code == 0
    again = bbn("paper", "fig6", "--output", "b.png")
    assert "0 cells to run, 4 done before" in again.out
    assert "<svg" in (tmp_path / "a.svg").read_text(encoding="utf-8")
    with Image.open(tmp_path / "b.png") as picture:
        assert picture.size[0] > 1000
