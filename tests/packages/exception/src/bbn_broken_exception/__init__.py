"""Raises while it runs."""

from backdoor_bench_none.api import hookimpl


@hookimpl
def bbn_defenses() -> dict[str, str]:
    return {"broken_exception": "bbn_broken_exception.components:Raises"}
