"""The figures of the paper, from small benchmarks to pictures and their numbers."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from backdoor_bench_none.cli.paper import FIGURES
from backdoor_bench_none.data.blobs import Blobs
from backdoor_bench_none.errors import BenchError
from backdoor_bench_none.paper import presets
from backdoor_bench_none.paper.presets import benchmark_text
from backdoor_bench_none.report.plots.activations import LayerValues, compare_values
from backdoor_bench_none.report.plots.canvas import write_picture
from backdoor_bench_none.report.plots.figures import PREPARE
from backdoor_bench_none.report.plots.regions import Panel, draw_panels, measure_overlap, plane, with_ideal_trojan

#: what stands for the paper's data and networks here
DATA = "{name: digits, params: {image_size: 16}, recipe: {epochs: 2}}"
NETWORK = "{name: resnet18, params: {width: 0.125}}"


def numbers_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_every_figure_of_the_command_can_be_prepared() -> None:
    assert tuple(PREPARE) == FIGURES
    assert set(FIGURES) <= set(presets.benchmark_names())


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


@given(start=st.integers(0, 256), rows=st.integers(0, 40))
def test_the_overlap_of_a_planted_region(start: int, rows: int) -> None:
    """A Trojan that has the line from `start` on, and so many rows below it."""
    benign = np.zeros((256, 256), dtype=np.int64)
    benign[:, :64] = 3  # the target's own region
    regions = benign.copy()
    regions[153 - rows : 154, start:] = 3
    overlap = measure_overlap(regions, benign, 0.6, 3)
    line = np.zeros(256, dtype=bool)
    line[:64] = line[start:] = True
    assert overlap["alpha"] == line.mean()
    assert overlap["alpha_benign"] == 64 / 256
    assert overlap["beside"] == pytest.approx(rows * max(0, 256 - max(start, 64)) / (255 * 256))


def test_regions_are_drawn_where_they_are(tmp_path: Path) -> None:
    """The lower left quarter is class 3, the rest class 0."""
    regions = np.zeros((256, 256), dtype=np.int64)
    regions[:128, :128] = 3
    points = Blobs(per_class=2).load()[1]
    write_picture(lambda: draw_panels([Panel("one", regions)], points, 0.6, "title"), tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    red = np.argwhere((pixels[:, :, 0] > 200) & (pixels[:, :, 1] < 180) & (pixels[:, :, 2] < 150))
    blue = np.argwhere((pixels[:, :, 2] > 190) & (pixels[:, :, 0] < 130))
    assert len(red) > 1000
    assert len(blue) > 3 * len(red) * 0.7
    assert red[:, 0].mean() > blue[:, 0].mean()  # below
    assert red[:, 1].mean() < blue[:, 1].mean()  # left


@pytest.mark.slow
def test_fig6_is_run_and_drawn(bbn: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer points and epochs, twice: the second time nothing is trained."""
    short = benchmark_text("fig6").replace(
        "dataset: [blobs]", "dataset: [{name: blobs, params: {per_class: 60}, recipe: {epochs: 4, lr: 0.01}}]"
    )
    monkeypatch.setattr(presets, "benchmark_text", lambda name, scale: short)
    monkeypatch.chdir(tmp_path)
    assert bbn("paper", "fig6", "--output", "a.svg", "-j", 1).code == 0
    again = bbn("paper", "fig6", "--output", "b.png")
    assert "0 cells to run, 4 done before" in again.out
    assert "wrote b.png and b.csv" in again.out
    assert "<svg" in (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    numbers = numbers_of(tmp_path / "b.csv")
    assert numbers[0]["attack"] == "clean"
    assert numbers[0]["alpha"] == numbers[0]["alpha_benign"]
    with Image.open(tmp_path / "b.png") as picture:
        assert picture.size[0] > 1000


# the values of neurons


@given(shift=st.floats(-3, 3), seed=st.integers(0, 99))
def test_shifted_values_differ_by_their_shift_and_the_auroc_counts_pairs(shift: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    benign = generator.normal(size=(4, 30)).astype(np.float32)
    compared = compare_values(LayerValues("l", benign, benign + np.float32(shift)))
    assert compared["mean_triggered"] - compared["mean_benign"] == pytest.approx(shift, abs=1e-5)
    first, second = benign.mean(0, dtype=np.float64), (benign + np.float32(shift)).mean(0, dtype=np.float64)
    pairs = (second[:, None] > first).mean() + (second[:, None] == first).mean() / 2
    assert compared["auroc"] == pytest.approx(pairs)
    assert compared["positive_triggered"] == pytest.approx((benign + np.float32(shift) > 0).mean())


def test_p_is_of_pairs() -> None:
    """Eight images, each a little higher with its trigger, far less than they differ: 2 of 2 ** 8 orders of signs."""
    benign = 100 * np.arange(8, dtype=np.float32)[None]
    compared = compare_values(LayerValues("l", benign, benign + np.arange(1, 9, dtype=np.float32)))
    assert compared["p"] == pytest.approx(2 / 2**8)
    assert compared["auroc"] < 0.6
    assert compare_values(LayerValues("l", benign, benign))["p"] == 1


def test_values_that_are_not_finite_are_told() -> None:
    ruined = np.array([[1.0, np.nan]], np.float32)
    with pytest.raises(BenchError, match="values of the layer conv1 are not finite"):
        compare_values(LayerValues("conv1", ruined, ruined))


def test_the_overlap_of_histograms() -> None:
    apart = LayerValues("l", np.zeros((2, 5), np.float32), np.ones((2, 5), np.float32))
    assert compare_values(apart)["overlap"] == 0
    assert compare_values(apart)["auroc"] == 1
    same = LayerValues("l", np.ones((2, 5), np.float32), np.ones((2, 5), np.float32))
    assert compare_values(same)["overlap"] == 1
    assert compare_values(same)["auroc"] == 0.5


@pytest.fixture
def on_digits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The paper's benchmarks of CIFAR-10 on digits, with a narrow network, a short training and a quick TrojanNet."""

    def text(name: str, scale: str) -> str:
        benchmark = benchmark_text(name).replace("{name: cifar10, recipe: paper}", DATA).replace("resnet18", NETWORK)
        return benchmark.replace("trojannet", "{name: trojannet, params: {steps: 300}}")

    monkeypatch.setattr(presets, "benchmark_text", text)
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("on_digits")
def test_fig5_has_the_last_four_layers(bbn: Callable[..., Any]) -> None:
    assert bbn("paper", "fig5", "-j", 1).code == 0
    layers = [line["layer"] for line in numbers_of(Path("fig5.csv"))]
    assert layers == ["layer4.0.conv1", "layer4.0.conv2", "layer4.1.conv1", "layer4.1.conv2"]


@pytest.mark.slow
@pytest.mark.usefixtures("on_digits")
def test_fig2_shows_the_neurons_of_the_trojan(bbn: Callable[..., Any]) -> None:
    assert bbn("paper", "fig2").code == 0
    numbers = numbers_of(Path("fig2.csv"))
    assert [line["network"] for line in numbers] == ["benign", "with TrojanNet", *["Trojan's neurons"] * 4]
    assert [line["layer"] for line in numbers[2:]] == ["trojan.0", "trojan.3", "trojan.6", "trojan.9"]
    benign, host, *trojan = numbers
    named = {"network": "", "layer": ""}
    assert {**benign, **named} == {**host, **named}  # the host is the benign network
    assert float(trojan[-1]["overlap"]) < float(host["overlap"])


@pytest.mark.slow
@pytest.mark.usefixtures("on_digits")
def test_fig8_has_a_curve_for_each_rate(bbn: Callable[..., Any]) -> None:
    assert bbn("paper", "fig8").code == 0
    numbers = numbers_of(Path("fig8.csv"))
    assert len(numbers) == 25
    assert [line["epochs"] for line in numbers[:3]] == ["", "1", "2"]
    assert Path("fig8.png").stat().st_size > 10_000


@pytest.mark.usefixtures("on_digits")
def test_fig10_needs_no_network(bbn: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    largest = presets.benchmark_text("fig10", "full").replace("size: 20", "size: 16").replace("=20", "=16")
    monkeypatch.setattr(presets, "benchmark_text", lambda name, scale: largest)
    assert bbn("paper", "fig10").code == 0
    assert [line["pixels"] for line in numbers_of(Path("fig10.csv"))] == ["9", "25", "49", "81", "225", "256"]
    assert not Path("results", "records").exists()


@pytest.mark.parametrize("output", ["a.xyz", "folder/a.gif"])
def test_what_cannot_be_written_is_said_first(output: str, bbn: Callable[..., Any], tmp_path: Path) -> None:
    said = bbn("paper", "fig6", "--results", tmp_path / "results", "--output", tmp_path / output)
    assert said.code == 2
    assert "is not a picture format that can be written" in said.err
    assert not (tmp_path / "results").exists()
