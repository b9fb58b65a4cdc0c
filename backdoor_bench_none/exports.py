"""What `backdoor_bench_none.api` offers, and from where; it reads this file and imports each name on first use."""

from __future__ import annotations

from backdoor_bench_none.cli.main import run_cli
from backdoor_bench_none.contracts import trigger as triggers
from backdoor_bench_none.contracts.architecture import Activation, Architecture, ModelSpec
from backdoor_bench_none.contracts.attack import (
    STAMP_CHUNK,
    Attack,
    AttackTask,
    CleanLabelAttack,
    Crafter,
    FoundTriggers,
    LabelMode,
    PoisonedSamples,
    SearchTask,
    StampAttack,
    TriggerAttack,
    VictimTask,
    check_rates,
    draw_indices,
    stamp_in_chunks,
)
from backdoor_bench_none.contracts.builder import ModelBuilder
from backdoor_bench_none.contracts.cell import AXES, Cell
from backdoor_bench_none.contracts.component import Added, Choice, Combination, Component, Incidental
from backdoor_bench_none.contracts.config import Config
from backdoor_bench_none.contracts.context import Context, choose_amp, choose_device
from backdoor_bench_none.contracts.dataset import Dataset, DatasetInfo, ImageSet
from backdoor_bench_none.contracts.defense import Defense, DefenseResult, DefenseTask, OracleTask, Stage
from backdoor_bench_none.contracts.executor import Event, Executor, Group, Pool
from backdoor_bench_none.contracts.job import Job, Outcome, Settings
from backdoor_bench_none.contracts.markers import hookimpl
from backdoor_bench_none.contracts.measures import Count, Counts, Detection, defense_effectiveness
from backdoor_bench_none.contracts.metric import Evaluation, Metric
from backdoor_bench_none.contracts.network import (
    INFERENCE_BATCH,
    Pixels,
    find_logits_layer,
    find_logits_layers,
    inference_batch,
    iterate_normalized,
    move,
    predict_logits,
)
from backdoor_bench_none.contracts.recipe import NamedRecipe, Recipe
from backdoor_bench_none.contracts.record import Record
from backdoor_bench_none.contracts.task import TrainingTask
from backdoor_bench_none.contracts.trainer import (
    Batch,
    FitTask,
    Gradients,
    History,
    Loss,
    PretrainingTask,
    Trainer,
    TrainingData,
    check_learned,
    cross_entropy,
)
from backdoor_bench_none.contracts.trigger import PlacedTiles, Trigger
from backdoor_bench_none.data.image_files import GTSRB, Imagenette, Sample
from backdoor_bench_none.data.torchvision_sets import CIFAR10, MNIST, FashionMNIST
from backdoor_bench_none.data.user import ImageFolder, Npz
from backdoor_bench_none.errors import (
    BenchError,
    ConfigError,
    DatasetError,
    DeadlineError,
    ExitCode,
    PluginError,
    StoreError,
    TrainingError,
    did_you_mean,
)
from backdoor_bench_none.inspection.features import FeatureTap, collect_features
from backdoor_bench_none.inspection.hooks import record_outputs
from backdoor_bench_none.inspection.layers import Consumer, Layer, Tap
from backdoor_bench_none.inspection.neurons import (
    collect_activations,
    find_layers,
    prune_neurons,
    reestimate_norms,
    reinitialize_neurons,
)
from backdoor_bench_none.maths.natural_break import Breaks, Split, find_breaks
from backdoor_bench_none.models.alexnet import AlexNet
from backdoor_bench_none.models.initial_weights import draw_calibrated_weights
from backdoor_bench_none.models.mlp import MLP
from backdoor_bench_none.models.nin import NiN
from backdoor_bench_none.models.resnet import ResNet18
from backdoor_bench_none.models.vgg import VGG11, VGG16
from backdoor_bench_none.planning.plan import Plan, make_plan, plan_config
from backdoor_bench_none.planning.reading import find_file, parse_config, parse_params
from backdoor_bench_none.planning.stage_table import record_key
from backdoor_bench_none.registry.components import Registry
from backdoor_bench_none.registry.plugins import API_VERSION, own_version
from backdoor_bench_none.results.store import Store
from backdoor_bench_none.run.stages import Stages
from backdoor_bench_none.seeds import derive_seed
from backdoor_bench_none.trainers.centralized import Centralized

__all__ = [
    "API_VERSION",
    "AXES",
    "CIFAR10",
    "GTSRB",
    "INFERENCE_BATCH",
    "MLP",
    "MNIST",
    "STAMP_CHUNK",
    "VGG11",
    "VGG16",
    "Activation",
    "Added",
    "AlexNet",
    "Architecture",
    "Attack",
    "AttackTask",
    "Batch",
    "BenchError",
    "Breaks",
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
    "Gradients",
    "Group",
    "History",
    "ImageFolder",
    "ImageSet",
    "Imagenette",
    "Incidental",
    "Job",
    "LabelMode",
    "Layer",
    "Loss",
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
