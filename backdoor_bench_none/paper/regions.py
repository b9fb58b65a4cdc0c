"""Decision regions in the plane (Figs. 6 and 7)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from numpy.typing import NDArray

from backdoor_bench_none.contracts.dataset import ImageSet
from backdoor_bench_none.errors import BenchError

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


def with_ideal_trojan(panel: Panel, value: float, target: int) -> Panel:
    """The regions of a benign network with the ideal Trojan of Theorem 3.3: the line y = `value` is class `target`."""
    regions = panel.regions.copy()
    row = round(value * (LEVELS - 1))
    regions[row - 1 : row + 2] = target  # three levels thick, so that it can be seen
    return replace(panel, title="ideal Trojan", regions=regions)


def draw_panels(panels: Sequence[Panel], points: ImageSet, value: float, path: Path) -> None:
    """Write the panels side by side to `path` (.png, .pdf or .svg), with some test points and the trigger's line."""
    figure, axes = plt.subplots(1, len(panels), figsize=(3.2 * len(panels), 3.6), squeeze=False, sharey=True)
    axes[0, 0].set_ylabel("y")
    for axis, panel in zip(axes[0], panels, strict=True):
        _draw(axis, panel, points, value)
    figure.tight_layout()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise BenchError(f"'{path}' cannot be written: {error}", "name a .png, .pdf or .svg file") from error
    finally:
        plt.close(figure)


def _draw(axis: Axes, panel: Panel, points: ImageSet, value: float) -> None:
    colours = ListedColormap(COLOURS)
    axis.imshow(panel.regions, origin="lower", extent=(0, 1, 0, 1), cmap=colours, vmin=0, vmax=4, alpha=0.55)
    shown = torch.arange(0, len(points), 8)
    x, y = (points.images[shown, channel, 0, 0].numpy() / (LEVELS - 1) for channel in (0, 1))
    axis.scatter(x, y, c=points.labels[shown].numpy(), cmap=colours, vmin=0, vmax=4, s=9, edgecolors="black", lw=0.3)
    axis.axhline(value, color="black", lw=0.8, ls="--")
    axis.set_title(panel.title, fontsize=9)
    axis.set_xlabel("x")
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1)
