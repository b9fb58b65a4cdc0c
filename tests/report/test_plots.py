"""Pictures: the numbers they show, to the digit, and what is written of them."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from statistics import stdev
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from backdoor_bench_none.contracts.record import Record
from backdoor_bench_none.errors import BenchError, ConfigError
from backdoor_bench_none.maths.natural_break import find_breaks
from backdoor_bench_none.maths.statistics import wilson_interval
from backdoor_bench_none.report.plots import canvas
from backdoor_bench_none.report.plots.activations import choose_layers
from backdoor_bench_none.report.plots.canvas import DPI, check_output, draw_shares, legend_lines, plain, write_picture
from backdoor_bench_none.report.plots.curve import draw_curves, find_curves
from backdoor_bench_none.report.plots.labels import find_metrics
from backdoor_bench_none.report.plots.matrix import draw_matrix, make_matrix
from backdoor_bench_none.report.plots.scatter import draw_scatter, find_points
from backdoor_bench_none.report.plots.scores import Scores, draw_scores, find_cut
from backdoor_bench_none.report.plots.sweep import draw_sweep, find_sweep
from backdoor_bench_none.results.measurement import Measurement
from backdoor_bench_none.results.metrics import METRICS
from backdoor_bench_none.results.rows import Row, rows_of_measurements
from backdoor_bench_none.results.store import Store

BA_ASR = (METRICS["ba"], METRICS["asr"])
#: (BA, ASR) in hits of 100 for each seed
NUMBERS = {"no_defense": [(92, 99), (93, 98)], "none": [(91, 2), (87, 4)]}
HOSTILE = "$\\frac{1}{2}$ <b>&amp; \x07\x1b[31m\u202e $x_1"
SVG = "{http://www.w3.org/2000/svg}"

Make = Callable[..., Record]


@pytest.fixture
def make(make_record: Callable[..., Record]) -> Make:
    """As `make_record`, with a key of its own and `params` by axis."""
    keys = (f"{number:016x}" for number in count())

    def build(params: dict[str, dict[str, Any]] | None = None, **fields: Any) -> Record:
        record = make_record(next(keys), **fields)
        axes = {
            axis: value.model_copy(update={"params": (params or {}).get(axis, {})})
            for axis, value in record.axes.items()
        }
        return record.model_copy(update={"axes": axes})

    return build


@pytest.fixture
def measured(make: Make) -> list[Row]:
    """The rows of `NUMBERS`, for two attacks."""
    return as_rows(
        make(ba=ba, asr=asr, seed=seed, axes={"defense": defense, "attack": attack})
        for attack in ("badnets", "blended")
        for defense, seeds in NUMBERS.items()
        for seed, (ba, asr) in enumerate(seeds)
    )


def as_rows(records: Any) -> list[Row]:
    return rows_of_measurements(map(Measurement.of, records))


def texts(path: Path) -> list[str]:
    """All texts of an SVG, which parses as XML and has its texts as texts."""
    return ["".join(text.itertext()) for text in ET.parse(path).getroot().iter(f"{SVG}text")]


def draw(figure: Callable[[], Figure], folder: Path) -> tuple[str, Figure]:
    """The texts of the picture in our style, and the figure."""
    kept: list[Figure] = []

    def keep() -> Figure:
        kept.append(figure())
        return kept[0]

    write_picture(keep, folder / "out.svg")
    return "\n".join(texts(folder / "out.svg")), kept[0]


# scatter


def test_points_are_means_and_intervals(measured: list[Row]) -> None:
    chart = find_points(measured, BA_ASR)
    assert [(point.panel, point.series) for point in chart.points] == [
        ("badnets", "no_defense"), ("badnets", "none"), ("blended", "no_defense"), ("blended", "none"),
    ]  # fmt: skip
    point = chart.points[1]
    assert (point.x.mean, point.y.mean) == pytest.approx((89, 3))
    half = 12.706204736 * stdev([91, 87]) / math.sqrt(2)  # Student's t with one degree of freedom
    assert (point.x.low, point.x.high) == pytest.approx((89 - half, 100))
    assert (point.y.low, point.y.high) == pytest.approx((0, 3 + 12.706204736 * stdev([2, 4]) / math.sqrt(2)))
    assert "Student's t over seeds" in chart.notes[0]
    assert chart.title == "digits · mlp · relu · mean over 2 seeds"


def test_points_of_one_seed_have_wilson_intervals(make: Make) -> None:
    chart = find_points(as_rows([make(ba=90, asr=5)]), BA_ASR)
    interval = wilson_interval(90, 100)
    assert (chart.points[0].x.low, chart.points[0].x.high) == pytest.approx((100 * interval.low, 100 * interval.high))
    assert "Wilson over test images" in chart.notes[0]


def test_series_are_attacks_if_there_is_one_defense(measured: list[Row]) -> None:
    chart = find_points([row for row in measured if row.defense == "none"], BA_ASR)
    assert [(point.panel, point.series) for point in chart.points] == [("", "badnets"), ("", "blended")]
    assert "none" in chart.title


def test_rows_without_numbers_are_counted(make: Make) -> None:
    rows = as_rows([
        make(), make(axes={"attack": "clean"}, asr=None), make(axes={"attack": "sig"}, ba=None, status="failed"),
    ])  # fmt: skip
    chart = find_points(rows, BA_ASR)
    assert len(chart.points) == 1
    assert chart.notes[-1] == "left out, without BA and ASR: 1 not measured, 1 failed"


def test_scatter_has_a_panel_for_each_attack_and_every_point(measured: list[Row], tmp_path: Path) -> None:
    said, figure = draw(partial(draw_scatter, find_points(measured, BA_ASR)), tmp_path)
    for text in ("badnets", "blended", "benign accuracy, BA (%) ↑", "attack success rate, ASR (%) ↓", "no_defense"):
        assert text in said
    assert [len(axis.containers) for axis in figure.axes] == [2, 2]
    x, y = figure.axes[0].containers[1].lines[0].get_data()
    assert (float(x[0]), float(y[0])) == pytest.approx((89, 3))
    looks = {
        (line.get_color(), line.get_marker())
        for axis in figure.axes
        for line in (container.lines[0] for container in axis.containers)
    }
    assert len(looks) == len({colour for colour, _ in looks}) == len({marker for _, marker in looks}) == 2


def test_equal_labels_of_different_parameters_are_different_points(make: Make) -> None:
    rows = as_rows([make({"attack": {"size": 3}}), make({"attack": {"size": 5}})])
    assert len({(point.panel, point.series) for point in find_points(rows, BA_ASR).points}) == 2


def test_too_many_panels(make: Make) -> None:
    rows = as_rows(make(axes={"attack": f"a{i}", "defense": f"d{i % 2}"}) for i in range(30))
    with pytest.raises(ConfigError, match="30 panels are too many") as fault:
        find_points(rows, BA_ASR)
    assert fault.value.hint


# matrix


def test_matrix_has_every_number(measured: list[Row], tmp_path: Path) -> None:
    matrix = make_matrix(measured, BA_ASR)
    assert (matrix.lines, matrix.columns) == (["badnets", "blended"], ["no_defense", "none"])
    assert [entry.value for entry in matrix.maps[0].entries[0]] == pytest.approx([92.5, 89.0])
    assert [entry.text for entry in matrix.maps[1].entries[0]] == ["98.5", "3.0"]
    assert matrix.maps[1].entries[0][1].spread == f"±{stdev([2, 4]):.1f}"
    assert matrix.maps[0].limits == (0, 100)
    said, figure = draw(partial(draw_matrix, matrix), tmp_path)
    for text in ("92.5", "89.0", "98.5", "3.0", "±1.4", "benign accuracy, BA (%) ↑"):
        assert text in said.splitlines()
    assert {mesh.cmap.name for axis in figure.axes[:2] for mesh in axis.collections} == {"viridis", "cividis"}


def test_cells_without_numbers_are_hatched_and_named(make: Make, tmp_path: Path) -> None:
    rows = as_rows([
        make(), make(axes={"attack": "clean"}, asr=None), make(axes={"attack": "sig"}, ba=None, status="failed"),
        make(axes={"defense": "nad"}, ba=None, status="timeout", reason=HOSTILE),
    ])  # fmt: skip
    matrix = make_matrix(rows, BA_ASR)
    assert matrix.maps[1].entries[matrix.lines.index("clean")][1].text == "–"
    said, figure = draw(partial(draw_matrix, matrix), tmp_path)
    assert {"failed [2]", "timeout [1]", "–"} <= set(said.splitlines())
    assert "–: not measured" in said
    hatched = [[patch for patch in axis.patches if patch.get_hatch()] for axis in figure.axes[:2]]
    assert list(map(len, hatched)) == [2, 3]  # of 6 cells, two more are not in the plan: they stay white


def test_scale_of_a_metric_that_is_no_share(make: Make) -> None:
    rows = as_rows(make(axes={"defense": f"d{i}"}, seconds={"defense": float(i)}) for i in (2, 5))
    heat = make_matrix(rows, (METRICS["seconds"],)).maps[0]
    assert heat.limits == (2.0, 5.0)
    assert [entry.text for entry in heat.entries[0]] == ["2.0", "5.0"]


def test_no_number_at_all(make: Make) -> None:
    rows = as_rows([make(ba=None, status="failed", reason="it broke")])
    for find in (find_points, make_matrix):
        with pytest.raises(BenchError, match="it broke") as fault:
            find(rows, BA_ASR)
        assert "bbn run" in str(fault.value.hint)


# curve


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "results")


def put(store: Store, *records: Record) -> list[Row]:
    for record in records:
        store.write_record(record)
    return as_rows(records)


def test_curves_are_means_over_victims(make: Make, store: Store, tmp_path: Path) -> None:
    records = [
        make(seed=seed, axes={"attack": attack, "defense": defense}, victim_losses=losses,
             upstream={"victim": f"{attack}{seed}"})
        for attack in ("badnets", "blended")
        for defense in ("no_defense", "none")  # both have the same victim, which counts once
        for seed, losses in enumerate([[2.0, 1.0, 0.5], [1.0, 0.5, 0.25]])
    ]  # fmt: skip
    rows = put(store, *records)
    curves = find_curves(rows, store)
    assert [curve.label for curve in curves] == ["badnets", "blended"]
    assert curves[0].means == [1.5, 0.75, 0.375]
    assert curves[0].deviations == pytest.approx([stdev([2, 1]), stdev([1, 0.5]), stdev([0.5, 0.25])])
    assert curves[0].seeds == 2
    said, figure = draw(partial(draw_curves, curves, rows), tmp_path)
    for text in ("epoch", "training loss of the victim", "badnets", "mean of 2 victims; bars: standard deviation"):
        assert text in said
    assert list(figure.axes[0].containers[0].lines[0].get_xdata()) == [1, 2, 3]


def test_curves_of_unequal_length(make: Make, store: Store) -> None:
    rows = put(store, make(seed=0, victim_losses=[1.0]), make(seed=1, victim_losses=[3.0, 1.0, 0.5]))
    (curve,) = find_curves(rows, store)
    assert curve.means == [2.0, 1.0, 0.5]
    assert curve.deviations[1:] == [0.0, 0.0]


def test_curves_of_other_recipes_stand_apart(make: Make, store: Store) -> None:
    records = [make(victim_losses=[1.0]).model_copy(update={"recipe": {"lr": lr}}) for lr in (0.1, 0.2)]
    assert len(find_curves(put(store, *records), store)) == 2


def test_no_curves(make: Make, store: Store) -> None:
    with pytest.raises(BenchError, match="none of 1 rows has the losses of a victim") as fault:
        find_curves(put(store, make()), store)
    assert fault.value.hint


def test_loss_over_decades_is_drawn_on_a_plain_log_axis(make: Make, store: Store, tmp_path: Path) -> None:
    rows = put(store, make(victim_losses=[10.0 ** -(epoch / 10) for epoch in range(40)]))
    said, figure = draw(partial(draw_curves, find_curves(rows, store), rows), tmp_path)
    assert figure.axes[0].get_yscale() == "log"
    assert "0.01" in said.splitlines()
    assert "mathdefault" not in said


# sweep


@pytest.fixture
def swept(make: Make) -> list[Row]:
    """Two seeds of `none` with three learning rates and two numbers of epochs, and a baseline."""
    records = [
        make(ba=90 + seed, asr=round(10 * epochs - lr), seed=seed, params={"defense": {"lr": lr, "epochs": epochs}},
             axes={"defense": f"none[lr={lr},epochs={epochs}]"})
        for lr in (1.0, 0.01, 0.1) for epochs in (1, 2) for seed in (0, 1)
    ]  # fmt: skip
    records = [_name(record, "none") for record in records]
    return as_rows([*records, make(ba=95, asr=99, axes={"defense": "no_defense"})])


def _name(record: Record, name: str) -> Record:
    axes = {**record.axes, "defense": record.axes["defense"].model_copy(update={"name": name})}
    return record.model_copy(update={"axes": axes})


def test_series_are_what_remains(swept: list[Row], tmp_path: Path) -> None:
    sweep = find_sweep(swept, "defense.lr", BA_ASR)
    assert sweep.values == [0.01, 0.1, 1.0]
    assert sweep.is_logarithmic
    assert [line.label for line in sweep.series] == ["none[epochs=1]", "none[epochs=2]"]
    places, means, deviations = sweep.series[1].line(METRICS["asr"])
    assert (places, means) == ([0, 1, 2], pytest.approx([20, 20, 19]))
    assert deviations == [0, 0, 0]
    assert sweep.series[0].line(METRICS["ba"])[1:] == (
        pytest.approx([90.5] * 3), pytest.approx([stdev([90, 91])] * 3),
    )  # fmt: skip
    assert [label for label, _ in sweep.references] == ["no_defense"]
    said, figure = draw(partial(draw_sweep, sweep), tmp_path)
    for text in ("defense.lr", "0.01", "none[epochs=2]", "no_defense", "bars: standard deviation over seeds"):
        assert text in said.splitlines()
    assert [axis.get_xscale() for axis in figure.axes] == ["log", "log"]
    assert [len(axis.containers) for axis in figure.axes] == [2, 2]


def test_another_parameter_makes_other_series(swept: list[Row]) -> None:
    sweep = find_sweep(swept, "defense.epochs", BA_ASR)
    assert sorted(line.label for line in sweep.series) == ["none[lr=0.01]", "none[lr=0.1]", "none[lr=1.0]"]
    assert not sweep.is_logarithmic


def test_labels_of_their_own_and_a_base_in_the_title(make: Make) -> None:
    records = [
        make(params={"attack": {"size": size}}, axes={"attack": f"a{size}", "defense": defense})
        for size in (1, 2)
        for defense in ("none", "nad")
    ]
    records = [
        r.model_copy(update={"axes": {**r.axes, "attack": r.axes["attack"].model_copy(update={"name": "patch"})}})
        for r in records
    ]
    sweep = find_sweep(as_rows(records), "attack.size", BA_ASR)
    assert [line.label for line in sweep.series] == ["nad", "none"]
    assert sweep.title.startswith("patch · ")


@pytest.mark.parametrize("values", [["x$1$", "y"], [True, False], [[1, 2], [3, 4]], [10**400, 1], [None, 3]])
def test_values_that_are_no_numbers_stand_side_by_side(make: Make, values: list[Any], tmp_path: Path) -> None:
    rows = as_rows(make({"attack": {"kind": value}}, axes={"attack": f"a[kind={value}]"}) for value in values)
    sweep = find_sweep(rows, "attack.kind", BA_ASR)
    assert not sweep.is_numeric
    assert len(sweep.values) == 2
    said, _ = draw(partial(draw_sweep, sweep), tmp_path)
    assert plain(values[0], 16) in said.splitlines()


def test_a_metric_that_nothing_has(make: Make, tmp_path: Path) -> None:
    rows = as_rows(make({"attack": {"size": size}}, axes={"attack": f"a[size={size}]"}, asr=None) for size in (1, 2))
    said, figure = draw(partial(draw_sweep, find_sweep(rows, "attack.size", BA_ASR)), tmp_path)
    assert "not measured" in said
    box = figure.axes[0].get_position()
    assert box.width > 0.3  # nothing without an extent takes the room away


@pytest.mark.parametrize(
    ("x", "message", "hint"),
    [
        ("defence.lr", "unknown axis 'defence'", "defense"),
        ("lr", "unknown axis 'lr'", ""),
        ("defense", "names no parameter", "defense.lr"),
        ("defense.lrr", "has the parameter 'lrr'", "did you mean 'lr'"),
        ("defense.$x\x07", "has the parameter '\\$x�'", "known: epochs, lr"),
    ],
)
def test_unknown_parameters(swept: list[Row], x: str, message: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=message) as fault:
        find_sweep(swept, x, BA_ASR)
    assert hint in str(fault.value.hint)


def test_a_parameter_with_one_value(swept: list[Row]) -> None:
    rows = [row for row in swept if "lr=1.0" in row.defense]
    with pytest.raises(ConfigError, match=r"'defense.lr' has one value here, 1.0") as fault:
        find_sweep(rows, "defense.lr", BA_ASR)
    assert "sweep: {lr: [...]}" in str(fault.value.hint)


# scores and activations


def test_cut_is_where_flags_begin() -> None:
    scores = np.array([1.0, 2, 2.5, 9, 8])
    assert find_cut(scores, scores > find_breaks(scores).thresholds[0]) == 2.5 == find_breaks(scores).thresholds[0]
    assert find_cut(scores, np.array([True, False, False, True, True])) is None  # one more below
    assert find_cut(scores, np.zeros(5, np.bool_)) is None
    assert find_cut(scores, np.ones(5, np.bool_)) is None
    assert find_cut(np.array([1.0, 2, 2]), np.array([False, False, True])) is None


@pytest.mark.parametrize(("is_break", "name"), [(True, "natural break at 2.5"), (False, "cut at 2.5")])
def test_score_histogram(tmp_path: Path, is_break: bool, name: str) -> None:
    scores = Scores(np.array([1.0, 1, 2, 2.5]), np.array([9.0, 8]), 2.5, is_break, "a cell", "a note")
    said, figure = draw(partial(draw_scores, scores), tmp_path)
    assert {"benign (4)", "poisoned (2)", name} <= set(said.splitlines())
    first, second = (patch.get_data().values for patch in figure.axes[0].patches)
    assert (first.sum(), second.sum()) == pytest.approx((100, 100))
    assert first[0] == pytest.approx(50)
    assert figure.axes[0].patches[1].get_hatch()


@pytest.mark.parametrize("poisoned", [np.array([]), np.array([math.nan, math.inf]), np.array([1.0])])
def test_score_histogram_of_odd_numbers(tmp_path: Path, poisoned: Any) -> None:
    draw(partial(draw_scores, Scores(np.array([1.0, 1.0]), poisoned, None, False, "a", "b")), tmp_path)


def test_nothing_finite() -> None:
    with pytest.raises(BenchError, match="none of the numbers is finite"):
        draw_shares(Figure().subplots(), {"a": np.array([math.nan]), "b": np.array([])})


def test_layers_by_pattern() -> None:
    parts = [layer for _ in range(6) for layer in (nn.Linear(4, 4), nn.ReLU())]
    model = nn.Sequential(*parts, nn.Linear(4, 2)).eval()
    example = torch.zeros(1, 4)
    assert [layer.name for layer in choose_layers(model, example)] == ["4", "6", "8", "10"]
    assert [layer.name for layer in choose_layers(model, example, ["0", "1*"])] == ["0", "10"]
    with pytest.raises(ConfigError, match="no layer matches 'conv'") as fault:
        choose_layers(model, example, ["conv*"[:-1]])
    assert fault.value.hint == "there are: 0, 2, 4, 6, 8, 10"
    with pytest.raises(BenchError, match="no hidden layer"):
        choose_layers(nn.Sequential(nn.Linear(4, 2)).eval(), example)


# texts, metrics and files


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb\tc", "a b c"),
        ("a\x00\x1b[31m\u202eb", "a��[31m�b"),
        ("\ud800", "�"),
        ("$x$", "$x$"),
        ("_hidden", " _hidden"),
        ("x" * 100, "x" * 24 + "…" + "x" * 23),
    ],
)
def test_plain(text: str, shown: str) -> None:
    assert plain(text) == shown


def test_hostile_names_are_shown_and_not_read(make: Make, tmp_path: Path) -> None:
    names = [HOSTILE, "_legend", "$", "日本 😀", r"\$\%"]
    rows = as_rows(make(axes={"defense": name, "attack": attack}) for name in names for attack in names[:2])
    figures: list[Callable[[], Figure]] = [
        partial(draw_scatter, find_points(rows, BA_ASR)), partial(draw_matrix, make_matrix(rows, BA_ASR)),
    ]  # fmt: skip
    for figure in figures:
        said, _ = draw(figure, tmp_path)
        for name in names:
            assert plain(name).strip() in said
        assert "\\frac{1}{2}$ <b>&amp;" in said
        for suffix in (".pdf", ".png"):
            write_picture(figure, tmp_path / f"out{suffix}")


@pytest.mark.parametrize("suffix", [".svg", ".pdf", ".png"])
def test_bytes_depend_on_numbers_only(measured: list[Row], suffix: str, tmp_path: Path) -> None:
    figure = partial(draw_scatter, find_points(measured, BA_ASR))
    first, second = (tmp_path / f"{name}{suffix}" for name in "ab")
    write_picture(figure, first)
    before = dict(mpl.rcParams)
    with mpl.rc_context({"font.size": 20, "axes.facecolor": "red", "text.usetex": True, "svg.fonttype": "path"}):
        inside = dict(mpl.rcParams)
        write_picture(figure, second)
        assert dict(mpl.rcParams) == inside
    assert dict(mpl.rcParams) == before
    assert first.read_bytes() == second.read_bytes()


def test_size_of_a_png(measured: list[Row], tmp_path: Path) -> None:
    path = tmp_path / "OUT.PNG"
    figure = draw_scatter(find_points(measured, BA_ASR))
    write_picture(lambda: figure, path)
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.size == pytest.approx([inches * DPI for inches in figure.get_size_inches()], abs=1)


def test_output_is_checked_before_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "out.svg"
    check_output(path)
    assert not path.exists()
    path.write_text("mine")
    check_output(path)
    assert path.read_text() == "mine"


@pytest.mark.parametrize("name", ["out.jpg", "out", "folder.png", "file/out.png"])
def test_output_that_cannot_be(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(BenchError, match=re.escape(str(tmp_path / name))) as fault:
        check_output(tmp_path / name)
    assert fault.value.hint


@pytest.mark.parametrize(
    ("names", "wanted", "message", "hint"),
    [
        (("ba", "ars"), None, "unknown metric 'ars'", "did you mean 'asr'?"),
        (("ba",), 2, "1 metrics are given, this picture needs 2", "as ba,asr"),
        (("ba", "ba"), None, "named twice", "once"),
        ((), None, "0 metrics", ""),
    ],
)
def test_metrics_that_cannot_be(names: tuple[str, ...], wanted: int | None, message: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as fault:
        find_metrics(names, wanted)
    assert hint in str(fault.value.hint)


def test_no_two_series_look_alike() -> None:
    looks = {(i % len(canvas.COLOURS), i % len(canvas.MARKERS)) for i in range(canvas.MAX_SERIES)}
    assert len(looks) == canvas.MAX_SERIES


@pytest.mark.parametrize(("name", "lines"), [("none", 1), ("x" * 48, 3), ("W" * 48, 5)])
def test_legends_fit(make: Make, name: str, lines: int, tmp_path: Path) -> None:
    names = [f"{name}{i}"[-48:] for i in range(5)]
    assert legend_lines(names) == lines
    rows = as_rows(make(axes={"defense": name, "attack": attack}) for name in names for attack in "abc")
    _, figure = draw(partial(draw_scatter, find_points(rows, BA_ASR)), tmp_path)
    box = figure.legends[0].get_window_extent().transformed(figure.transFigure.inverted())
    assert 0 <= box.x0 < box.x1 <= 1
    assert all(axis.get_position().y0 > box.y1 for axis in figure.axes)
