"""The first-party attacks: plugins with no special treatment, one module each."""

from __future__ import annotations

from collections.abc import Mapping

from backdoor_bench_none.api import hookimpl


@hookimpl
def bbn_attacks() -> Mapping[str, str]:
    """The baseline without an attack, the attacks of the paper, and classic ones."""
    return {
        "clean": "bbn_attacks.clean:Clean",
        "badnets": "bbn_attacks.badnets:BadNets",
        "blended": "bbn_attacks.blended:Blended",
        "adaptive_blend": "bbn_attacks.adaptive_blend:AdaptiveBlend",
        "sig": "bbn_attacks.sig:SIG",
        "wanet": "bbn_attacks.wanet:WaNet",
        "label_consistent": "bbn_attacks.label_consistent:LabelConsistent",
        "hidden_trigger": "bbn_attacks.hidden_trigger:HiddenTrigger",
        "natural": "bbn_attacks.natural:Natural",
        "adaptive": "bbn_attacks.adaptive:Adaptive",
        "dba": "bbn_attacks.dba:DBA",
        "trojannet": "bbn_attacks.trojannet:TrojanNet",
        "coordinate": "bbn_attacks.coordinate:Coordinate",
    }
