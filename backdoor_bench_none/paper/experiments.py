"""The experiments of the paper: the cell behind each row of its tables, and the cells that its figures show.

What the paper leaves open is filled in here, once: DP-SGD in Table 1 is the second of its two settings, whose accuracy
fits (Table 2), and the natural Trojans meet NONE as its authors run it there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from backdoor_bench_none.errors import ConfigError, did_you_mean

TABLES = Path(__file__).parent / "tables.json"
#: an entry of a benchmark file
Entry = dict[str, Any]

DATASETS = {"MNIST": "mnist", "CIFAR-10": "cifar10", "GTSRB": "gtsrb", "ImageNet-10": "imagenette"}
DEFENSES: Mapping[str, Entry] = {
    "undefended": {"name": "no_defense"},
    "dp-sgd": {"name": "dp_sgd", "params": {"clip": 1.0, "noise": 0.5}},
    "dp-sgd-1": {"name": "dp_sgd", "params": {"clip": 4.0, "noise": 0.1}, "as": "dp_sgd_1"},
    "dp-sgd-2": {"name": "dp_sgd", "params": {"clip": 1.0, "noise": 0.5}, "as": "dp_sgd_2"},
    "nad": {"name": "nad"},
    "ac": {"name": "ac"},
    "abl": {"name": "abl"},
    "none": {"name": "none"},
}
#: NONE on natural Trojans, as its authors run it: 20 % of the neurons, ten rounds of 40 epochs, no sample dropped
NATURAL_NONE: Entry = {
    "name": "none", "params": {"r1": 0.2, "lr": 1e-4, "rounds": 10, "epochs": 40, "drop_samples": False},
}  # fmt: skip
ATTACKS: Mapping[str, Entry] = {
    "clean": {"name": "clean"},
    "badnets": {"name": "badnets", "params": {"label_mode": "all_to_one"}},
    "badnets-all-to-all": {"name": "badnets", "params": {"label_mode": "all_to_all"}, "as": "badnets_all_to_all"},
    "label-consistent": {"name": "label_consistent"},
    "hidden-trigger": {"name": "hidden_trigger", "params": {"source": 0, "target": 1}},
    "natural": {"name": "natural"},
    "dba": {"name": "dba"},
    "adaptive": {"name": "adaptive"},
}
TRIGGERS = {"Dynamic Patch": "dynamic", "Static Patch": "static", "Watermark": "watermark"}
ACTIVATIONS = {"LeakyReLU": "leaky_relu"}
#: data sets of the paper that nobody can download -> why
UNAVAILABLE = {
    "TrojAI": "TrojAI's training sets were never published",
    "ImageNet-pair": "ImageNet's classes 'theater curtain' and 'plunger' need a registration; "
    "`bbn init --from hidden_trigger` is the file for those who have them",
}


@dataclass(frozen=True)
class Experiment:
    """A row of a table of the paper, and the entries of a benchmark file, by axis, that repeat it."""

    table: str
    row: Mapping[str, Any]
    entries: Mapping[str, Entry]
    #: why it cannot be repeated; "" if it can
    unavailable: str = ""

    @property
    def named(self) -> set[str]:
        """The parameters that the row names, as "attack.size"."""
        return {f"{axis}.{name}" for axis, entry in self.entries.items() for name in entry.get("params", {})}

    @property
    def labels(self) -> tuple[str, ...]:
        """The label of each entry, in the order of `entries`."""
        return tuple(str(entry.get("as", entry["name"])) for entry in self.entries.values())


@cache
def read_tables() -> Mapping[str, Any]:
    """The tables of the paper that have rates: caption and rows; every rate is a fraction of 1."""
    tables: Mapping[str, Any] = json.loads(TABLES.read_text(encoding="utf-8"))["tables"]
    return tables


def find_table(name: str) -> Mapping[str, Any]:
    """The caption and the rows of a table; `ConfigError` if there is none of this name."""
    tables = read_tables()
    if name not in tables:
        raise ConfigError(f"the paper has no table '{name}' of rates", did_you_mean(name, tables))
    table: Mapping[str, Any] = tables[name]
    return table


def experiments_of(table: str) -> list[Experiment]:
    """The experiment behind each row of a table, in its order; `ConfigError` if the paper has no such table."""
    return [_experiment(table, row) for row in find_table(table)["rows"]]


def _experiment(table: str, row: Mapping[str, Any]) -> Experiment:
    trainer: Entry = {"name": "centralized"}
    dataset: Entry = {"name": DATASETS.get(row["dataset"], "image_folder"), "recipe": "paper"}
    defense = deepcopy(DEFENSES[row["defense"]])
    if table == "table2" and row["defense"] == "none":
        defense = deepcopy(NATURAL_NONE)
    if table == "table11":
        trainer = {"name": "federated", "recipe": {"epochs": 30}}
        dataset.pop("recipe")
        if row["defense"] == "none":
            defense = {"name": "none", "params": {"epochs": 10}}
    entries: dict[str, Entry] = {
        "dataset": dataset,
        "attack": _attack(row),
        "defense": _defense(defense, row),
        "architecture": {"name": row.get("network", "ResNet18").lower()},
        "activation": {"name": ACTIVATIONS.get(row.get("activation", ""), row.get("activation", "ReLU").lower())},
        "trainer": trainer,
    }
    return Experiment(table, row, entries, UNAVAILABLE.get(row["dataset"], ""))


def _attack(row: Mapping[str, Any]) -> Entry:
    """The attack of a row, with what its table varies."""
    varied: dict[str, Any] = {}
    if "trigger_size" in row:
        varied = {"trigger_kind": "dynamic", "size": int(row["trigger_size"])}
    elif "trigger" in row:
        varied = {"trigger_kind": TRIGGERS[row["trigger"]]}
    elif "poison_rate" in row:
        varied = {"poison_rate": float(row["poison_rate"])}
    elif "alpha" in row:
        varied = {"alpha": float(row["alpha"])}
    return _with(deepcopy(ATTACKS[row["attack"]]), varied)


def _defense(entry: Entry, row: Mapping[str, Any]) -> Entry:
    """`entry` with what the table of the row varies: the share r2, 0 for a single neuron, or the two lambdas."""
    if "selection_threshold" in row:
        written = str(row["selection_threshold"])
        share = float(written.removesuffix("%")) / 100
        if written == "1":
            share = 0.0
        return _with(entry, {"r2": share})
    if "lambda_h" in row:
        return _with(entry, {"lambda_h": float(row["lambda_h"]), "lambda_l": float(row["lambda_l"])})
    return entry


def _with(entry: Entry, varied: Mapping[str, Any]) -> Entry:
    """`entry` with more parameters, which its label names."""
    if not varied:
        return entry
    values = ",".join(f"{name}={value}" for name, value in varied.items())
    label = f"{entry.get('as', entry['name'])}[{values}]"
    return {**entry, "params": {**entry.get("params", {}), **varied}, "as": label}


# Figures.


#: epochs of tuning at which Figs. 8 and 9 are measured
CURVE_EPOCHS = (1, 2, 3, 5, 7, 10)


def _none_with(parameter: str, values: Sequence[float]) -> list[dict[str, Entry]]:
    """NONE with each value of a parameter, after each number of epochs."""
    return [
        {"defense": _with(DEFENSES["none"], {parameter: value, "epochs": epochs})}
        for value in values
        for epochs in CURVE_EPOCHS
    ]


#: figures of networks on CIFAR-10 -> caption, and the entries of their cells that differ from BadNets on ResNet18
FIGURES: Mapping[str, tuple[str, Sequence[Mapping[str, Entry]]]] = {
    "fig2": (
        "activation values of a benign network and of one with a TrojanNet",
        [{"attack": {"name": "clean"}}, {"attack": {"name": "trojannet"}}],
    ),
    "fig4": (
        "activation values on other architectures",
        [{"architecture": {"name": "nin"}}, {"architecture": {"name": "vgg16"}}],
    ),
    "fig5": ("activation values of the last four convolutional layers of ResNet18", [{}]),
    "fig8": (
        "BA and ASR over the epochs of NONE's tuning, for each learning rate",
        [{}, *_none_with("lr", [1e-2, 1e-3, 1e-4, 1e-5])],
    ),
    "fig9": (
        "BA and ASR over the epochs of NONE's tuning, for each share of a layer's neurons that is reset",
        [{}, *_none_with("r1", [0.005, 0.01, 0.03, 0.05, 0.1, 0.15])],
    ),
    "fig10": (
        "images with larger and larger triggers",
        [{"attack": _with(ATTACKS["badnets"], {"size": size})} for size in (3, 5, 7, 9, 15, 20)],
    ),
}


def cells_of_figure(name: str) -> list[dict[str, Entry]]:
    """The entries of each cell that a figure shows, by axis; `ConfigError` if it shows no network on CIFAR-10."""
    if name not in FIGURES:
        raise ConfigError(f"the paper has no figure '{name}' of networks on CIFAR-10", did_you_mean(name, FIGURES))
    common: dict[str, Entry] = {
        "dataset": {"name": "cifar10", "recipe": "paper"},
        "attack": ATTACKS["badnets"],
        "defense": DEFENSES["undefended"],
        "architecture": {"name": "resnet18"},
        "activation": {"name": "relu"},
        "trainer": {"name": "centralized"},
    }
    return [deepcopy({**common, **changed}) for changed in FIGURES[name][1]]
