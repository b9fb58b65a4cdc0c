"""The experiments of the paper: the cell behind each row of its tables, and the benchmark files made of these cells.

What the paper leaves open is filled in here, once: DP-SGD in Table 1 is the second of its two settings, whose accuracy
fits (Table 2), and the natural Trojans meet NONE as its authors run it there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from backdoor_bench_none.errors import ConfigError, did_you_mean

TABLES = Path(__file__).parent / "tables.json"
Scale = Literal["full", "small"]
#: an entry of a benchmark file
Entry = dict[str, Any]
#: the axes of a block, in the order in which blocks are merged
MERGED = ("defense", "activation", "architecture", "attack", "dataset")

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


#: data set -> what it is at the scale `small`, which fits two CPU cores: a part, without crop and flip
SMALL_DATASETS: Mapping[str, Entry] = {
    "mnist": {"name": "mnist", "params": {"first": 10_000}, "recipe": {"epochs": 10, "augment": False}},
    "cifar10": {"name": "cifar10", "params": {"first": 10_000}, "recipe": {"epochs": 20, "augment": False}},
}
SMALL_WIDTH = 0.25
SMALL_SEEDS = [0, 1, 2]
#: defense -> parameters that give it as many steps on 10,000 images as its authors' have on 50,000: NAD's student 800
#: and teacher 400, ABL's ascent 16
SMALL_DEFENSES: Mapping[str, Mapping[str, Any]] = {
    "nad": {"epochs": 100, "teacher_epochs": 50},
    "abl": {"unlearning_epochs": 16},
}
#: what is shown beside the paper's columns at the scale `small`
SMALL_EXTRA: Entry = {"name": "none_retrain"}


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


# Benchmark files.


def benchmark_of(table: str, scale: Scale = "full") -> str:
    """The benchmark file of a table: every row that can be repeated, as YAML; `ConfigError` if there is none.

    At the scale `small` it has 10,000 images, networks of a quarter of the width, three seeds, and the column
    `none_retrain`; other data sets than MNIST and CIFAR-10 are left out.
    """
    if scale == "small":
        return _small_benchmark(table)
    experiments = experiments_of(table)
    available = [experiment for experiment in experiments if not experiment.unavailable]
    reasons = list(dict.fromkeys(experiment.unavailable for experiment in experiments if experiment.unavailable))
    if not available:
        raise ConfigError(f"{table} cannot be repeated: {'; '.join(reasons)}")
    caption = find_table(table)["caption"]
    lines = [f"# {table} of the paper: {caption}. {len(available)} of its {len(experiments)} rows."]
    lines += [f"# Left out: {reason}." for reason in reasons]
    matrix, *include = merge_blocks(experiment.entries for experiment in available)
    content: dict[str, Any] = {"version": 1, "name": table, "matrix": matrix}
    if include:
        content["include"] = include
    return "\n".join([*lines, write_yaml(content)])


def _small_benchmark(table: str) -> str:
    experiments = [each for each in experiments_of(table) if each.entries["dataset"]["name"] in SMALL_DATASETS]
    cells = [_small_entries(each.entries) for each in experiments if not each.unavailable]
    if not cells:
        raise ConfigError(f"{table} has no row at the scale small: it has neither MNIST nor CIFAR-10")
    undefended = [cell for cell in cells if cell["defense"]["name"] == "no_defense"]
    cells += [{**cell, "defense": SMALL_EXTRA} for cell in undefended]
    matrix, *include = merge_blocks(cells)
    content: dict[str, Any] = {"version": 1, "name": f"{table}-small", "seeds": SMALL_SEEDS, "matrix": matrix}
    if include:
        content["include"] = include
    caption = find_table(table)["caption"]
    return f"# {table} of the paper at a scale for two CPU cores: {caption}.\n{write_yaml(content)}"


def _small_entries(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """The entries of an experiment at the scale `small`."""
    defense = deepcopy(entries["defense"])
    steps = SMALL_DEFENSES.get(defense["name"], {})
    if steps:
        defense["params"] = {**defense.get("params", {}), **steps}
    architecture = {**entries["architecture"], "params": {"width": SMALL_WIDTH}}
    dataset = deepcopy(SMALL_DATASETS[entries["dataset"]["name"]])
    return {**deepcopy(dict(entries)), "dataset": dataset, "defense": defense, "architecture": architecture}


def merge_blocks(cells: Iterable[Mapping[str, Entry]]) -> list[dict[str, list[Entry]]]:
    """Matrices that cross to exactly these cells, given by their entries; those that differ in one axis are joined."""
    blocks = [{axis: [dict(entry)] for axis, entry in entries.items()} for entries in cells]
    blocks = _without_twins(blocks)
    for axis in MERGED:
        blocks = _join(blocks, axis)
    return blocks


def _without_twins(blocks: Sequence[dict[str, list[Entry]]]) -> list[dict[str, list[Entry]]]:
    return list({json.dumps(block, sort_keys=True): block for block in blocks}.values())


def _join(blocks: Sequence[dict[str, list[Entry]]], axis: str) -> list[dict[str, list[Entry]]]:
    """The blocks, those that are equal but for one axis as one."""
    joined: dict[str, dict[str, list[Entry]]] = {}
    for block in blocks:
        others = json.dumps({name: entries for name, entries in block.items() if name != axis}, sort_keys=True)
        if others in joined:
            joined[others][axis] += [entry for entry in block[axis] if entry not in joined[others][axis]]
        else:
            joined[others] = {**block, axis: list(block[axis])}
    return list(joined.values())


def write_yaml(content: Mapping[str, Any]) -> str:
    """A benchmark file with entries in flow style; an entry that is only a name is written as the name."""
    plain = {key: _shorten(value) for key, value in content.items()}
    return yaml.safe_dump(plain, sort_keys=False, default_flow_style=None, width=118)


def _shorten(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, list):
        return [_shorten(each) for each in value]
    if not isinstance(value, Mapping):
        return value
    if set(value) == {"name"}:
        return value["name"]
    return {key: _shorten(each) for key, each in value.items()}
