"""Shared by all pictures: colours, panels, legends, and output.

Texts are never parsed as formulas, and the bytes of a file depend on the numbers alone.
"""

from __future__ import annotations

import io
import math
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from backdoor_bench_none.errors import BenchError, ConfigError
from backdoor_bench_none.results.metrics import Metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.container import ErrorbarContainer

#: the palette of Okabe and Ito without yellow, which is too light for lines on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
#: nine, coprime to the seven colours: a pair of both recurs only after 63 series
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
LINES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)))
#: the colours of both groups in histograms: the paper's orange and blue
BENIGN, ATTACKED = "#E69F00", "#0072B2"
MAX_SERIES, MAX_PANELS = 24, 24
#: the least span of an axis of shares in percentage points, so that tiny differences do not fill it
LEAST_SPAN = 10.0
#: the ratio of the largest to the smallest number from which on an axis is logarithmic
LOG_RATIO = 20
#: bins of a histogram
BINS = 60
#: the width of a page with two columns in inches
PAGE = 6.75
DPI = 200
METADATA: dict[str, dict[str, Any]] = {
    ".svg": {"Date": None}, ".pdf": {"CreationDate": None}, ".png": {"Software": None},
}  # fmt: skip
STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # names may be third-party and hold dollar signs
    "svg.fonttype": "none", "pdf.fonttype": 42,  # keep texts as texts, which can be searched and edited
    "svg.hashsalt": "backdoor-bench-none", "hatch.linewidth": 0.5,
    "font.size": 8.0, "axes.titlesize": 8.0, "axes.labelsize": 7.5, "figure.titlesize": 7.0, "legend.fontsize": 7.5,
    "xtick.labelsize": 7.0, "ytick.labelsize": 7.0, "axes.linewidth": 0.6, "lines.linewidth": 1.2,
    "lines.markersize": 4.5, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.linewidth": 0.4, "grid.color": "#dddddd", "savefig.dpi": DPI,
}  # fmt: skip
#: names of axes, for metrics whose title is too short to be one
AXIS_LABELS = {
    "ba": "benign accuracy, BA (%)", "asr": "attack success rate, ASR (%)", "ra": "robust accuracy, RA (%)",
    "tpr_at_1_fpr": "TPR at 1 % FPR (%)", "seconds": "time of the defense (s)",
    "cost_ratio": "cost (undefended trainings)", "peak_memory": "peak memory (MiB)",
    "clean_fraction": "clean data granted (%)",
}  # fmt: skip


def check_output(path: Path) -> None:
    """Raise `ConfigError` or `BenchError` if a picture cannot be written to `path`, before any work is done for it."""
    if path.suffix.lower() not in METADATA:
        raise ConfigError(f"'{path}' is not a picture format that can be written", "name a .svg, .pdf or .png file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        existed = path.exists()
        with path.open("ab"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        raise _unwritable(path, error) from error


def write_picture(draw: Callable[[], Figure], path: Path) -> None:
    """Draw a figure in `STYLE` and write it; equal numbers give equal bytes."""
    out, suffix = io.BytesIO(), path.suffix.lower()
    with _style(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        draw().savefig(out, format=suffix[1:], metadata=METADATA[suffix])
    try:
        path.write_bytes(out.getvalue())
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> BenchError:
    return BenchError(f"'{path}' cannot be written: {error.strerror or error}", "choose another with --output")


@contextmanager
def _style() -> Iterator[None]:
    """Replace the user's matplotlib settings by `STYLE` for a while."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        yield


def plain(text: object, length: int = 48) -> str:
    """One line of at most `length` characters, without control characters; the middle of a longer text is left out."""
    flat = " ".join("".join(map(_as_visible, str(text))).split())
    if len(flat) > length:
        half = (length - 1) // 2
        flat = f"{flat[: length - 1 - half]}…{flat[-half:]}"
    return f" {flat}" if flat.startswith("_") else flat  # matplotlib omits labels with a leading _ from legends


def _as_visible(character: str) -> str:
    is_control = unicodedata.category(character)[0] == "C" and not character.isspace()
    return "�" if is_control else character


def axis_label(metric: Metric) -> str:
    """The name of a metric's axis, its unit, and an arrow to the better side."""
    name = AXIS_LABELS.get(metric.name, f"{metric.title} (%)")
    return f"{name} {metric.heading[-1]}"


def widen(low: float, high: float, metric: Metric) -> tuple[float, float]:
    """The ends of an axis that shows numbers from `low` to `high`, with a margin."""
    if metric.is_share and high - low < LEAST_SPAN:
        middle = min(max((low + high) / 2, LEAST_SPAN / 2), 100 - LEAST_SPAN / 2)
        low, high = min(low, middle - LEAST_SPAN / 2), max(high, middle + LEAST_SPAN / 2)
    margin = 0.05 * (high - low) or 0.5
    return low - margin, high + margin


def needs_log(values: Sequence[float]) -> bool:
    """Whether the numbers are positive and span a ratio of at least `LOG_RATIO`."""
    return bool(values) and min(values) > 0 and max(values) / min(values) >= LOG_RATIO


def new_figure(width: float, height: float, title: str, notes: Sequence[str] = ()) -> Figure:
    """An empty figure of that size in inches, with a title and notes above it."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle("\n".join(_wrap(width, title, notes)), linespacing=1.25, color="#333333")
    return figure


def _wrap(width: float, title: str, notes: Sequence[str]) -> list[str]:
    lines: list[str] = []
    for text in (title, *notes):
        lines += wrap(text, int(width * 19))  # about 19 characters of the title's font to an inch
    return lines


def make_panels(
    count: int, title: str, notes: Sequence[str] = (), height: float = 2.1, legend_lines: int = 1, **options: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, at most four in a line, each `height` inches high."""
    lines = math.ceil(count / 4)
    columns = math.ceil(count / lines)  # as even as possible: 5 panels are 3 and 2, not 4 and 1
    width = {1: 3.6, 2: 5.4}.get(columns, PAGE)
    extra = 0.1 + 0.135 * len(_wrap(width, title, notes)) + 0.18 * legend_lines
    figure = new_figure(width, height * lines + extra, title, notes)
    axes = list(figure.subplots(lines, columns, squeeze=False, **options).flat)
    for axis in axes[count:]:
        axis.remove()
    return figure, axes[:count]


def set_title(axis: Axes, text: str) -> None:
    """Set a panel's title, broken into lines that fit where four panels are side by side."""
    axis.set_title("\n".join(wrap(text, 27)), fontsize=7.5)


def label_axes(axes: Sequence[Axes], x: str, y: str) -> None:
    """Name the common axes: x below the lowest panel of each column, y left of the first one of each line."""
    columns = sum(axis.get_subplotspec().rowspan.start == 0 for axis in axes)  # type: ignore[union-attr]
    for index, axis in enumerate(axes):
        if index + columns >= len(axes):
            axis.set_xlabel(x)
            axis.tick_params(labelbottom=True)
        if index % columns == 0:
            axis.set_ylabel(y)


def legend_lines(labels: Sequence[str], width: float = PAGE) -> int:
    """The number of lines of a legend with these labels."""
    if not labels:
        return 0
    return math.ceil(len(labels) / _legend_columns(labels, width))


def add_legend(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """A legend below the panels, as wide as the figure allows."""
    columns = _legend_columns(labels, figure.get_size_inches()[0])
    figure.legend(list(handles), list(labels), loc="outside lower center", ncols=columns, columnspacing=1.5)


def _legend_columns(labels: Sequence[str], width: float) -> int:
    """As many columns as fit: each as wide as its longest label, with its handle."""
    for columns in range(len(labels), 1, -1):
        high = math.ceil(len(labels) / columns)
        longest = [max(map(_inches, labels[start : start + high])) for start in range(0, len(labels), high)]
        if sum(0.5 + length for length in longest) <= width:
            return len(longest)
    return 1


def _inches(label: str) -> float:
    """The approximate width of a label in a legend: matplotlib knows the exact one only after drawing."""
    wide = [c for c in label if c.isupper() or c in "mw@%" or unicodedata.east_asian_width(c) in "WF"]
    return 0.058 * len(label) + 0.035 * len(wide)


def draw_series(axis: Axes, index: int, x: Sequence[float], y: Sequence[float], **options: Any) -> ErrorbarContainer:
    """Series number `index` with its own colour, marker and line."""
    look: dict[str, Any] = {
        "color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)],
        "linestyle": LINES[index % len(LINES)], "capsize": 2, "capthick": 0.8, "elinewidth": 0.8, "clip_on": False,
    }  # fmt: skip
    if index % 2:  # every other marker is hollow, so that points below it remain visible
        look |= {"markerfacecolor": "none", "markeredgewidth": 1.1}
    else:
        look |= {"markeredgecolor": "white", "markeredgewidth": 0.4}
    return axis.errorbar(x, y, **{**look, **options})


def draw_shares(axis: Axes, groups: Mapping[str, NDArray[np.floating]]) -> list[Any]:
    """Histograms of the finite numbers of a benign and an attacked group, each in percent of its group."""
    finite = np.concatenate([values[np.isfinite(values)] for values in groups.values()])
    if not len(finite):
        raise BenchError("none of the numbers is finite", "the network has diverged; see `bbn results show`")
    edges = np.histogram_bin_edges(finite, BINS)
    looks: tuple[dict[str, Any], ...] = (
        {"facecolor": BENIGN, "edgecolor": BENIGN, "alpha": 0.8},
        {"facecolor": "none", "edgecolor": ATTACKED, "hatch": "////", "lw": 0.9},
    )
    handles: list[Any] = []
    for values, look in zip(groups.values(), looks, strict=True):
        shares = 100 * np.histogram(values, edges)[0] / max(1, len(values))
        handles.append(axis.stairs(shares, edges, fill=True, **look))
    axis.set_ylim(bottom=0)
    return handles


def check_count(things: str, count: int, limit: int) -> None:
    """Raise `ConfigError` for more than `limit` things, which readers could not tell apart."""
    if count > limit:
        raise ConfigError(
            f"{count} {things} are too many for one picture, it shows {limit}", "select fewer, as with -a"
        )
