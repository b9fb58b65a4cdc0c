"""The benchmark files of the paper's tables and figures, at full size or at one for two CPU cores."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import yaml

from backdoor_bench_none.errors import ConfigError, did_you_mean
from backdoor_bench_none.paper.experiments import (
    FIGURES,
    Entry,
    cells_of_figure,
    experiments_of,
    find_table,
    read_tables,
)

Scale = Literal["full", "small"]
#: files of what is neither a row of a table nor a network on CIFAR-10
FOLDER = Path(__file__).parent / "benchmarks"
#: the axes of a block, in the order in which blocks are merged
MERGED = ("defense", "activation", "architecture", "attack", "dataset")

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


def benchmark_names() -> list[str]:
    """The tables and figures that have a benchmark file."""
    return [*read_tables(), *sorted([*FIGURES, *(path.stem for path in FOLDER.glob("*.yaml"))])]


def benchmark_text(name: str, scale: Scale = "full") -> str:
    """The benchmark file of a table or figure, such as `table4`; `ConfigError` if there is none at this scale.

    At the scale `small` it has 10,000 images and networks of a quarter of the width; of tables only the rows on MNIST
    and CIFAR-10, with three seeds and the column `none_retrain`. Rows that cannot be repeated are left out.
    """
    if name not in benchmark_names():
        raise ConfigError(f"there is no benchmark file '{name}' of the paper", did_you_mean(name, benchmark_names()))
    if name in read_tables():
        return _small_table(name) if scale == "small" else _table(name)
    if name in FIGURES:
        return _figure(name, scale)
    if scale != "full":
        raise ConfigError(f"'{name}' has no scale '{scale}'; tables have, and {', '.join(FIGURES)}")
    return (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


def _figure(name: str, scale: Scale) -> str:
    cells = cells_of_figure(name)
    title = f"# {name} of the paper: {FIGURES[name][0]}"
    if scale == "small":
        body = _write(f"{name}-small", map(_small_entries, cells))
        return f"{title}; `bbn paper {name} --scale small` runs and draws it.\n{body}"
    return f"{title}; `bbn paper {name}` runs and draws it.\n{_write(name, cells)}"


def _table(name: str) -> str:
    experiments = experiments_of(name)
    available = [experiment for experiment in experiments if not experiment.unavailable]
    reasons = list(dict.fromkeys(experiment.unavailable for experiment in experiments if experiment.unavailable))
    if not available:
        raise ConfigError(f"{name} cannot be repeated: {'; '.join(reasons)}")
    caption = find_table(name)["caption"]
    lines = [f"# {name} of the paper: {caption}. {len(available)} of its {len(experiments)} rows."]
    lines += [f"# Left out: {reason}." for reason in reasons]
    return "\n".join([*lines, _write(name, (experiment.entries for experiment in available))])


def _small_table(name: str) -> str:
    experiments = [each for each in experiments_of(name) if each.entries["dataset"]["name"] in SMALL_DATASETS]
    cells = [_small_entries(each.entries) for each in experiments if not each.unavailable]
    if not cells:
        raise ConfigError(f"{name} has no row at the scale small: it has neither MNIST nor CIFAR-10")
    undefended = [cell for cell in cells if cell["defense"]["name"] == "no_defense"]
    cells += [{**cell, "defense": SMALL_EXTRA} for cell in undefended]
    caption = find_table(name)["caption"]
    title = f"# {name} of the paper at a scale for two CPU cores: {caption}."
    return f"{title}\n{_write(f'{name}-small', cells, seeds=SMALL_SEEDS)}"


def _write(name: str, cells: Iterable[Mapping[str, Entry]], **settings: object) -> str:
    """A benchmark file of these cells."""
    matrix, *include = merge_blocks(cells)
    content: dict[str, Any] = {"version": 1, "name": name, **settings, "matrix": matrix}
    if include:
        content["include"] = include
    return write_yaml(content)


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
