"""Has a hook of a name that is none."""

from backdoor_bench_none.api import hookimpl


@hookimpl
def bbn_defences() -> dict[str, str]:
    return {"broken_hook": "bbn_broken_hook.components:Never"}
