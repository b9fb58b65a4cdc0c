"""Tables: axes, metrics, the best and what is not distinguishable from it, what is missing."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import count, pairwise
from typing import Any

import pytest

from backdoor_bench_none.contracts.cell import AXES
from backdoor_bench_none.contracts.record import Record
from backdoor_bench_none.errors import ConfigError
from backdoor_bench_none.maths.statistics import wilson_interval
from backdoor_bench_none.report.pivot import Box, Layout, Pivot, pivot
from backdoor_bench_none.report.tables import render
from backdoor_bench_none.results.measurement import Measurement
from backdoor_bench_none.results.metrics import METRICS
from backdoor_bench_none.results.rows import Row, rows_of_measurements

MakeRows = Callable[..., list[Row]]
#: defense -> (BA, ASR) in hits of 100 for each seed
SEEDS = {
    "no_defense": [(92, 99), (93, 98), (92, 99)],
    "none": [(91, 2), (92, 4), (90, 3)],
    "nad": [(80, 3), (82, 4), (81, 2)],
    "abl": [(70, 60), (71, 61), (69, 59)],
}


@pytest.fixture
def rows(make_record: Callable[..., Record]) -> MakeRows:
    """The rows of these numbers by defense; keywords are fields of all records."""
    keys = (f"{number:016x}" for number in count())

    def make(
        numbers: dict[str, Sequence[tuple[int, int | None]]], axes: dict[str, str] | None = None, **fields: Any
    ) -> list[Row]:
        records = [
            make_record(next(keys), ba=ba, asr=asr, seed=seed, axes={"defense": defense, **(axes or {})}, **fields)
            for defense, seeds in numbers.items()
            for seed, (ba, asr) in enumerate(seeds)
        ]
        return rows_of_measurements(map(Measurement.of, records))

    return make


def box(made: Pivot, line: str, column: str) -> Box:
    boxes = next(boxes for labels, boxes in made.lines if line in labels)
    box = boxes[made.columns.index(column)]
    assert box is not None
    return box


def test_lines_columns_and_header(rows: MakeRows) -> None:
    made = pivot([*rows(SEEDS), *rows(SEEDS, {"attack": "blended"})])
    assert made.axes == ("attack",)
    assert made.header == ["attack", "abl", "nad", "no_defense", "none"]
    assert [labels for labels, _ in made.lines] == [("badnets",), ("blended",)]
    assert made.title == "digits · mlp · relu · mean over 3 seeds"


def test_any_axis_makes_lines_or_columns(rows: MakeRows) -> None:
    data = [*rows(SEEDS), *rows(SEEDS, {"architecture": "resnet18"})]
    made = pivot(data, Layout(("defense",), ("architecture",), ("ba",)))
    assert made.header == ["defense", "mlp", "resnet18"]
    assert box(made, "none", "mlp").text() == "91.0 ±1.0"


def test_axes_that_vary_and_are_not_named_make_lines(rows: MakeRows) -> None:
    data = [*rows(SEEDS), *rows(SEEDS, {"attack": "blended"})]
    made = pivot(data, Layout(("architecture",), ("defense",)))
    assert made.axes == ("architecture", "attack")
    assert len(made.lines) == 2


def test_mean_deviation_and_the_numbers_of_a_cell(rows: MakeRows) -> None:
    made = pivot(rows(SEEDS))
    assert [part.text for part in box(made, "badnets", "nad").parts] == ["81.0 ±1.0", "3.0 ±1.0"]


def test_best_and_close(rows: MakeRows) -> None:
    """BA: none beats nad by 10 points with little spread; ASR: both about 3."""
    made = pivot(rows(SEEDS))
    none, nad, abl = (box(made, "badnets", defense) for defense in ("none", "nad", "abl"))
    assert [part.best for part in none.parts] == [True, True]
    assert [(part.best, part.close) for part in nad.parts] == [(False, False), (True, False)]  # equal means: both best
    assert [(part.best, part.close) for part in abl.parts] == [(False, False), (False, False)]
    assert "not distinguishable" in made.footnotes[0]


def test_not_distinguishable_from_the_best(rows: MakeRows) -> None:
    made = pivot(rows({"none": [(90, 2), (92, 4), (91, 3)], "nad": [(92, 1), (90, 9), (91, 5)]}))
    assert [(part.best, part.close) for part in box(made, "badnets", "nad").parts] == [(False, False), (False, True)]
    assert box(made, "badnets", "nad").text() == "91.0 ±1.0 / 5.0 ±4.0≈"


def test_baseline_and_oracle_do_not_compete(rows: MakeRows) -> None:
    oracle = rows({"oracle_filter": [(99, 0)] * 3}, sees_ground_truth=True)
    made = pivot([*rows(SEEDS), *oracle])
    for column in ("no_defense", "oracle_filter*"):
        assert not any(part.best for part in box(made, "badnets", column).parts)
    assert any("oracle_filter was told which samples are poisoned" in note for note in made.footnotes)


def test_mean_ranks_with_ties(rows: MakeRows) -> None:
    data = [*rows(SEEDS), *rows({"none": [(80, 9)], "nad": [(85, 1)], "abl": [(80, 50)]}, {"attack": "blended"})]
    # BA: badnets none 1, nad 2, abl 3; blended nad 1, none and abl 2.5 each. ASR: 1.5, 1.5, 3 and 2, 1, 3
    notes = [note for note in pivot(data).footnotes if note.startswith("Mean rank")]
    assert notes == [
        "Mean rank by BA over 2 combinations, ties averaged: nad 1.5, none 1.8, abl 2.8",
        "Mean rank by ASR over 2 combinations, ties averaged: nad 1.2, none 1.8, abl 3",
    ]


def test_ranks_leave_out_combinations_in_which_a_defense_is_missing(rows: MakeRows) -> None:
    data = [*rows(SEEDS), *rows({"none": [(80, 9)], "nad": [(85, 1)]}, {"attack": "blended"})]
    assert not [note for note in pivot(data).footnotes if note.startswith("Mean rank")]


def test_one_seed_is_not_tested(rows: MakeRows) -> None:
    made = pivot(rows({"none": [(90, 2)], "nad": [(89, 3)]}))
    assert not any(part.close for part in box(made, "badnets", "nad").parts)
    assert "≈" not in made.footnotes[0]
    assert made.title.endswith("1 seed")


def test_a_lone_defense_is_not_the_best(rows: MakeRows) -> None:
    assert not any(part.best for part in box(pivot(rows({"none": [(90, 2)]})), "badnets", "none").parts)


def test_intervals_of_one_seed_are_wilsons(rows: MakeRows) -> None:
    (row,) = rows({"none": [(90, 2)]})
    assert row.intervals["ba"] == wilson_interval(90, 100)
    assert row.intervals["asr"] == wilson_interval(2, 100)
    assert row.deviations == {}


def test_intervals_of_shares_over_seeds_stay_within_0_and_1(rows: MakeRows) -> None:
    (row,) = rows({"none": [(99, 0), (60, 90)]})
    assert (row.intervals["asr"].low, row.intervals["asr"].high) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("metric", "texts"), [("ra", "3.0"), ("der", "–"), ("seconds", "1.0"), ("clean_fraction", "5.0")]
)
def test_every_metric_can_be_shown(metric: str, texts: str, rows: MakeRows) -> None:
    made = pivot(rows({"none": [(90, 3)]}, clean_fraction=0.05), Layout(metrics=(metric,)))
    assert box(made, "badnets", "none*").text() == texts
    assert METRICS[metric].meaning in made.footnotes[0]


def test_status_and_reason_stand_in_the_table(rows: MakeRows, make_record: Callable[..., Record]) -> None:
    failed = make_record("f" * 16, ba=None, axes={"defense": "abl"}, status="failed", reason="it broke")
    made = pivot([*rows({"none": [(90, 3)]}), *rows_of_measurements([Measurement.of(failed)])])
    assert box(made, "badnets", "abl").text() == "failed [1]"
    assert "[1] failed: it broke" in made.footnotes


def test_no_rows() -> None:
    assert pivot([]).lines == []


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(("atack",)), "unknown axis 'atack'"),
        (Layout((), ("seed",)), "unknown axis 'seed'"),
        (Layout(metrics=("acc",)), "unknown metric 'acc'"),
        (Layout(("defense",), ("defense",)), "axis 'defense' is named twice"),
    ],
)
def test_a_layout_that_is_none(layout: Layout, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pivot([], layout)


def test_best_numbers_are_bold_in_every_format(rows: MakeRows) -> None:
    data = rows({"none": [(91, 3)], "nad": [(80, 30)]})
    assert "**91.0** / **3.0**" in render(data, "markdown")
    assert r"\textbf{91.0} / \textbf{3.0}" in render(data, "latex")
    assert "<b>91.0</b> / <b>3.0</b>" in render(data, "html")
    assert "80.0 / 30.0" in render(data, "markdown")


def test_json_has_everything(rows: MakeRows) -> None:
    (row,) = json.loads(render(rows({"none": SEEDS["none"]}), "json"))
    assert row["per_seed"]["ba"] == [0.91, 0.92, 0.90]
    assert row["deviations"]["ba"] == pytest.approx(0.01)
    assert row["intervals"]["ba"]["low"] < 0.91 < row["intervals"]["ba"]["high"]


def test_metrics_are_the_fields_of_a_row() -> None:
    fields = set(Row.__dataclass_fields__)
    assert set(METRICS) <= fields
    assert set(AXES) <= fields
    assert all(one != other for one, other in pairwise(sorted(metric.title for metric in METRICS.values())))


def test_hostile_labels_are_texts(rows: MakeRows) -> None:
    label = r"</td><script>alert(1)</script>\input{x}=1|"
    data = rows({label: [(90, 3)], "none": [(80, 5)]})
    assert "<script>" not in render(data, "html")
    assert "<script>" not in render(data, "markdown")
    assert r"\input" not in render(data, "latex")
    csv_line = next(line for line in render(rows({"=cmd()": [(90, 3)]}), "csv").splitlines() if "cmd" in line)
    assert ",'=cmd()," in csv_line
