"""Takes its process with it."""

from backdoor_bench_none.api import hookimpl


@hookimpl
def bbn_defenses() -> dict[str, str]:
    return {"broken_killed": "bbn_broken_killed.components:Killed"}
