"""The API is complete, documented as one page, and changes only on purpose."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import backdoor_bench_none
from backdoor_bench_none import api
from backdoor_bench_none.contracts.kinds import BASES
from backdoor_bench_none.registry.plugins import API_VERSION, CHANGES

PAGE = (Path(__file__).parents[1] / "docs" / "api.md").read_text(encoding="utf-8")
#: edit this list with the API, and docs/api.md; a name that goes needs a new API_VERSION
NAMES = [
    "API_VERSION",
    "AXES",
    "Activation",
    "Added",
    "AlexNet",
    "Architecture",
    "Attack",
    "AttackTask",
    "Batch",
    "BenchError",
    "Breaks",
    "CIFAR10",
    "Cell",
    "Centralized",
    "Choice",
    "CleanLabelAttack",
    "Combination",
    "Component",
    "Config",
    "ConfigError",
    "Consumer",
    "Context",
    "Count",
    "Counts",
    "Crafter",
    "Dataset",
    "DatasetError",
    "DatasetInfo",
    "DeadlineError",
    "Defense",
    "DefenseResult",
    "DefenseTask",
    "Detection",
    "Evaluation",
    "Event",
    "Executor",
    "ExitCode",
    "FashionMNIST",
    "FeatureTap",
    "FitTask",
    "FoundTriggers",
    "GTSRB",
    "Gradients",
    "Group",
    "History",
    "INFERENCE_BATCH",
    "ImageFolder",
    "ImageSet",
    "Imagenette",
    "Incidental",
    "Job",
    "LabelMode",
    "Layer",
    "Loss",
    "MLP",
    "MNIST",
    "Metric",
    "ModelBuilder",
    "ModelSpec",
    "NamedRecipe",
    "NiN",
    "Npz",
    "OracleTask",
    "Outcome",
    "Pixels",
    "PlacedTiles",
    "Plan",
    "PluginError",
    "PoisonedSamples",
    "Pool",
    "PretrainingTask",
    "Recipe",
    "Record",
    "Registry",
    "ResNet18",
    "STAMP_CHUNK",
    "Sample",
    "SearchTask",
    "Settings",
    "Split",
    "Stage",
    "Stages",
    "StampAttack",
    "Store",
    "StoreError",
    "Tap",
    "Trainer",
    "TrainingData",
    "TrainingError",
    "TrainingTask",
    "Trigger",
    "TriggerAttack",
    "VGG11",
    "VGG16",
    "VictimTask",
    "check_learned",
    "check_rates",
    "choose_amp",
    "choose_device",
    "collect_activations",
    "collect_features",
    "cross_entropy",
    "defense_effectiveness",
    "derive_seed",
    "did_you_mean",
    "draw_calibrated_weights",
    "draw_indices",
    "find_breaks",
    "find_file",
    "find_layers",
    "find_logits_layer",
    "find_logits_layers",
    "hookimpl",
    "inference_batch",
    "iterate_normalized",
    "make_plan",
    "move",
    "own_version",
    "parse_config",
    "parse_params",
    "plan_config",
    "predict_logits",
    "prune_neurons",
    "record_key",
    "record_outputs",
    "reestimate_norms",
    "reinitialize_neurons",
    "run_cli",
    "stamp_in_chunks",
    "triggers",
]


def test_the_names_are_those_of_the_list() -> None:
    assert sorted(api.__all__) == sorted(NAMES)


def test_every_name_is_there() -> None:
    assert [name for name in NAMES if not hasattr(api, name)] == []


def test_every_name_is_documented_once() -> None:
    assert sorted(re.findall(r"^\| `(\w+)` \|", PAGE.partition("## Plugins")[2], re.MULTILINE)) == sorted(NAMES)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    assert not hasattr(api, "Attacks")
    assert not hasattr(backdoor_bench_none, "Attacks")


def test_the_marker_of_hooks_needs_no_torch() -> None:
    code = "import sys; from backdoor_bench_none.api import hookimpl; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_every_base_class_is_part_of_it() -> None:
    assert {base.__name__ for base in BASES.values()} <= set(NAMES)


def test_the_package_forwards_to_it() -> None:
    assert backdoor_bench_none.Defense is api.Defense


def test_the_page_has_the_changes_of_every_version() -> None:
    versions = {int(number) for number in re.findall(r"^### (\d+)$", PAGE, re.MULTILINE)}
    assert versions == set(range(2, API_VERSION + 1))
    assert set(CHANGES) == set(range(1, API_VERSION))
