"""Provides a class that is no component."""

from backdoor_bench_none.api import hookimpl


@hookimpl
def bbn_defenses() -> dict[str, str]:
    return {"broken_class": "bbn_broken_class:NoDefense"}


class NoDefense:
    pass
