"""Two defenses compared over seeds, cells and images; the paper's numbers beside ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from backdoor_bench_none.contracts.cell import AXES, Cell
from backdoor_bench_none.contracts.measures import Outcomes
from backdoor_bench_none.contracts.record import Record
from backdoor_bench_none.errors import ConfigError
from backdoor_bench_none.maths.statistics import pack_outcomes
from backdoor_bench_none.paper.experiments import read_tables
from backdoor_bench_none.paper.presets import benchmark_text
from backdoor_bench_none.planning.plan import plan_config
from backdoor_bench_none.planning.reading import parse_config
from backdoor_bench_none.planning.stage_table import record_key
from backdoor_bench_none.registry.components import Registry
from backdoor_bench_none.registry.plugins import Plugins
from backdoor_bench_none.report.comparison import compare_defenses
from backdoor_bench_none.report.paper import compare_with_paper
from backdoor_bench_none.results.measurement import Measurement
from backdoor_bench_none.results.rows import Row, rows_of_measurements
from backdoor_bench_none.results.store import Store

MakeRecord = Callable[..., Record]


@pytest.fixture
def record(make_record: MakeRecord) -> MakeRecord:
    """As `make_record`, each with a key of its own."""
    keys = (f"{number:016x}" for number in count())
    return lambda **fields: make_record(next(keys), **fields)


def rows_of(records: list[Record]) -> list[Row]:
    return rows_of_measurements(map(Measurement.of, records))


def line(table: Any, *start: str) -> dict[str, str]:
    (cells,) = [line for line in table.lines if line[: len(start)] == list(start)]
    return dict(zip(table.header, cells, strict=True))


def test_paired_over_seeds(record: MakeRecord, tmp_path: Path) -> None:
    one, other = [90, 92, 91], [80, 85, 79]
    records = [record(axes={"defense": "none"}, ba=ba, asr=5, seed=seed) for seed, ba in enumerate(one)]
    records += [record(axes={"defense": "nad"}, ba=ba, asr=5, seed=seed) for seed, ba in enumerate(other)]
    cells = line(compare_defenses(rows_of(records), "none", "nad", tmp_path), "badnets", "BA ↑")
    expected = stats.ttest_rel(one, other)
    assert cells["none − nad"] == f"{np.mean(np.subtract(one, other)):+.1f}"
    assert cells["p"] == f"{expected.pvalue:.3f}"
    interval = expected.confidence_interval()
    assert cells["95 %"] == f"{interval.low:+.1f} to {interval.high:+.1f}"
    assert (cells["pairs"], cells["verdict"]) == ("3", "none is better")
    assert (
        line(compare_defenses(rows_of(records), "nad", "none", tmp_path), "badnets", "BA ↑")["verdict"]
        == "none is better"
    )


def test_a_lower_attack_success_rate_is_better(record: MakeRecord, tmp_path: Path) -> None:
    records = [record(axes={"defense": "none"}, asr=asr, seed=seed) for seed, asr in enumerate([1, 2, 3])]
    records += [record(axes={"defense": "nad"}, asr=asr, seed=seed) for seed, asr in enumerate([50, 52, 51])]
    assert (
        line(compare_defenses(rows_of(records), "none", "nad", tmp_path), "badnets", "ASR ↓")["verdict"]
        == "none is better"
    )


def test_equal_numbers_and_single_seeds(record: MakeRecord, tmp_path: Path) -> None:
    records = [record(axes={"defense": name}, seed=seed) for name in ("none", "nad") for seed in (0, 1)]
    assert (
        line(compare_defenses(rows_of(records), "none", "nad", tmp_path), "badnets", "BA ↑")["verdict"]
        == "not distinguishable"
    )
    cells = line(compare_defenses(rows_of(records[::2]), "none", "nad", tmp_path), "badnets", "BA ↑")
    assert (cells["pairs"], cells["p"], cells["verdict"]) == ("1", "–", "cannot be told from one seed")


def test_over_all_cells(record: MakeRecord, tmp_path: Path) -> None:
    records = [
        record(axes={"defense": name, "attack": attack}, ba=ba + seed * step, seed=seed)
        for name, step in (("none", 1), ("nad", 2))
        for attack, ba in (("badnets", 90), ("blended", 70))
        for seed in (0, 1)
    ]  # fmt: skip
    cells = line(compare_defenses(rows_of(records), "none", "nad", tmp_path), "all", "BA ↑")
    assert (cells["pairs"], cells["none − nad"]) == ("4", "-0.5")
    assert cells["p"] == f"{stats.ttest_rel([90, 91, 70, 71], [90, 92, 70, 72]).pvalue:.3f}"


def test_per_image(record: MakeRecord, tmp_path: Path) -> None:
    """12 images that only the first gets right, 2 that only the second does: an exact binomial test of 2 in 14."""
    first, second = np.ones(100, bool), np.ones(100, bool)
    first[:2], second[2:14] = False, False
    records = [
        record(axes={"defense": name}, ba=int(hits.sum()), outcomes=Outcomes(benign=pack_outcomes(hits), attacked=None))
        for name, hits in (("none", first), ("nad", second))
    ]
    store = Store(tmp_path)
    for each in records:
        store.write_record(each)
    table = compare_defenses(rows_of(records), "none", "nad", tmp_path)
    assert line(table, "badnets", "BA ↑")["p per image"] == f"{stats.binomtest(2, 14).pvalue:.3f}"
    assert line(table, "badnets", "ASR ↓")["p per image"] == "–"


@pytest.mark.parametrize(
    ("names", "message"), [(("none", "nadd"), "no cell has the defense 'nadd'"), (("none", "none"), "itself")]
)
def test_what_cannot_be_compared(names: tuple[str, str], message: str, record: MakeRecord, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        compare_defenses(rows_of([record(axes={"defense": "none"}), record(axes={"defense": "nad"})]), *names, tmp_path)


# the paper


REGISTRY = Registry(Plugins(external=False))


@pytest.fixture
def paper_cells(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], list[Cell]]:
    """The cells of a table's benchmark file, without data."""
    monkeypatch.setenv("BBN_DATA", str(tmp_path))

    def make(table: str) -> list[Cell]:
        config, source = parse_config(benchmark_text(table))
        return plan_config(config, source, REGISTRY).cells

    return make


def keep(store: Store, cell: Cell, make_record: MakeRecord) -> Row:
    """A record of `cell` in `store`, with BA 93 % and ASR 1 %, and its row."""
    made = make_record(record_key(cell), ba=93, asr=1)
    kept = Record.of(cell, made.key, "done", counts=made.counts, costs=made.costs)
    store.create()
    store.write_record(kept)
    (row,) = rows_of([kept])
    return row


def find(cells: list[Cell], **names: str) -> Cell:
    (cell,) = [cell for cell in cells if all(cell.choices[axis].label == label for axis, label in names.items())]
    return cell


ONE_CELL = {"dataset": "cifar10", "attack": "badnets", "architecture": "resnet18", "defense": "none"}
ITS_ROW = ["badnets", "CIFAR-10", "ResNet18", "none"]


def test_tables_of_the_paper_are_data_of_the_package() -> None:
    tables = read_tables()
    assert len(tables["table1"]["rows"]) == 26 * 6
    assert {row["defense"] for row in tables["table1"]["rows"]} == {"undefended", "dp-sgd", "nad", "ac", "abl", "none"}
    means = {
        defense: np.mean([row["asr"] for row in tables["table1"]["rows"] if row["defense"] == defense])
        for defense in ("undefended", "none")
    }
    assert (100 * means["undefended"], 100 * means["none"]) == pytest.approx((92.94, 2.00), abs=0.005)


def test_the_same_cell_stands_beside_the_papers_row(
    paper_cells: Callable[[str], list[Cell]], make_record: MakeRecord, tmp_path: Path
) -> None:
    store = Store(tmp_path / "results")
    row = keep(store, find(paper_cells("table1"), **ONE_CELL), make_record)
    table = compare_with_paper([row], store, REGISTRY, "table1")
    assert [line for line in table.lines if line[-1]] == [[*ITS_ROW, "93.6 / 1.1", "93.0 / 1.0", "-0.6 / -0.1", "1"]]
    assert "1 of 156 rows" in table.footnotes[0]
    assert "registration" in table.footnotes[-1]


CHANGES: dict[str, tuple[Callable[[Cell], Cell], str]] = {
    "width": (lambda cell: with_params(cell, "architecture", width=0.25), "architecture.width 0.25, not 1.0"),
    "epochs": (
        lambda cell: replace(cell, recipe=cell.recipe.model_copy(update={"epochs": 20})), "recipe.epochs 20, not 200"
    ),
    "rate": (lambda cell: with_params(cell, "attack", poison_rate=0.1), "attack.poison_rate 0.1, not 0.05"),
    "procedure": (
        lambda cell: with_params(cell, "defense", procedure="algorithm1"),
        "defense.procedure algorithm1, not released",
    ),
}  # fmt: skip


def with_params(cell: Cell, axis: str, **params: Any) -> Cell:
    choice = cell.choices[axis]
    return replace(cell, **{axis: replace(choice, component=choice.component.model_copy(update=params))})


@pytest.mark.parametrize("name", CHANGES)
def test_a_cell_that_differs_is_shown_only_with_near_and_with_its_difference(
    name: str, paper_cells: Callable[[str], list[Cell]], make_record: MakeRecord, tmp_path: Path
) -> None:
    change, difference = CHANGES[name]
    store = Store(tmp_path / "results")
    row = keep(store, change(find(paper_cells("table1"), **ONE_CELL)), make_record)
    exact = compare_with_paper([row], store, REGISTRY, "table1")
    assert [line for line in exact.lines if line[5] != "–"] == []
    assert "--near shows 1 more" in exact.footnotes[1]
    near = compare_with_paper([row], store, REGISTRY, "table1", near=True)
    (shown,) = [line for line in near.lines if line[5] != "–"]
    assert shown == [*ITS_ROW, "93.6 / 1.1", "93.0 / 1.0", "-0.6 / -0.1", "1", "[1]"]
    assert f"[1] {difference}" in near.footnotes


def test_of_several_cells_the_closest_is_shown(
    paper_cells: Callable[[str], list[Cell]], make_record: MakeRecord, tmp_path: Path
) -> None:
    store, cell = Store(tmp_path / "results"), find(paper_cells("table1"), **ONE_CELL)
    changed = [CHANGES["width"][0](CHANGES["rate"][0](cell)), CHANGES["epochs"][0](cell)]
    rows = [keep(store, each, make_record) for each in changed]
    near = compare_with_paper(rows, store, REGISTRY, "table1", near=True)
    assert [line[-1] for line in near.lines if line[5] != "–"] == ["[1]"]
    assert "[1] recipe.epochs 20, not 200" in near.footnotes


def test_near_without_any_cell_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BBN_DATA", str(tmp_path))
    with pytest.raises(ConfigError, match="no cell here has the components of a row of table4"):
        compare_with_paper([], Store(tmp_path), REGISTRY, "table4", near=True)


def test_a_table_that_the_paper_has_not(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no table 'table8'"):
        compare_with_paper([], Store(tmp_path), REGISTRY, "table8")


def test_every_table_can_be_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BBN_DATA", str(tmp_path))
    for name, table in read_tables().items():
        made = compare_with_paper([], Store(tmp_path), REGISTRY, name)
        assert len(made.lines) == len(table["rows"])
        assert all(len(each) == len(made.header) for each in made.lines)


def test_axes_are_those_of_a_cell() -> None:
    assert {"dataset", "attack", "defense", "architecture", "activation"} <= set(AXES)
