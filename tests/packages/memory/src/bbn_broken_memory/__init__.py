"""Takes all the memory there is, up to 64 GB; it is not touched."""

from backdoor_bench_none.api import hookimpl


@hookimpl
def bbn_defenses() -> dict[str, str]:
    return {"broken_memory": "bbn_broken_memory.components:Hog"}
