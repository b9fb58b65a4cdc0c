"""The verbs `bbn results show` and `bbn results check`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from backdoor_bench_none.cli.options import results_option
from backdoor_bench_none.cli.output import say
from backdoor_bench_none.errors import ExitCode


@click.group("results")
def results_command() -> None:
    """Show single records, and check a results folder."""


@results_command.command("show")
@click.argument("key")
@results_option
@click.option("--json", "as_json", is_flag=True, help="Print the whole record as JSON.")
def show_command(key: str, results: Path | None, as_json: bool) -> int:
    """Show the record whose key starts with KEY: what was run, its results, its costs, and why it failed if it did."""
    from backdoor_bench_none.report.record import describe_whole
    from backdoor_bench_none.results.store import Store

    record = Store(results or Path("results")).find_record(key)
    if as_json:
        click.echo(json.dumps(record.model_dump(mode="json", by_alias=True), indent=1))
        return ExitCode.OK
    for line in describe_whole(record):
        say(line)
    return ExitCode.OK


@results_command.command("check")
@results_option
@click.option(
    "--repair", is_flag=True, help="Move what is damaged into the folder `damaged`; `bbn run` makes it again."
)
def check_command(results: Path | None, repair: bool) -> int:
    """Read every record and artifact of a results folder, and list those that are not as they were written."""
    from backdoor_bench_none.errors import BenchError
    from backdoor_bench_none.results.store import Store
    from backdoor_bench_none.words import plural

    folder = results or Path("results")
    if not folder.is_dir():
        raise BenchError(f"there is no results folder '{folder}'", "name one with --results")
    store = Store(folder)
    damage = list(store.find_damage())
    for each in damage:
        moved = f"; moved to {store.set_aside(each.path)}" if repair else ""
        say(f"damaged {each.path}: {each.fault}{moved}")
    say(f"{plural('record', len(store.record_paths()))} and {plural('artifact', store.count_artifacts())} in {folder}")
    if not damage or repair:
        say("all intact" if not damage else "what was damaged is set aside")
        return ExitCode.OK
    say(f"{plural('file', len(damage))} damaged; `bbn results check --repair` sets them aside")
    return ExitCode.CELLS_FAILED
