"""The verb `bbn paper`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from backdoor_bench_none.cli.output import say
from backdoor_bench_none.errors import BenchError, ExitCode
from backdoor_bench_none.planning.stage_table import record_key

if TYPE_CHECKING:
    from backdoor_bench_none.contracts.cell import Cell
    from backdoor_bench_none.contracts.record import Record
    from backdoor_bench_none.paper.regions import Panel
    from backdoor_bench_none.results.store import Store


@click.command("paper")
@click.argument("figure", type=click.Choice(["fig6", "fig7"]))
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File to write, .png or .pdf; default: <figure>.png.",
)
@click.option(
    "--results", type=click.Path(path_type=Path, file_okay=False), default=Path("results"), help="Results folder."
)
@click.option("-j", "--slots", type=click.IntRange(min=1), help="Jobs at the same time.")
def paper_command(figure: str, output: Path | None, results: Path, slots: int | None) -> int:
    """Draw a figure of the paper: run the missing cells of its benchmark and write a picture.

    `bbn init --from NAME` writes the benchmark files of the paper's tables and figures.
    """
    from backdoor_bench_none.paper import benchmark_text
    from backdoor_bench_none.paper.regions import draw_panels, with_ideal_trojan
    from backdoor_bench_none.planning.plan import plan_config
    from backdoor_bench_none.planning.reading import parse_config
    from backdoor_bench_none.registry.components import Registry
    from backdoor_bench_none.report.tables import open_console
    from backdoor_bench_none.results.store import Store
    from backdoor_bench_none.run.progress import Lines
    from backdoor_bench_none.run.runner import Options, run_plan

    config, source = parse_config(benchmark_text(figure), f"{figure}.yaml")
    registry = Registry.default()
    plan = plan_config(config, source, registry)
    summary = run_plan(plan, registry, Options(results, slots=slots), Lines(open_console()))
    if summary.failed or summary.interrupted or summary.not_run:
        raise BenchError(f"{figure} needs all of its cells", "the same command continues where it stopped")
    store = Store(results)
    panels = [draw_regions(cell, store) for cell in plan.cells]
    trojan = plan.cells[-1].attack.component.model_dump()
    if figure == "fig6":
        panels[0] = with_ideal_trojan(panels[0], trojan["value"], trojan["target"])
    path = output or Path(f"{figure}.png")
    draw_panels(panels, plan.cells[0].dataset.component.load()[1], trojan["value"], path)
    say(f"wrote {path}")
    return ExitCode.OK


def draw_regions(cell: Cell, store: Store) -> Panel:
    """The label that the cell's finished network gives to each point of the plane."""
    import torch

    from backdoor_bench_none.contracts.context import Context
    from backdoor_bench_none.contracts.network import Pixels, predict_logits
    from backdoor_bench_none.paper.regions import LEVELS, Panel, plane
    from backdoor_bench_none.run.stages import Stages

    context = Context(torch.device("cpu"), 0)
    logits = predict_logits(
        Stages(cell, store, context).network(), plane(), Pixels.of(cell.info, context.device), context
    )
    record = store.read_record(record_key(cell))
    return Panel(_title(cell, record), logits.argmax(1).reshape(LEVELS, LEVELS).numpy())


def _title(cell: Cell, record: Record | None) -> str:
    params = cell.attack.component.model_dump()
    parts = []
    if cell.defense.name != "no_defense":
        parts.append(cell.defense.label)
    if "poison_rate" in params:
        parts.append(f"{100 * params['poison_rate']:g} % poisoned")
    else:
        parts.append("clean")
    title = ", ".join(parts)
    if record is None or record.counts is None or record.counts.attack_success_rate is None:
        return title
    counts, success = record.counts, record.counts.attack_success_rate
    return f"{title}\nBA {counts.benign_accuracy.rate:.3f}  ASR {success.rate:.3f}"
