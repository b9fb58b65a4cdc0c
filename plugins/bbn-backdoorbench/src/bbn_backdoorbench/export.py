"""Writes one of our cells as BackdoorBench's tools read it; refuses those that they would evaluate wrongly."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from backdoor_bench_none.api import BenchError, Cell, Counts, PoisonedSamples, Stages, own_version
from bbn_backdoorbench.attack import BackdoorBenchRecord
from bbn_backdoorbench.reading import read_record
from bbn_backdoorbench.words import DECOYS, MODELS
from bbn_backdoorbench.writing import Network, write_attack, write_defense

#: folder names that the toolbox's tools treat differently
SPECIAL = ("fp", "dbd")


def check_exportable(cell: Cell) -> str:
    """The toolbox's name of the cell's network; `BenchError` if its tools would evaluate the cell wrongly."""
    name = getattr(cell.architecture.component, "model_name", None)
    if cell.activation.name != "relu":
        raise BenchError(
            f"{cell.title}: BackdoorBench would load these weights into a network with ReLU and evaluate that",
            "only cells with the activation relu can be exported",
        )
    if name not in MODELS:
        raise BenchError(
            f"{cell.title}: {cell.architecture.label} is not a network of BackdoorBench",
            f"use one of {', '.join(f'backdoorbench:{model}' for model in MODELS)}",
        )
    if not cell.info.name.startswith("backdoorbench:"):
        raise BenchError(
            f"{cell.title}: BackdoorBench normalises images differently from how this network was trained",
            f"use the data set backdoorbench:{cell.dataset.name}",
        )
    if cell.attack.component.searches:
        raise BenchError(f"{cell.title}: the triggers of {cell.attack.label} are found in networks; a record has none")
    return str(name)


def take_network(cell: Cell, model: nn.Module, stages: Stages) -> Network:
    """The network under the toolbox's name; `BenchError` if its structure was changed."""
    name, weights = check_exportable(cell), model.state_dict()
    own = stages.builder(0).state_dict()
    if {key: value.shape for key, value in own.items()} != {key: value.shape for key, value in weights.items()}:
        raise BenchError(
            f"{cell.title}: the structure of {name} was changed, so BackdoorBench cannot load it",
            f"{cell.defense.label} or {cell.attack.label} adapts networks",
        )
    return Network(name, cell.info.num_classes, weights)


def export_attack(cell: Cell, stages: Stages, folder: Path) -> None:
    """Write the poisoned sets and the undefended network of a cell as a new record."""
    (train, test), (poisoned, triggered) = stages.data(), stages.poison()
    if not len(triggered):
        raise BenchError(f"{cell.title}: {cell.attack.label} has no triggered images, and BackdoorBench needs some")
    network = take_network(cell, stages.victim_network(), stages)
    facts = _facts(cell, len(train), poisoned)
    training_part = None if has_no_training_set(cell) else (train, poisoned)
    write_attack(folder, network, cell.info, training_part, (test, triggered), facts)


def export_defense(cell: Cell, stages: Stages, counts: Counts, record: Path) -> Path:
    """Write the defended network of a cell into the record in the folder `record`; returns the result's folder."""
    network = take_network(cell, stages.network(), stages)
    _check_same(cell, stages, record)
    return write_defense(
        record, folder_name(cell.defense.label), network, counts, f"backdoor-bench-none {own_version()}"
    )


def _check_same(cell: Cell, stages: Stages, folder: Path) -> None:
    """Raise `BenchError` unless the record in `folder` holds the victim of the cell."""
    record, victim = read_record(folder), stages.victim_network().state_dict()
    same = record.weights.keys() == victim.keys() and all(
        torch.equal(record.weights[name].to(tensor.dtype), tensor.cpu()) for name, tensor in victim.items()
    )
    if not same or f"backdoorbench:{record.dataset}" != cell.info.name:
        raise BenchError(
            f"'{folder}' is a record of another network than {cell.title} started from",
            "choose another folder with --output",
        )


def has_no_training_set(cell: Cell) -> bool:
    """Whether the cell's attack is a record without a training set."""
    return isinstance(cell.attack.component, BackdoorBenchRecord) and cell.attack.component.read().train is None


def folder_name(label: str) -> str:
    """The name of a folder for a label, one that the toolbox's tools treat like any other."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", label).strip("._") or "defense"
    return f"bbn_{name}" if name in SPECIAL else name


def _facts(cell: Cell, size: int, changed: PoisonedSamples) -> Mapping[str, Any]:
    """The content of info.pickle in the toolbox's words; for an imported record, that of its own info.pickle."""
    attack, marks, decoys = cell.attack.component, dict[str, int](), 0
    if changed.decoys is not None and changed.decoys.any():
        decoys = int(changed.decoys.sum())
        marks[DECOYS] = decoys
    if isinstance(attack, BackdoorBenchRecord):
        return {**attack.read().info, **marks}
    target, mode = getattr(attack, "target", None), getattr(attack, "label_mode", "all_to_one")
    labels = "all2all" if mode == "all_to_all" else "all2one"
    return {
        "attack": cell.attack.name, "attack_label_trans": labels, "attack_target": target,
        "pratio": (len(changed) - decoys) / size, "random_seed": cell.seed,
        "epochs": cell.recipe.epochs, "batch_size": cell.recipe.batch_size, "lr": cell.recipe.lr,
        "num_classes": cell.info.num_classes,
        "model": check_exportable(cell), "dataset": cell.info.name.removeprefix("backdoorbench:"), **marks,
    }  # fmt: skip
