"""The verbs `bbn backdoorbench import`, `export` and `shim`."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from backdoor_bench_none.api import (
    BenchError,
    Cell,
    Counts,
    ExitCode,
    Registry,
    Stages,
    find_file,
    record_key,
)

if TYPE_CHECKING:
    from bbn_backdoorbench.reading import ToolboxRecord


results_option = click.option(
    "--results",
    type=click.Path(path_type=Path, file_okay=False),
    help="Results folder; default: that of the file, else results/.",
)


@click.group("backdoorbench")
def backdoorbench() -> None:
    """Read and write the records of BackdoorBench."""


@backdoorbench.command("import")
@click.argument("record", type=click.Path(path_type=Path))
@click.option(
    "--root", type=click.Path(path_type=Path), help="Folder of the clean data set; default: that of the checkout."
)
@click.option("--npz", type=click.Path(path_type=Path), help="The clean images as arrays (see the data set npz).")
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write a benchmark file with the record as its attack.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@results_option
def import_command(
    record: Path, root: Path | None, npz: Path | None, output: Path | None, device: str, results: Path | None
) -> int:
    """Check the record in the folder RECORD, evaluate its network, and print ACC, ASR and RA."""
    from backdoor_bench_none.api import choose_device
    from bbn_backdoorbench.reading import read_record

    if output is not None and (output.exists() or not output.absolute().parent.is_dir()):
        fault = "exists already" if output.exists() else "cannot be written: its folder does not exist"
        raise BenchError(f"'{output}' {fault}", "choose another file with --output")
    toolbox_record = read_record(record)
    text = benchmark_text(toolbox_record, record, root, npz)
    cell = plan_cell(text, Registry.default())
    stages = open_stages(cell, results, choose_device(device))
    measured = stages.evaluate()
    stages.store.write_record(measured)
    assert measured.counts is not None
    for line in describe(toolbox_record, measured.counts):
        click.echo(line)
    if output is not None:
        output.write_text(text, encoding="utf-8")
        click.echo(f"wrote {output}; to run it: bbn run {output}")
    return ExitCode.OK


def benchmark_text(record: ToolboxRecord, folder: Path, root: Path | None, npz: Path | None) -> str:
    """The text of a benchmark file in which the record is the attack."""
    import yaml

    name, params = f"backdoorbench:{record.dataset}", dict[str, str]()
    if npz is not None:
        name, params = "backdoorbench:npz", {"path": str(npz), "toolbox_name": record.dataset}
    elif root is not None:
        params["root"] = str(root)
    matrix = {
        "dataset": [{"name": name, "params": params}],
        "attack": [{"name": "backdoorbench_record", "params": {"record": str(folder)}, "as": folder.resolve().name}],
        "defense": ["no_defense"],
        "architecture": [f"backdoorbench:{record.model_name}"],
    }
    text: str = yaml.safe_dump({"version": 1, "name": folder.resolve().name, "matrix": matrix}, sort_keys=False)
    return text


def plan_cell(text: str, registry: Registry) -> Cell:
    """The one cell of a benchmark file; `BenchError` with the reason if it would be skipped."""
    from backdoor_bench_none.api import parse_config, plan_config

    plan = plan_config(*parse_config(text, "record"), registry, need_data=True)
    (cell,) = plan.cells
    if (reason := plan.skipped.get(record_key(cell))) is not None:
        raise BenchError(reason)
    return cell


def open_stages(cell: Cell, results: Path | None, device: Any) -> Stages:  # noqa: ANN401
    """The stages of a cell in float32, kept in the results folder."""
    from backdoor_bench_none.api import Context, Stages, Store

    store = Store(results or Path("results"))
    store.create()
    return Stages(cell, store, Context(device, 0))


def describe(record: ToolboxRecord, counts: Counts) -> Iterator[str]:
    """The record and its results, beside those that the toolbox wrote."""
    size = "x".join(map(str, record.image_size))
    yield f"record    {record.folder}: {record.model_name} on {record.dataset}, {record.num_classes} classes, {size}"
    words = {key: str(record.info[key]) for key in ("attack", "pratio", "attack_target") if key in record.info}
    known = [f"{key} {word}" for key, word in words.items() if word.isprintable()]  # since it is printed to a terminal
    yield f"attack    {', '.join(known) or 'not said in info.pickle'}"
    train = "no training set"
    if record.train is not None:
        train = f"{len(record.train.files)} of {record.train.size} training"
    yield f"changed   {train} and {len(record.test.files)} of {record.test.size} test images"
    if not record.has_truth:
        yield "warning   samples without a trigger are marked too, so there are no detection results"
    written = read_summary(record.folder)
    names = (("ACC", counts.benign_accuracy), ("ASR", counts.attack_success_rate), ("RA", counts.robust_accuracy))
    for name, count in names:
        if count is None:
            continue
        line = f"{name:9} {count.rate:.6f} = {count.hits} of {count.total}"
        before = written.get(f"test_{name.lower()}")
        if before is not None:
            line += f"   BackdoorBench wrote {before:.6f}"
        yield line


def read_summary(folder: Path) -> dict[str, float]:
    """The last row of the toolbox's own summary; empty if it is absent or cannot be read."""
    path = folder / "attack_df_summary.csv"
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = {row.get("", ""): row for row in csv.DictReader(file)}
        return {name: float(rows["last"][name]) for name in ("test_acc", "test_asr", "test_ra")}
    except (OSError, KeyError, ValueError, TypeError):
        return {}


@backdoorbench.command("export")
@click.argument("key")
@click.argument("file", required=False, type=click.Path(path_type=Path))
@results_option
@click.option(
    "--output", type=click.Path(path_type=Path), help="Folder of the record; default: <results>/backdoorbench/<name>."
)
def export_command(key: str, file: Path | None, results: Path | None, output: Path | None) -> int:
    """Write the cell of a benchmark file whose key starts with KEY as a record of BackdoorBench.

    The record is attack_result.pt with the images, and for a defended cell also defense/<name>/ in the same folder; put
    it below the toolbox's record/ under its own name. A defense is added to a record that exists.
    """
    import torch

    from bbn_backdoorbench.export import check_exportable, export_attack, export_defense, folder_name

    path = find_file(file)
    cell, folder = find_cell(key, path, results)
    check_exportable(cell)
    stages = open_stages(cell, folder, torch.device("cpu"))
    measured = stages.store.read_record(record_key(cell))
    if measured is None or measured.counts is None:
        raise BenchError(f"cell {record_key(cell)} has no results yet", f"bbn run {path}")
    name = folder_name(f"{cell.attack.label}_{cell.architecture.label}_s{cell.seed}")
    target = output or folder / "backdoorbench" / name
    if not target.exists() or cell.defense.name == "no_defense":
        export_attack(cell, stages, target)
        click.echo(f"wrote {target}")
    if cell.defense.name != "no_defense":
        click.echo(f"wrote {export_defense(cell, stages, measured.counts, target)}")
    return ExitCode.OK


@backdoorbench.command("shim")
def shim_command() -> int:
    """Print the folder that lets BackdoorBench's own scripts run with numpy 2.

    Put it on PYTHONPATH, in BackdoorBench's root, before a script, as in
    PYTHONPATH=$(bbn backdoorbench shim):. python attack/wanet.py
    """
    from bbn_backdoorbench.toolbox import SHIM

    click.echo(SHIM)
    return ExitCode.OK


def find_cell(key: str, file: Path, results: Path | None) -> tuple[Cell, Path]:
    """The one cell of `file` whose key starts with `key`, and the results folder."""
    from backdoor_bench_none.api import make_plan

    plan = make_plan(file, Registry.default(file.parent), need_data=True)
    cells = [cell for cell in plan.cells if record_key(cell).startswith(key)]
    if not cells:
        raise BenchError(f"no cell of '{file}' has a key that starts with '{key}'", "`bbn plan -v` shows the keys")
    if len(cells) > 1:
        message = f"{len(cells)} cells of '{file}' have keys that start with '{key}'"
        raise BenchError(message, "`bbn plan -v` shows the keys")
    return cells[0], results or plan.config.results
