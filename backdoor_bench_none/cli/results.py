"""The verb `bbn results show`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from backdoor_bench_none.cli.options import results_option
from backdoor_bench_none.cli.output import say
from backdoor_bench_none.errors import ExitCode


@click.group("results")
def results_command() -> None:
    """Show single records."""


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
