"""The verb `bbn plot`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from backdoor_bench_none.cli.options import (
    Selection,
    file_argument,
    read_plan,
    results_option,
    selection_options,
    warn_of_absent,
)
from backdoor_bench_none.cli.output import say
from backdoor_bench_none.cli.table import find_rows
from backdoor_bench_none.errors import ConfigError, ExitCode, NothingSelectedError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from backdoor_bench_none.planning.plan import Plan
    from backdoor_bench_none.results.metrics import Metric
    from backdoor_bench_none.results.rows import Row
    from backdoor_bench_none.results.store import Store

KINDS = ("scatter", "matrix", "curve", "sweep", "activations", "triggers", "scores")
#: the kinds that show results of records; the others show data and networks of cells
OF_RECORDS = ("scatter", "matrix", "curve", "sweep")
#: option -> the kinds that take it
GOES_WITH = {"metric": ("scatter", "matrix", "sweep"), "x": ("sweep",), "layers": ("activations",), "all": OF_RECORDS}


@dataclass(frozen=True)
class Wanted:
    """The kind of picture and its options, as given on the command line."""

    kind: str
    metrics: tuple[str, ...]
    x: str | None
    layers: tuple[str, ...]
    everything: bool

    def check(self) -> None:
        """Raise `ConfigError` for options that the kind does not take."""
        options = {"metric": self.metrics, "x": self.x, "layers": self.layers, "all": self.everything}
        for name, value in options.items():
            if value and self.kind not in GOES_WITH[name]:
                raise ConfigError(f"--{name} does not go with {self.kind}", f"it is for {', '.join(GOES_WITH[name])}")
        if self.kind == "sweep" and not self.x:
            raise ConfigError("sweep needs --x AXIS.PARAMETER", "as --x defense.lr or --x attack.poison_rate")


@click.command("plot")
@click.argument("kind", type=click.Choice(KINDS))
@file_argument
@results_option
@selection_options
@click.option("--output", type=click.Path(path_type=Path), help=".svg, .pdf or .png; default: KIND.png.")
@click.option("--metric", metavar="METRICS", help="For scatter, matrix, sweep; default: ba,asr. See `bbn table`.")
@click.option("--x", metavar="AXIS.PARAMETER", help="For sweep: the parameter on the x axis, as defense.lr.")
@click.option("--layers", multiple=True, metavar="PATTERN", help="For activations; default: the last four layers.")
@click.option("--all", "everything", is_flag=True, help="All records of the results folder, not the file's only.")
def plot_command(
    kind: str,
    file: Path | None,
    results: Path | None,
    selection: Selection,
    output: Path | None,
    metric: str | None,
    x: str | None,
    layers: tuple[str, ...],
    everything: bool,
) -> int:
    """Draw a picture of finished cells for a paper.

    \b
    scatter      two metrics against each other, one point per defense
    matrix       the comparison matrix as heat maps
    curve        the training loss of victims over epochs
    sweep        metrics over a swept parameter, --x
    activations  neurons on benign and triggered images, for one cell
    triggers     images with the trigger of each attack, and what it changes
    scores       scores of benign and poisoned samples, and the cut, for one cell

    Text in .svg and .pdf files stays text, and equal results give equal files.
    """
    wanted = Wanted(kind, _split(metric), x, layers, everything)
    wanted.check()
    from backdoor_bench_none.report.plots.canvas import check_output, write_picture

    path = output or Path(f"{kind}.png")
    check_output(path)
    make = _prepare_rows if kind in OF_RECORDS else _prepare_cells
    write_picture(make(wanted, file, results, selection), path)
    say(f"wrote {path}")
    return ExitCode.OK


def _split(text: str | None) -> tuple[str, ...]:
    return tuple(filter(None, (part.strip() for part in (text or "").split(","))))


def _prepare_rows(
    wanted: Wanted, file: Path | None, results: Path | None, selection: Selection
) -> Callable[[], Figure]:
    """A function that draws the picture of records; what it shows is read and checked here."""
    from backdoor_bench_none.report.plots.labels import find_metrics
    from backdoor_bench_none.report.plots.sweep import split_parameter

    metrics = find_metrics(wanted.metrics or ("ba", "asr"), 2 if wanted.kind == "scatter" else None)
    if wanted.x:
        split_parameter(wanted.x)
    rows, folder = find_rows(file, results, selection, wanted.everything)
    if not rows:
        raise NothingSelectedError(f"no record in '{folder}' is selected", "`bbn table --all` shows what is there")
    return _prepare_numbers(wanted, rows, metrics, folder)


def _prepare_numbers(
    wanted: Wanted, rows: list[Row], metrics: tuple[Metric, ...], folder: Path
) -> Callable[[], Figure]:
    from backdoor_bench_none.report.plots import curve, matrix, scatter, sweep
    from backdoor_bench_none.results.store import Store

    if wanted.kind == "scatter":
        return partial(scatter.draw_scatter, scatter.find_points(rows, metrics))
    if wanted.kind == "matrix":
        return partial(matrix.draw_matrix, matrix.make_matrix(rows, metrics))
    if wanted.kind == "sweep":
        return partial(sweep.draw_sweep, sweep.find_sweep(rows, str(wanted.x), metrics))
    return partial(curve.draw_curves, curve.find_curves(rows, Store(folder)), rows)


def _prepare_cells(
    wanted: Wanted, file: Path | None, results: Path | None, selection: Selection
) -> Callable[[], Figure]:
    """A function that draws the picture of data or networks; what it shows is computed here."""
    from backdoor_bench_none.results.store import Store

    plan, _, folder = read_plan(file, results, selection)
    if wanted.kind == "triggers":
        from backdoor_bench_none.report.plots.triggers import draw_sheets, make_sheets

        sheets, notes = make_sheets(plan.cells)
        for note in notes:
            say(f"not shown: {note}", err=True)
        return partial(draw_sheets, sheets)
    warn_of_absent(plan)
    return _prepare_cell(wanted, plan, Store(folder))


def _prepare_cell(wanted: Wanted, plan: Plan, store: Store) -> Callable[[], Figure]:
    from backdoor_bench_none.report.plots import activations, scores
    from backdoor_bench_none.report.plots.finished import open_cell

    if wanted.kind == "scores":
        return partial(scores.draw_scores, scores.read_scores(open_cell(plan, store)))
    layers = activations.read_activations(open_cell(plan, store), wanted.layers)
    return partial(activations.draw_activations, layers)
