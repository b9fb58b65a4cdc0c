"""The verb `bbn paper`."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING

import click

from backdoor_bench_none.cli.options import scale_option
from backdoor_bench_none.cli.output import say
from backdoor_bench_none.errors import BenchError, ExitCode

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from backdoor_bench_none.paper.presets import Scale

#: those that `report.plots.figures` can prepare
FIGURES = ("fig2", "fig4", "fig5", "fig6", "fig7", "fig8", "fig9", "fig10")


@click.command("paper")
@click.argument("figure", type=click.Choice(FIGURES))
@scale_option("As in the paper, or on 10,000 images with narrow networks, for two CPU cores; fig6 and fig7 need none.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File to write, .svg, .pdf or .png; default: <figure>.png.",
)
@click.option(
    "--results", type=click.Path(path_type=Path, file_okay=False), default=Path("results"), help="Results folder."
)
@click.option("-j", "--slots", type=click.IntRange(min=1), help="Jobs at the same time.")
def paper_command(figure: str, scale: Scale, output: Path | None, results: Path, slots: int | None) -> int:
    """Draw a figure of the paper: run the missing cells of its benchmark, write a picture, and its numbers as CSV.

    `bbn init --from NAME` writes the benchmark files of the paper's tables and figures.
    """
    from backdoor_bench_none.paper.presets import benchmark_text
    from backdoor_bench_none.planning.plan import plan_config
    from backdoor_bench_none.planning.reading import parse_config
    from backdoor_bench_none.registry.components import Registry
    from backdoor_bench_none.report.plots.canvas import check_output, write_picture
    from backdoor_bench_none.report.plots.figures import needs_results, prepare_figure
    from backdoor_bench_none.report.tables import open_console
    from backdoor_bench_none.results.store import Store
    from backdoor_bench_none.run.progress import Lines
    from backdoor_bench_none.run.runner import Options, run_plan

    path = output or Path(f"{figure}.png")
    check_output(path)
    config, source = parse_config(benchmark_text(figure, scale), f"{figure}.yaml")
    registry = Registry.default()
    plan = plan_config(config, source, registry, need_data=True)
    if needs_results(figure):
        summary = run_plan(plan, registry, Options(results, slots=slots), Lines(open_console()))
        if summary.failed or summary.interrupted or summary.not_run:
            raise BenchError(f"{figure} needs all of its cells", "the same command continues where it stopped")
    drawing = prepare_figure(figure, plan, Store(results))
    for note in drawing.notes:
        say(f"not shown: {note}", err=True)
    write_picture(drawing.draw, path)
    numbers = path.with_suffix(".csv")
    _write_numbers(drawing.numbers, numbers)
    say(f"wrote {path} and {numbers}")
    return ExitCode.OK


def _write_numbers(lines: Sequence[Mapping[str, object]], path: Path) -> None:
    try:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(lines)
    except OSError as error:
        raise BenchError(f"'{path}' cannot be written: {error.strerror}", "choose another with --output") from error
