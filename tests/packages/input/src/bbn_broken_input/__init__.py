"""Writes into the training set it is given."""

from backdoor_bench_none.api import hookimpl


@hookimpl
def bbn_defenses() -> dict[str, str]:
    return {"broken_input": "bbn_broken_input.components:Scribbles"}


@hookimpl
def bbn_attacks() -> dict[str, str]:
    return {"broken_input": "bbn_broken_input.components:ScribblingAttack"}
