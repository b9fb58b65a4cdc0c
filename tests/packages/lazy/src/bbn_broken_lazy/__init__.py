"""Needs a package that is not installed, once its component is used."""

from backdoor_bench_none.api import hookimpl


@hookimpl
def bbn_defenses() -> dict[str, str]:
    return {"broken_lazy": "bbn_broken_lazy.components:Lazy"}
