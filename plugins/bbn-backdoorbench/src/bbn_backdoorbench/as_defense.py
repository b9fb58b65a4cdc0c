"""Runs our defenses like those of BackdoorBench: from its root, on its records, with its flags and its layout."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from backdoor_bench_none.api import BenchError, ConfigError, Registry, choose_device, did_you_mean
from bbn_backdoorbench.cli import benchmark_text, open_stages, plan_cell
from bbn_backdoorbench.export import export_defense
from bbn_backdoorbench.reading import ToolboxRecord, read_record

#: the toolbox's flags -> fields of the training recipe
RECIPE = {
    "epochs": "epochs", "batch_size": "batch_size", "lr": "lr", "wd": "weight_decay", "weight_decay": "weight_decay",
    "sgd_momentum": "momentum", "momentum": "momentum",
}  # fmt: skip
#: the toolbox's flags for one defense -> our parameters
PARAMETERS: Mapping[str, Mapping[str, str]] = {
    "nad": {"te_epochs": "teacher_epochs", "epochs": "epochs", "batch_size": "batch_size", "lr": "lr"},
    "abl": {
        "tuning_epochs": "isolation_epochs", "finetuning_epochs": "tuning_epochs", "gamma": "gamma",
        "unlearning_epochs": "unlearning_epochs", "lr_unlearning_init": "unlearning_lr",
        "isolation_ratio": "isolation_fraction", "gradient_ascent_type": "isolation",
    },
    "ac": {"nb_dims": "dimensions", "cluster_analysis": "rule"},
}  # fmt: skip
#: the toolbox's values that have another name here -> our values
VALUES = {"LGA": "lga", "Flooding": "flooding", "relative-size": "relative_size", "silhouette-scores": "silhouette"}
#: the toolbox's flags that choose what is run
CHOICES = ("result_file", "dataset", "dataset_path", "model", "device", "random_seed", "ratio", "params")
#: the flags among these whose values are names
TEXTS = ("result_file", "dataset", "dataset_path", "model", "device")
#: the betas of NAD
BETAS = ("beta1", "beta2", "beta3")
#: the toolbox's flag for a finished teacher of NAD; its own YAML files have it without a value
TEACHER = "teacher_model_loc"
#: the toolbox's flags without a meaning here
UNUSED = (
    "num_workers", "amp", "pin_memory", "non_blocking", "prefetch", "checkpoint_load", "checkpoint_save", "log",
    "frequency_save", "lr_scheduler", "client_optimizer", "num_classes", "input_height", "input_width",
    "input_channel", "index", "save_path", "data_root", "poison_rate", "target_type", "target_label", "trigger_type",
    "seed", "attack", "p", "steplr_stepsize", "steplr_gamma", "finetuning_ascent_model", "lr_finetuning_init",
    "flooding", "threshold_clean", "threshold_bad", "interval", "nb_clusters",
)  # fmt: skip


def main(defense: str, arguments: Sequence[str] | None = None) -> int:
    """Run `defense` with the arguments of a command line; returns the exit code."""
    if arguments is None:
        arguments = sys.argv[1:]
    try:
        settings = read_settings(defense, arguments)
        target = run_defense(defense, settings)
    except BenchError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint is not None:
            print(f"hint: {error.hint}", file=sys.stderr)
        return int(error.exit_code)
    print(f"wrote {target}")
    return 0


def read_settings(defense: str, arguments: Sequence[str]) -> Mapping[str, Any]:
    """The values of the toolbox's flags; the command line wins over the YAML file."""
    parser = argparse.ArgumentParser(
        prog=f"python -m bbn_backdoorbench.{defense}", allow_abbrev=False,
        description=f"{defense} of backdoor-bench-none on a record of BackdoorBench, from the toolbox's root",
    )  # fmt: skip
    parser.add_argument("--result_file", help="name of the record below record/")
    parser.add_argument("--yaml_path", type=Path, help="file with values for flags; the command line wins")
    parser.add_argument(
        "--param", action="append", default=[], metavar="NAME=VALUE", help=f"parameter of {defense}; may be repeated"
    )
    for word in sorted(_known_words(defense) - {"result_file", "params"}):
        text = argparse.SUPPRESS if word in UNUSED else None
        parser.add_argument(f"--{word}", help=text)
    flags = vars(parser.parse_args(arguments))
    path, params = flags.pop("yaml_path"), flags.pop("param")
    settings: dict[str, Any] = {}
    if path is not None:
        settings |= {word: value for word, value in _read_yaml(path, defense).items() if value is not None}
    settings |= {word: _read_value(word, text) for word, text in flags.items() if text is not None}
    if not isinstance(ours := settings.get("params", {}), dict):
        raise ConfigError(f"'{path}': params is not a mapping")
    settings["params"] = {**ours, **_parse(params)}
    if TEACHER in settings:
        raise ConfigError(f"{TEACHER}: our nad trains its teacher", "leave it without a value; te_epochs says how long")
    if "result_file" not in settings:
        raise ConfigError("--result_file is missing", "name a record below record/")
    if unused := sorted(set(settings) & set(UNUSED)):
        print(f"not used here: {', '.join(unused)}", file=sys.stderr)
    return settings


def _read_value(word: str, text: str) -> Any:  # noqa: ANN401
    """The value of a flag; a name stays as it is, also one like 0123."""
    if word in TEXTS:
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--{word} {text} is not a value") from error


def _known_words(defense: str) -> set[str]:
    words = {*CHOICES, *RECIPE, *PARAMETERS.get(defense, ()), *UNUSED}
    if defense == "nad":
        words.update((*BETAS, TEACHER))
    return words


def _read_yaml(path: Path, defense: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"'{path}' cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"'{path}' is not a mapping")
    known = _known_words(defense)
    for word in values:
        if word not in known:
            raise ConfigError(f"'{path}': unknown key '{word}'", did_you_mean(str(word), known))
    return values


def _parse(pairs: Sequence[str]) -> dict[str, Any]:
    from backdoor_bench_none.api import parse_params

    return parse_params(tuple(pairs))


def run_defense(defense: str, settings: Mapping[str, Any]) -> Path:
    """Run the defense on the record, and write the result into it; returns the result's folder."""
    folder = Path("record") / str(settings["result_file"])
    record = read_record(folder)
    for word, own in (("model", record.model_name), ("dataset", record.dataset)):
        if settings.get(word, own) != own:
            raise ConfigError(f"--{word} {settings[word]}: the record is of {own}")
    data = Path(str(settings.get("dataset_path", "./data"))) / record.dataset
    cell = plan_cell(_benchmark(defense, settings, record, folder, data), Registry.default())
    stages = open_stages(
        cell, folder / "defense" / f".bbn-{defense}", choose_device(str(settings.get("device", "auto")))
    )
    measured = stages.evaluate()
    stages.store.write_record(measured)
    assert measured.counts is not None
    for name, count in (
        ("test_acc", measured.counts.benign_accuracy), ("test_asr", measured.counts.attack_success_rate),
        ("test_ra", measured.counts.robust_accuracy),
    ):  # fmt: skip
        if count is None:
            print(f"{name} -")
        else:
            print(f"{name} {count.rate:.6f} = {count.hits} of {count.total}")
    return export_defense(cell, stages, measured.counts, folder)


def _benchmark(defense: str, settings: Mapping[str, Any], record: ToolboxRecord, folder: Path, data: Path) -> str:
    """The text of a benchmark file with the one cell."""
    npz = data.with_suffix(".npz")
    root, arrays = (None, npz) if npz.is_file() else (data, None)
    values = yaml.safe_load(benchmark_text(record, folder, root, arrays))
    values["matrix"]["defense"] = [{"name": defense, "params": as_parameters(defense, settings)}]
    own = PARAMETERS.get(defense, {})
    recipe = {field: settings[word] for word, field in RECIPE.items() if word in settings and word not in own}
    values["matrix"]["dataset"][0]["recipe"] = recipe
    values["seeds"] = [settings.get("random_seed", 0)]
    result: str = yaml.safe_dump(values, sort_keys=False)
    return result


def as_parameters(defense: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Our parameters, from the toolbox's flags and from `--param`, which wins."""
    own = PARAMETERS.get(defense, {})
    params = {field: VALUES.get(str(settings[word]), settings[word]) for word, field in own.items() if word in settings}
    if "ratio" in settings:
        params["clean_fraction"] = settings["ratio"]
    if any(beta in settings for beta in BETAS):
        params["betas"] = [settings.get(beta, default) for beta, default in zip(BETAS, (500, 1000, 1000), strict=True)]
    return {**params, **settings["params"]}
