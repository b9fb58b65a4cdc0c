"""The built-in architectures, activations, data sets, trainers and executor.

They are registered through the same hooks as those of plugins.
"""

from __future__ import annotations

from collections.abc import Mapping

from backdoor_bench_none.contracts.markers import hookimpl


@hookimpl
def bbn_architectures() -> Mapping[str, str]:
    """The paper's networks (section 5.1), and a multilayer perceptron."""
    return {
        "nin": "backdoor_bench_none.models.nin:NiN",
        "vgg11": "backdoor_bench_none.models.vgg:VGG11",
        "vgg16": "backdoor_bench_none.models.vgg:VGG16",
        "resnet18": "backdoor_bench_none.models.resnet:ResNet18",
        "alexnet": "backdoor_bench_none.models.alexnet:AlexNet",
        "mlp": "backdoor_bench_none.models.mlp:MLP",
    }


@hookimpl
def bbn_activations() -> Mapping[str, str]:
    """The activation functions of Table 7, and three more."""
    module = "backdoor_bench_none.models.activations"
    return {
        "relu": f"{module}:ReLU",
        "leaky_relu": f"{module}:LeakyReLU",
        "elu": f"{module}:ELU",
        "prelu": f"{module}:PReLU",
        "tanhshrink": f"{module}:Tanhshrink",
        "softplus": f"{module}:Softplus",
        "gelu": f"{module}:GELU",
        "silu": f"{module}:SiLU",
    }


@hookimpl
def bbn_datasets() -> Mapping[str, str]:
    """Published data sets, and the user's own files."""
    return {
        "digits": "backdoor_bench_none.data.digits:Digits",
        "mnist": "backdoor_bench_none.data.torchvision_sets:MNIST",
        "fashion_mnist": "backdoor_bench_none.data.torchvision_sets:FashionMNIST",
        "cifar10": "backdoor_bench_none.data.torchvision_sets:CIFAR10",
        "gtsrb": "backdoor_bench_none.data.image_files:GTSRB",
        "imagenette": "backdoor_bench_none.data.image_files:Imagenette",
        "blobs": "backdoor_bench_none.data.blobs:Blobs",
        "image_folder": "backdoor_bench_none.data.user:ImageFolder",
        "npz": "backdoor_bench_none.data.user:Npz",
    }


@hookimpl
def bbn_trainers() -> Mapping[str, str]:
    """Training on all data in one place, on the data of each client, or of the last layer alone."""
    return {
        "centralized": "backdoor_bench_none.trainers.centralized:Centralized",
        "federated": "backdoor_bench_none.trainers.federated:Federated",
        "transfer": "backdoor_bench_none.trainers.transfer:Transfer",
    }


@hookimpl
def bbn_metrics() -> Mapping[str, str]:
    """Measures of the theory behind NONE."""
    return {
        "curvature": "backdoor_bench_none.metrics.curvature:Curvature",
        "linearity": "backdoor_bench_none.metrics.linearity:Linearity",
        "trojan_region": "backdoor_bench_none.metrics.trojan_region:TrojanRegion",
    }


@hookimpl
def bbn_executors() -> Mapping[str, str]:
    """Processes on this machine, and on those of clusters."""
    return {
        "local": "backdoor_bench_none.executors.local:Local",
        "ray": "backdoor_bench_none.executors.ray:Ray",
        "slurm": "backdoor_bench_none.executors.slurm:Slurm",
    }
