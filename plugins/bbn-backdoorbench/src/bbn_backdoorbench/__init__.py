"""A bridge to BackdoorBench: its records as attacks, its networks and defenses, and our results in its layout.

BackdoorBench's code is neither copied nor imported; the bridge exchanges files with it and runs its scripts as
processes in the user's checkout.
"""

from __future__ import annotations

from collections.abc import Mapping

from backdoor_bench_none.api import hookimpl
from bbn_backdoorbench.words import DATASETS, MODELS, SCRIPTS


@hookimpl
def bbn_attacks() -> Mapping[str, str]:
    """A record folder, as an attack."""
    return {"backdoorbench_record": "bbn_backdoorbench.attack:BackdoorBenchRecord"}


@hookimpl
def bbn_datasets() -> Mapping[str, str]:
    """The data sets with the toolbox's normalisation and order."""
    classes = {
        f"backdoorbench:{name}": f"bbn_backdoorbench.datasets:{facts.component}" for name, facts in DATASETS.items()
    }
    return {**classes, "backdoorbench:npz": "bbn_backdoorbench.datasets:Arrays"}


@hookimpl
def bbn_architectures() -> Mapping[str, str]:
    """The toolbox's networks by its own names."""
    return {f"backdoorbench:{name}": f"bbn_backdoorbench.networks:{component}" for name, component in MODELS.items()}


@hookimpl
def bbn_defenses() -> Mapping[str, str]:
    """The toolbox's defenses, run in the user's checkout."""
    return {f"backdoorbench:{name}": f"bbn_backdoorbench.toolbox:{component}" for name, component in SCRIPTS.items()}


@hookimpl
def bbn_commands() -> Mapping[str, str]:
    """The command group `bbn backdoorbench`."""
    return {"backdoorbench": "bbn_backdoorbench.cli:backdoorbench"}
