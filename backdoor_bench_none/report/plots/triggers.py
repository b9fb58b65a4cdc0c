"""Sheets of clean images, the same images with the trigger of each attack, and their difference."""

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

#: the number of images on a sheet, of different classes
COLUMNS = 4
MAX_LINES = 24
Pictures = NDArray[np.uint8]


@dataclass(frozen=True)
class Line:
    """One attack: its images (N, H, W, 3) and their difference to the clean ones.

    The difference is multiplied by `gain`, so that the largest change is white; 0 means that nothing changed.
    """

    label: str
    images: Pictures
    difference: Pictures
    gain: float


@dataclass(frozen=True)
class Sheet:
    """The clean images (N, H, W, 3) of one data set, and a line for each attack."""

    dataset: str
    originals: Pictures
    lines: list[Line]


def make_sheets(cells: Sequence[Cell]) -> tuple[list[Sheet], list[str]]:
    """A sheet for each data set, and a note for each attack that is not on it: it looks like another, or like none.

    `ConfigError` if no attack can be shown before a network is trained.
    """
    chosen: dict[tuple[str, str], Cell] = {}
    for cell in cells:
        chosen.setdefault((cell.dataset.identity, cell.attack.identity), cell)
    searching: list[str] = []
    by_dataset: dict[str, list[Cell]] = {}
    for (dataset, _), cell in chosen.items():
        if cell.attack.component.searches:
            searching.append(plain(cell.attack.label))
        else:
            by_dataset.setdefault(dataset, []).append(cell)
    if not by_dataset:
        raise ConfigError(
            f"{', '.join(searching)}: this attack finds its triggers in finished networks",
            "choose others with -a; `bbn results show KEY` lists the triggers found",
        )
    check_count("attacks", sum(map(len, by_dataset.values())), MAX_LINES)
    notes = [f"{label} finds its triggers in finished networks" for label in searching]
    sheets = [_make_sheet(group, notes) for group in by_dataset.values()]
    sheets = [sheet for sheet in sheets if sheet.lines]
    if not sheets:
        raise ConfigError("; ".join(notes), "choose attacks with a trigger, with -a")
    return sheets, notes


def _make_sheet(cells: Sequence[Cell], notes: list[str]) -> Sheet:
    """The sheet of one data set; attacks that are not on it are added to `notes`."""
    dataset = cells[0].dataset.component
    dataset.prepare()
    test = dataset.load()[1]
    sample = test.take(_one_of_each_class(test))
    originals = _as_pictures(sample.images)
    lines: list[Line] = []
    for cell in cells:
        line = _make_line(cell, sample)
        twin = next((other.label for other in lines if np.array_equal(other.images, line.images)), None)
        if twin is not None:
            notes.append(f"{line.label} looks like {twin}")
        elif not line.gain:
            notes.append(f"{line.label} changes none of these images")
        else:
            lines.append(line)
    return Sheet(plain(cells[0].dataset.label), originals, lines)


def _one_of_each_class(test: ImageSet) -> Tensor:
    """The first images of `COLUMNS` classes, evenly spaced among all."""
    classes = torch.unique(test.labels)
    spread = classes[torch.linspace(0, len(classes) - 1, min(COLUMNS, len(classes))).long()]
    return torch.stack([torch.nonzero(test.labels == label)[0, 0] for label in spread])


def _make_line(cell: Cell, sample: ImageSet) -> Line:
    triggered = _preview(cell, sample)
    change = (triggered.int() - sample.images.int()).abs()
    largest = int(change.max())
    gain = 255 / largest if largest else 0.0
    label = plain(cell.attack.label)
    return Line(label, _as_pictures(triggered), _as_pictures((change * gain).round().to(torch.uint8)), gain)


def _preview(cell: Cell, sample: ImageSet) -> Tensor:
    """The images of `sample` (N, C, H, W) uint8 with the attack's trigger; `PluginError` for a broken attack."""
    # the seed with which the trigger is put on the test set of this cell
    context = Context(torch.device("cpu"), derive_seed(derive_seed(poison_key(cell)), "test"))
    name = plain(cell.attack.name)
    try:
        triggered = cell.attack.component.preview(AttackTask(sample, cell.info), context)
    except BenchError:
        raise
    except Exception as error:  # third-party code may raise anything
        raise PluginError(f"attack '{name}': preview: {type(error).__name__}: {error}") from error
    returned = type(triggered).__name__
    if isinstance(triggered, Tensor):
        if triggered.shape == sample.images.shape and triggered.dtype == sample.images.dtype:
            return triggered
        returned = f"{triggered.dtype} {tuple(triggered.shape)}"
    raise PluginError(f"attack '{name}': preview returned {returned}", "return as many uint8 images as it is given")


def _as_pictures(images: Tensor) -> Pictures:
    """Images (N, 1|3, H, W) uint8 as (N, H, W, 3)."""
    if images.shape[1] not in (1, 3):
        raise ConfigError(
            f"images of {images.shape[1]} channels cannot be shown", "choose a data set of pictures with --dataset"
        )
    pictures: Pictures = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    return pictures


def draw_sheets(sheets: Sequence[Sheet]) -> Figure:
    """For each data set a line of clean images, then one for each attack: images on the left, changes on the right."""
    lines: list[Sheet | Line] = []
    for sheet in sheets:
        lines += [sheet, *sheet.lines]
    columns = max(len(sheet.originals) for sheet in sheets)
    side = min(0.75, (PAGE - 1.9) / (2 * columns))
    figure = new_figure(1.5 + side * (2.05 * columns + 0.6), (side + 0.05) * len(lines) + 0.3, "")
    figure.set_layout_engine("constrained", w_pad=0.01, h_pad=0.01, wspace=0.02, hspace=0.02)
    ratios = [1.0] * columns + [0.5] + [1.0] * columns  # the gap in the middle holds the gain
    axes = figure.subplots(len(lines), 2 * columns + 1, squeeze=False, gridspec_kw={"width_ratios": ratios})
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        axis.grid(False)
        axis.patch.set_visible(False)  # would hide a heading that extends over the next panels
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
