"""A plugin for backdoor-bench-none with an attack and a defense."""

from backdoor_bench_none.api import hookimpl


@hookimpl
def bbn_attacks() -> dict[str, str]:
    """The attacks of this package, by name; a class is imported when it is used."""
    return {"cross": "bbn_example.components:Cross"}


@hookimpl
def bbn_defenses() -> dict[str, str]:
    """The defenses of this package, by name."""
    return {"trim_losses": "bbn_example.components:TrimLosses"}
