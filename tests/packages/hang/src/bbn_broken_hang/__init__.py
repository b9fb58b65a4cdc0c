"""Never ends."""

from backdoor_bench_none.api import hookimpl


@hookimpl
def bbn_defenses() -> dict[str, str]:
    return {"broken_hang": "bbn_broken_hang.components:Hangs"}
