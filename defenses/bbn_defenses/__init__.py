"""The first-party defenses: plugins like anybody's, one file each."""

from __future__ import annotations

from collections.abc import Mapping

from backdoor_bench_none.hookspecs import hookimpl


@hookimpl
def bbn_defenses() -> Mapping[str, str]:
    """The baseline without a defense, and the paper's NONE."""
    return {"no_defense": "bbn_defenses.no_defense:NoDefense", "none": "bbn_defenses.none:NONE"}
