"""Decision regions in the plane (Figs. 6 and 7), and how much of the ideal Trojan's they have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.colors import ListedColormap
from numpy.typing import NDArray

from backdoor_bench_none.contracts.dataset import ImageSet
from backdoor_bench_none.report.plots.canvas import label_axes, make_panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: five colours that are distinct for any colour vision (Okabe and Ito), one per blob; 3, red, is the target
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7")
LEVELS = 256


@dataclass(frozen=True)
class Panel:
    """One picture: `regions` (256, 256) labels, row y and column x in levels of 0..255, below a title."""

    title: str
    regions: NDArray[np.int64]


def plane() -> torch.Tensor:
    """Every point of the plane in the format of `blobs`, (65536, 2, 1, 1) uint8: row y, column x."""
    y, x = torch.meshgrid(torch.arange(LEVELS), torch.arange(LEVELS), indexing="ij")
    return torch.stack([x, y], dim=-1).reshape(-1, 2, 1, 1).to(torch.uint8)


def row_of(value: float) -> int:
    """The row of the plane at which y = `value`."""
    return round(value * (LEVELS - 1))


def with_ideal_trojan(panel: Panel, value: float, target: int) -> Panel:
    """The regions of a benign network with the ideal Trojan of Theorem 3.3: the line y = `value` is class `target`."""
    regions = panel.regions.copy()
    row = row_of(value)
    regions[row - 1 : row + 2] = target  # three levels thick, so that it can be seen
    return replace(panel, title="ideal Trojan", regions=regions)


def measure_overlap(
    regions: NDArray[np.int64], benign: NDArray[np.int64], value: float, target: int
) -> dict[str, float]:
    """How much of the theoretical Trojan region, the line y = `value`, a trained network has, and what more it has.

    `alpha`: the share of the line that is class `target` (section 3.1); `alpha_benign`: that of a benign network, its
    control; `beside`: the share of the plane off the line that is class `target` here and not in the benign network.
    """
    row = row_of(value)
    is_target, was_target = regions == target, benign == target
    off_the_line = np.arange(len(regions)) != row
    return {
        "alpha": float(is_target[row].mean()),
        "alpha_benign": float(was_target[row].mean()),
        "beside": float((is_target & ~was_target)[off_the_line].mean()),
    }


def draw_panels(panels: Sequence[Panel], points: ImageSet, value: float, title: str) -> Figure:
    """The panels side by side, with some test points and the trigger's line."""
    figure, axes = make_panels(len(panels), title, height=2.2, legend_lines=0, sharex=True, sharey=True)
    for axis, panel in zip(axes, panels, strict=True):
        _draw(axis, panel, points, value)
    label_axes(axes, "x", "y")
    return figure


def _draw(axis: Axes, panel: Panel, points: ImageSet, value: float) -> None:
    colours = ListedColormap(COLOURS)
    axis.imshow(panel.regions, origin="lower", extent=(0, 1, 0, 1), cmap=colours, vmin=0, vmax=4, alpha=0.55)
    shown = torch.arange(0, len(points), 8)
    x, y = (points.images[shown, channel, 0, 0].numpy() / (LEVELS - 1) for channel in (0, 1))
    axis.scatter(x, y, c=points.labels[shown].numpy(), cmap=colours, vmin=0, vmax=4, s=9, edgecolors="black", lw=0.3)
    axis.axhline(value, color="black", lw=0.8, ls="--")
    axis.set_title(panel.title)
    axis.grid(False)
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1)
