"""Asks a hook for an argument it does not have."""

from backdoor_bench_none.api import hookimpl


@hookimpl
def bbn_cell_skip(cell: object, colour: str) -> str:
    return f"{cell} is {colour}"
