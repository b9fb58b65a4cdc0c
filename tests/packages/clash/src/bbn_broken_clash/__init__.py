"""Calls its attack as a built-in is called."""

from backdoor_bench_none.api import hookimpl


@hookimpl
def bbn_attacks() -> dict[str, str]:
    return {"badnets": "bbn_broken_clash.components:Never"}
