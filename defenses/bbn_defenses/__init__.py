"""The first-party defenses: plugins with no special treatment, one module each.

`compromised_neurons` belongs to NONE.
"""

from __future__ import annotations

from collections.abc import Mapping

from backdoor_bench_none.api import hookimpl


@hookimpl
def bbn_defenses() -> Mapping[str, str]:
    """NONE, the defenses it is compared with, and their controls."""
    return {
        "no_defense": "bbn_defenses.no_defense:NoDefense",
        "none": "bbn_defenses.none:NONE",
        "none_robust": "bbn_defenses.none:NONERobust",
        "none_retrain": "bbn_defenses.none_retrain:NONERetrain",
        "dp_sgd": "bbn_defenses.dp_sgd:DPSGD",
        "nad": "bbn_defenses.nad:NAD",
        "ac": "bbn_defenses.ac:AC",
        "abl": "bbn_defenses.abl:ABL",
        "group_norm": "bbn_defenses.dp_sgd:GroupNorm",
        "fine_tune": "bbn_defenses.fine_tune:FineTune",
        "fine_pruning": "bbn_defenses.fine_pruning:FinePruning",
        "spectral_signatures": "bbn_defenses.spectral_signatures:SpectralSignatures",
        "oracle_filter": "bbn_defenses.oracle_filter:OracleFilter",
    }
