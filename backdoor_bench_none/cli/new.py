"""The verb `bbn new`."""

from __future__ import annotations

from pathlib import Path

import click

from backdoor_bench_none.cli.options import open_registry
from backdoor_bench_none.cli.output import say
from backdoor_bench_none.errors import ConfigError, ExitCode
from backdoor_bench_none.scaffold import KINDS, write_package


@click.command("new")
@click.argument("kind", type=click.Choice(KINDS))
@click.argument("name")
@click.option("--output", type=click.Path(path_type=Path), help="Folder to write to; default: bbn-<name>.")
def new_command(kind: str, name: str, output: Path | None) -> int:
    """Write a package with a working attack, defense or architecture called NAME, and its contract test."""
    if name in open_registry(None).names(kind):
        raise ConfigError(f"there is {kind} '{name}' already", "choose another name: the built-in one would win")
    folder = output or Path(f"bbn-{name.replace('_', '-')}")
    for path in write_package(kind, name, folder):
        say(f"wrote {path}")
    say(f"next: pip install --editable '{folder}[test]' && bbn check bbn-{name.replace('_', '-')}")
    return ExitCode.OK
