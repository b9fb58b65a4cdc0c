"""The first-party attacks: plugins like anybody's, one file each."""

from __future__ import annotations

from collections.abc import Mapping

from backdoor_bench_none.hookspecs import hookimpl


@hookimpl
def bbn_attacks() -> Mapping[str, str]:
    """The baseline without an attack, and BadNets."""
    return {"clean": "bbn_attacks.clean:Clean", "badnets": "bbn_attacks.badnets:BadNets"}
