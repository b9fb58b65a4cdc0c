"""Sheets of images as they are, with each attack, and what the attack changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from backdoor_bench_none.contracts.attack import AttackTask
from backdoor_bench_none.contracts.context import Context
from backdoor_bench_none.contracts.dataset import ImageSet
from backdoor_bench_none.errors import BenchError, ConfigError, PluginError
from backdoor_bench_none.planning.stage_table import poison_key
from backdoor_bench_none.report.plots.canvas import PAGE, check_count, new_figure, plain
from backdoor_bench_none.seeds import derive_seed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from backdoor_bench_none.contracts.cell import Cell

#: images of different classes on a sheet
COLUMNS = 4
MAX_LINES = 24
Pictures = NDArray[np.uint8]


@dataclass(frozen=True)
class Line:
    """One attack: its images (N, H, W, 3) and what it changed, times `gain`, so that the largest change is white."""

    label: str
    images: Pictures
    difference: Pictures
    gain: float


@dataclass(frozen=True)
class Sheet:
    """The images (N, H, W, 3) of one data set, and lines of attacks."""

    dataset: str
    originals: Pictures
    lines: list[Line]


def make_sheets(cells: Sequence[Cell]) -> tuple[list[Sheet], list[str]]:
    """A sheet for each data set, and what to say of attacks that are not on it: they look like another, or like none.

    `ConfigError` if no attack has a picture before a network is trained.
    """
    chosen: dict[tuple[str, str], Cell] = {}
    for cell in cells:
        chosen.setdefault((cell.dataset.identity, cell.attack.identity), cell)
    known = list(chosen.values())
    searching = [plain(cell.attack.label) for cell in known if cell.attack.component.searches]
    left = [cell for cell in known if not cell.attack.component.searches]
    if not left:
        raise ConfigError(
            f"{', '.join(searching)}: this attack finds its triggers in finished networks",
            "choose others with -a; `bbn results show KEY` tells of the triggers found",
        )
    check_count("attacks", len(left), MAX_LINES)
    notes = [f"{label} finds its triggers in finished networks" for label in searching]
    datasets = dict.fromkeys(cell.dataset.identity for cell in left)
    made = [_make_sheet([cell for cell in left if cell.dataset.identity == identity], notes) for identity in datasets]
    if not (sheets := [sheet for sheet in made if sheet.lines]):
        raise ConfigError("; ".join(notes), "choose attacks with a trigger, with -a")
    return sheets, notes


def _make_sheet(cells: Sequence[Cell], notes: list[str]) -> Sheet:
    dataset = cells[0].dataset.component
    dataset.prepare()
    test = dataset.load()[1]
    sample = test.take(_one_of_each_class(test))
    originals = _as_pictures(sample.images)
    lines: list[Line] = []
    for line in (_make_line(cell, sample) for cell in cells):
        twin = next((other.label for other in lines if np.array_equal(other.images, line.images)), None)
        if twin is not None or not line.gain:
            notes.append(
                f"{line.label} looks like {twin}" if twin is not None else f"{line.label} changes none of these images"
            )
        else:
            lines.append(line)
    return Sheet(plain(cells[0].dataset.label), originals, lines)


def _one_of_each_class(test: ImageSet) -> Tensor:
    """The first image of classes spread over all classes."""
    classes = torch.unique(test.labels)
    spread = classes[torch.linspace(0, len(classes) - 1, min(COLUMNS, len(classes))).long()]
    return torch.stack([torch.nonzero(test.labels == label)[0, 0] for label in spread])


def _make_line(cell: Cell, sample: ImageSet) -> Line:
    context = Context(torch.device("cpu"), derive_seed(derive_seed(poison_key(cell)), "test"))
    try:
        triggered = cell.attack.component.preview(AttackTask(sample, cell.info), context)
    except BenchError:
        raise
    except Exception as error:  # a stranger's component
        raise PluginError(f"attack '{plain(cell.attack.name)}': preview: {type(error).__name__}: {error}") from error
    wanted = sample.images
    if not isinstance(triggered, Tensor) or (triggered.shape, triggered.dtype) != (wanted.shape, wanted.dtype):
        found = (
            f"{triggered.dtype} {tuple(triggered.shape)}" if isinstance(triggered, Tensor) else type(triggered).__name__
        )
        raise PluginError(f"attack '{plain(cell.attack.name)}': preview returned {found}", "as many uint8 images")
    change = (triggered.int() - sample.images.int()).abs()
    gain = 255 / largest if (largest := int(change.max())) else 0.0
    label = plain(cell.attack.label)
    return Line(label, _as_pictures(triggered), _as_pictures((change * gain).round().to(torch.uint8)), gain)


def _as_pictures(images: Tensor) -> Pictures:
    """(N, 1|3, H, W) uint8 -> (N, H, W, 3)."""
    if images.shape[1] not in (1, 3):
        raise ConfigError(
            f"images of {images.shape[1]} channels cannot be shown", "choose a data set of pictures with --dataset"
        )
    found: Pictures = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    return found


def draw_sheets(sheets: Sequence[Sheet]) -> Figure:
    """For each data set a line of images as they are, then one for each attack: images to the left, changes right."""
    lines: list[Sheet | Line] = []
    for sheet in sheets:
        lines += [sheet, *sheet.lines]
    columns = max(len(sheet.originals) for sheet in sheets)
    side = min(0.75, (PAGE - 1.9) / (2 * columns))
    figure = new_figure(1.5 + side * (2.05 * columns + 0.6), (side + 0.05) * len(lines) + 0.3, "")
    figure.set_layout_engine("constrained", w_pad=0.01, h_pad=0.01, wspace=0.02, hspace=0.02)
    ratios = [1.0] * columns + [0.5] + [1.0] * columns
    axes = figure.subplots(len(lines), 2 * columns + 1, squeeze=False, gridspec_kw={"width_ratios": ratios})
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        axis.grid(False)
        axis.patch.set_visible(False)  # a heading may reach over its neighbours
    for line, row in zip(lines, axes, strict=True):
        _draw_line(line, row, columns)
    return figure


def _draw_line(line: Sheet | Line, axes: Sequence[Axes], columns: int) -> None:
    if isinstance(line, Sheet):
        label, left, right = f"{line.dataset}, benign", line.originals, line.originals[:0]
        axes[columns + 1].text(0, 0.02, "change, times the factor", va="bottom", fontsize=7, in_layout=False)
    else:
        label, left, right = line.label, line.images, line.difference
        axes[columns].text(0.5, 0.5, f"× {line.gain:.3g}", ha="center", va="center", fontsize=7)
    axes[0].set_ylabel(label, rotation=0, ha="right", va="center")
    for axis, picture in [*zip(axes, left, strict=False), *zip(axes[columns + 1 :], right, strict=False)]:
        axis.imshow(picture, interpolation="nearest")
