"""The numbers of the paper's tables beside those of a results folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from backdoor_bench_none.errors import ConfigError, did_you_mean
from backdoor_bench_none.report.comparison import Table
from backdoor_bench_none.results.metrics import METRICS
from backdoor_bench_none.results.rows import Row

TABLES = Path(__file__).parents[1] / "paper" / "tables.json"
#: the paper's names -> registered names
DATASETS = {
    "MNIST": "mnist",
    "CIFAR-10": "cifar10",
    "GTSRB": "gtsrb",
    "ImageNet-10": "imagenette",
    "ImageNet-pair": "image_folder",
}
DEFENSES = {"undefended": "no_defense", "dp-sgd": "dp_sgd", "dp-sgd-1": "dp_sgd", "dp-sgd-2": "dp_sgd"}
ATTACKS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "badnets": ("badnets", {"label_mode": "all_to_one"}),
    "badnets-all-to-all": ("badnets", {"label_mode": "all_to_all"}),
    "label-consistent": ("label_consistent", {}),
    "hidden-trigger": ("hidden_trigger", {}),
}
TRIGGERS = {"Dynamic Patch": "dynamic", "Static Patch": "static", "Watermark": "watermark"}
ACTIVATIONS = {"LeakyReLU": "leaky_relu"}
#: what a table varies -> axis and parameter
VARIED = {
    "trigger_size": ("attack", "size"), "trigger": ("attack", "trigger_kind"), "poison_rate": ("attack", "poison_rate"),
    "alpha": ("attack", "alpha"), "selection_threshold": ("defense", "r2"), "lambda_h": ("defense", "lambda_h"),
    "lambda_l": ("defense", "lambda_l"),
}  # fmt: skip
#: clip and noise of the two DP-SGD rows of Table 2
DP = {"dp-sgd-1": {"clip": 4.0, "noise": 0.1}, "dp-sgd-2": {"clip": 1.0, "noise": 0.5}}


def read_tables() -> Mapping[str, Any]:
    """All tables of the paper: caption and rows; every rate is a fraction of 1."""
    tables: Mapping[str, Any] = json.loads(TABLES.read_text(encoding="utf-8"))["tables"]
    return tables


def compare_with_paper(rows: Sequence[Row], name: str) -> Table:
    """Each row of a table of the paper beside the row here with the same components; a dash where there is none."""
    tables = read_tables()
    if name not in tables:
        raise ConfigError(f"the paper has no table '{name}' of rates", did_you_mean(name, tables))
    theirs = tables[name]["rows"]
    described = [key for key in theirs[0] if key not in ("ba", "asr")]
    lines, matched = [], 0
    for row in theirs:
        ours = next((mine for mine in rows if mine.ba is not None and matches(mine, row)), None)
        if ours is not None:
            matched += 1
        lines.append([*(str(row[key]) for key in described), *_numbers(row, ours)])
    cells = f"{matched} of {len(lines)} rows of the paper have cells here"
    header = [*described, "paper BA / ASR", "ours BA / ASR", "difference", "seeds"]
    notes = [
        f"{cells} with its data set, attack, defense and parameters",
        "Percent; differences in percentage points. Recipes, seeds and the pixels of triggers may differ",
    ]
    return Table(f"{name}: {tables[name]['caption']}", header, lines, notes)


def matches(ours: Row, theirs: Mapping[str, Any]) -> bool:
    """Whether a row has the components that a row of the paper names."""
    wanted_attack, params = ATTACKS.get(theirs["attack"], (theirs["attack"], {}))
    wanted: dict[str, tuple[str, dict[str, Any]]] = {
        "attack": (wanted_attack, dict(params)),
        "dataset": (DATASETS.get(theirs["dataset"], theirs["dataset"]), {}),
        "defense": (DEFENSES.get(theirs["defense"], theirs["defense"]), dict(DP.get(theirs["defense"], {}))),
    }
    if "network" in theirs:
        wanted["architecture"] = (theirs["network"].lower(), {"width": 1.0})
    wanted["activation"] = (ACTIVATIONS.get(theirs.get("activation", ""), theirs.get("activation", "ReLU").lower()), {})
    for key, (axis, parameter) in VARIED.items():
        if key in theirs and (axis == "attack" or theirs["defense"] != "undefended"):
            wanted[axis][1][parameter] = _value(key, theirs[key])
    return all(_is(ours.components.get(axis, {}), *choice) for axis, choice in wanted.items())


def _value(key: str, written: Any) -> Any:  # noqa: ANN401
    """A value of the paper as a parameter here: shares for percents, and 0 for the paper's single neuron."""
    if key == "trigger":
        return TRIGGERS[written]
    if key != "selection_threshold":
        return written
    if str(written) == "1":
        return 0.0
    return float(str(written).removesuffix("%")) / 100


def _is(component: Mapping[str, Any], name: str, params: Mapping[str, Any]) -> bool:
    return component.get("name") == name and all(
        parameter not in component["params"] or component["params"][parameter] == value
        for parameter, value in params.items()
    )


def _numbers(theirs: Mapping[str, Any], ours: Row | None) -> list[str]:
    """BA and ASR in the paper, here, and their differences; the number of seeds."""
    paper = " / ".join(METRICS[name].show(theirs.get(name)) for name in ("ba", "asr"))
    if ours is None:
        return [paper, "–", "", ""]
    mine = " / ".join(METRICS[name].show(getattr(ours, name)) for name in ("ba", "asr"))
    differences = " / ".join(_difference(theirs.get(name), getattr(ours, name)) for name in ("ba", "asr"))
    return [paper, mine, differences, str(len(ours.seeds))]


def _difference(paper: float | None, ours: float | None) -> str:
    if paper is None or ours is None:
        return "–"
    return f"{100 * (ours - paper):+.1f}"
