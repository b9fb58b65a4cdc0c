"""How verbs print what people read."""

from __future__ import annotations

import click

from backdoor_bench_none.words import wrap


def say(text: str, *, err: bool = False) -> None:
    """Print `text`, with lines wider than the terminal broken between words."""
    click.echo(wrap(text), err=err)
