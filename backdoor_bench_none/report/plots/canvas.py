"""What all pictures share: colours, texts that are never parsed, and files whose bytes depend on the numbers only."""

from __future__ import annotations

import io
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

#: Okabe and Ito's colours without yellow, which is too light for lines on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
#: nine to seven colours: 63 series until a pair comes again
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
LINES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)))
#: benign and attacked, in all histograms: the paper's orange and blue
BENIGN, ATTACKED = "#E69F00", "#0072B2"
MAX_SERIES, MAX_PANELS = 24, 24
#: what an axis of shares spans, at least, in percentage points: a tenth of one is no reason to zoom in
LEAST_SPAN = 10.0
#: from this ratio of the largest to the smallest number on, an axis is logarithmic
LOG_RATIO = 20
#: of a histogram
BINS = 60
#: inches: the two columns of a page
PAGE = 6.75
DPI = 200
METADATA: dict[str, dict[str, Any]] = {
    ".svg": {"Date": None}, ".pdf": {"CreationDate": None}, ".png": {"Software": None},
}  # fmt: skip
STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # names come from strangers
    "svg.fonttype": "none", "pdf.fonttype": 42,  # text stays text
    "svg.hashsalt": "backdoor-bench-none", "hatch.linewidth": 0.5,
    "font.size": 8.0, "axes.titlesize": 8.0, "axes.labelsize": 7.5, "figure.titlesize": 7.0, "legend.fontsize": 7.5,
    "xtick.labelsize": 7.0, "ytick.labelsize": 7.0, "axes.linewidth": 0.6, "lines.linewidth": 1.2,
    "lines.markersize": 4.5, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.linewidth": 0.4, "grid.color": "#dddddd", "savefig.dpi": DPI,
}  # fmt: skip
#: what an axis is called where the metric's title would not do
AXIS_LABELS = {
    "ba": "benign accuracy, BA (%)", "asr": "attack success rate, ASR (%)", "ra": "robust accuracy, RA (%)",
    "tpr_at_1_fpr": "TPR at 1 % FPR (%)", "seconds": "time of the defense (s)",
    "cost_ratio": "cost (undefended trainings)", "peak_memory": "peak memory (MiB)",
    "clean_fraction": "clean data granted (%)",
}  # fmt: skip


def check_output(path: Path) -> None:
    """Raise `ConfigError` or `BenchError` now if a picture cannot be written to `path` later."""
    if path.suffix.lower() not in METADATA:
        raise ConfigError(f"'{path}' is no picture we can write", "name a .svg, .pdf or .png file")
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
    """Draw in our style and write it; equal numbers give equal bytes."""
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
    """Our style in place of the user's, and theirs again afterwards."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        yield


def plain(text: object, length: int = 48) -> str:
    """One line of at most `length` characters, without control characters; what is too long loses its middle."""
    kept = ("�" if unicodedata.category(c)[0] == "C" and not c.isspace() else c for c in str(text))
    flat = " ".join("".join(kept).split())
    if len(flat) > length:
        half = (length - 1) // 2
        flat = f"{flat[: length - 1 - half]}…{flat[-half:]}"
    return f" {flat}" if flat.startswith("_") else flat  # matplotlib leaves such labels out of legends


def axis_label(metric: Metric) -> str:
    """What an axis shows, its unit, and an arrow to the better side."""
    return f"{AXIS_LABELS.get(metric.name, f'{metric.title} (%)')} {metric.heading[-1]}"


def widen(low: float, high: float, metric: Metric) -> tuple[float, float]:
    """The ends of an axis that shows numbers from `low` to `high`, with a margin."""
    if metric.is_share and high - low < LEAST_SPAN:
        middle = min(max((low + high) / 2, LEAST_SPAN / 2), 100 - LEAST_SPAN / 2)
        low, high = min(low, middle - LEAST_SPAN / 2), max(high, middle + LEAST_SPAN / 2)
    margin = 0.05 * (high - low) or 0.5
    return low - margin, high + margin


def needs_log(values: Sequence[float]) -> bool:
    """Whether the numbers span so much that a linear axis would crowd the small ones."""
    return bool(values) and min(values) > 0 and max(values) / min(values) >= LOG_RATIO


def new_figure(width: float, height: float, title: str, notes: Sequence[str] = ()) -> Figure:
    """An empty figure of that size in inches below a title, and notes below the title."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle("\n".join(_wrap(width, title, notes)), linespacing=1.25, color="#333333")
    return figure


def _wrap(width: float, title: str, notes: Sequence[str]) -> list[str]:
    return [line for text in (title, *notes) for line in wrap(text, int(width * 19))]


def make_panels(
    count: int, title: str, notes: Sequence[str] = (), height: float = 2.1, legend_lines: int = 1, **options: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, at most four in a line, each `height` inches high."""
    columns = count if count < 4 else min(4, -(-count // -(-count // 4)))
    lines = -(-count // columns)
    width = {1: 3.6, 2: 5.4}.get(columns, PAGE)
    extra = 0.1 + 0.135 * len(_wrap(width, title, notes)) + 0.18 * legend_lines
    figure = new_figure(width, height * lines + extra, title, notes)
    axes = list(figure.subplots(lines, columns, squeeze=False, **options).flat)
    for axis in axes[count:]:
        axis.remove()
    return figure, axes[:count]


def set_title(axis: Axes, text: str) -> None:
    """A panel's title, broken where four panels stand side by side."""
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
    """How many lines a legend with these labels has."""
    return -(-len(labels) // _legend_columns(labels, width)) if labels else 0


def add_legend(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """A legend below everything, as wide as the figure allows."""
    columns = _legend_columns(labels, figure.get_size_inches()[0])
    figure.legend(list(handles), list(labels), loc="outside lower center", ncols=columns)


def _legend_columns(labels: Sequence[str], width: float) -> int:
    """As many columns as fit: each as wide as its longest label, with its handle."""
    for columns in range(len(labels), 1, -1):
        high = -(-len(labels) // columns)
        longest = [max(map(_inches, labels[start : start + high])) for start in range(0, len(labels), high)]
        if sum(0.5 + length for length in longest) <= width:
            return len(longest)
    return 1


def _inches(label: str) -> float:
    """About the width of a label in a legend."""
    wide = sum(c.isupper() or c in "mw@%" or unicodedata.east_asian_width(c) in "WF" for c in label)
    return 0.058 * len(label) + 0.035 * wide


def draw_series(axis: Axes, index: int, x: Sequence[float], y: Sequence[float], **options: Any) -> ErrorbarContainer:
    """Series number `index` with its own colour, marker and line."""
    colour = COLOURS[index % len(COLOURS)]
    solid = {"markeredgecolor": "white", "markeredgewidth": 0.4}
    hollow = {"markerfacecolor": "none", "markeredgewidth": 1.1}  # what lies below is still seen
    given: dict[str, Any] = {
        **(hollow if index % 2 else solid),
        "linestyle": LINES[index % len(LINES)],
        "capsize": 2,
        "capthick": 0.8,
        "elinewidth": 0.8,
        "clip_on": False,
        **options,
    }
    return axis.errorbar(x, y, color=colour, marker=MARKERS[index % len(MARKERS)], **given)


def draw_shares(
    axis: Axes, groups: Mapping[str, NDArray[np.floating]], counted: bool = True
) -> tuple[list[Any], list[str]]:
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
    return handles, [f"{name} ({len(values):,})" if counted else name for name, values in groups.items()]


def check_count(what: str, count: int, limit: int) -> None:
    """Raise `ConfigError` for more than people can tell apart."""
    if count > limit:
        raise ConfigError(f"{count} {what} are too many for one picture, it shows {limit}", "select fewer, as with -a")
