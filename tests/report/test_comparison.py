"""Two defenses compared over seeds, cells and images; the paper's numbers beside ours."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from backdoor_bench_none.contracts.cell import AXES
from backdoor_bench_none.contracts.measures import Outcomes
from backdoor_bench_none.contracts.record import AxisValue, Record
from backdoor_bench_none.errors import ConfigError
from backdoor_bench_none.maths.statistics import pack_outcomes
from backdoor_bench_none.report.comparison import compare_defenses
from backdoor_bench_none.report.paper import compare_with_paper, read_tables
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


def of_paper(key: str, make_record: MakeRecord, **components: tuple[str, dict[str, Any]]) -> Row:
    made = make_record(key, ba=93, asr=1)
    axes = dict(made.axes)
    for axis, (name, params) in components.items():
        axes[axis] = AxisValue(name=name, label=name, revision=1, params=params)
    (row,) = rows_of([made.model_copy(update={"axes": axes})])
    return row


def test_tables_of_the_paper_are_data_of_the_package() -> None:
    tables = read_tables()
    assert len(tables["table1"]["rows"]) == 26 * 6
    assert {row["defense"] for row in tables["table1"]["rows"]} == {"undefended", "dp-sgd", "nad", "ac", "abl", "none"}
    means = {
        defense: np.mean([row["asr"] for row in tables["table1"]["rows"] if row["defense"] == defense])
        for defense in ("undefended", "none")
    }
    assert (100 * means["undefended"], 100 * means["none"]) == pytest.approx((92.94, 2.00), abs=0.005)


def test_ours_stands_beside_the_papers_row_of_equal_components(make_record: MakeRecord) -> None:
    full = {"dataset": ("cifar10", {}), "architecture": ("resnet18", {"width": 1.0}), "defense": ("none", {"r2": 0.1})}
    attack = ("badnets", {"label_mode": "all_to_one", "size": 3, "trigger_kind": "dynamic", "poison_rate": 0.05})
    table = compare_with_paper([of_paper("0" * 16, make_record, attack=attack, **full)], "table1")
    ours = [row for row in table.lines if row[-1]]
    assert ours == [["badnets", "CIFAR-10", "ResNet18", "none", "93.6 / 1.1", "93.0 / 1.0", "-0.6 / -0.1", "1"]]
    assert "1 of 156 rows" in table.footnotes[0]


@pytest.mark.parametrize(
    ("axis", "component"),
    [
        ("architecture", ("resnet18", {"width": 0.25})),
        ("dataset", ("mnist", {})),
        ("attack", ("badnets", {"label_mode": "all_to_all"})),
        ("activation", ("elu", {})),
    ],
)
def test_another_component_is_not_the_papers(axis: str, component: Any, make_record: MakeRecord) -> None:
    full = {
        "dataset": ("cifar10", {}), "architecture": ("resnet18", {"width": 1.0}), "defense": ("none", {}),
        "attack": ("badnets", {"label_mode": "all_to_one"}),
    }  # fmt: skip
    row = of_paper("0" * 16, make_record, **{**full, axis: component})
    table = compare_with_paper([row], "table1")
    ours = [line for line in table.lines if line[-1]]
    assert [line for line in ours if line[:4] == ["badnets", "CIFAR-10", "ResNet18", "none"]] == []


@pytest.mark.parametrize(("table", "size"), [("table4", 5), ("table4", 20)])
def test_parameters_that_a_table_varies_must_agree(table: str, size: int, make_record: MakeRecord) -> None:
    full = {
        "dataset": ("cifar10", {}), "architecture": ("resnet18", {"width": 1.0}), "defense": ("none", {}),
        "attack": ("badnets", {"label_mode": "all_to_one", "size": size}),
    }  # fmt: skip
    rows = [row for row in compare_with_paper([of_paper("0" * 16, make_record, **full)], table).lines if row[-1]]
    assert [dict(zip(["attack", "dataset", "network", "size"], row, strict=False))["size"] for row in rows] == [
        str(size)
    ]


def test_a_table_that_the_paper_has_not() -> None:
    with pytest.raises(ConfigError, match="no table 'table8'"):
        compare_with_paper([], "table8")


def test_every_table_can_be_compared() -> None:
    for name, table in read_tables().items():
        made = compare_with_paper([], name)
        assert len(made.lines) == len(table["rows"])
        assert all(len(each) == len(made.header) for each in made.lines)


def test_axes_are_those_of_a_cell() -> None:
    assert {"dataset", "attack", "defense", "architecture", "activation"} <= set(AXES)
