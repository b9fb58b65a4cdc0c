"""An attack and a defense: all that a package for backdoor-bench-none needs."""

from backdoor_bench_none.api import hookimpl


@hookimpl
def bbn_attacks() -> dict[str, str]:
    """What this package adds to `bbn list attacks`; the class is imported when it is used."""
    return {"cross": "bbn_example.components:Cross"}


@hookimpl
def bbn_defenses() -> dict[str, str]:
    """What this package adds to `bbn list defenses`."""
    return {"trim_losses": "bbn_example.components:TrimLosses"}
