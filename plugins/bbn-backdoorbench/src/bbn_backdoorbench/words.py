"""The names of BackdoorBench: its data sets, networks, scripts and record layout, as of its commit f02e353."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

#: the environment variable that names the user's checkout
HOME = "BBN_BACKDOORBENCH_HOME"
ATTACK_RESULT = "attack_result.pt"
DEFENSE_RESULT = "defense_result.pt"
PLUG_LAYER = "plug_layer.pt"
INFO = "info.pickle"
#: our own key in info.pickle: the number of changed training samples without a trigger
DECOYS = "bbn_decoys"
#: the keys of attack_result.pt
RECORD_KEYS = ("model_name", "num_classes", "model", "data_path", "img_size", "clean_data", "bd_train", "bd_test")


@dataclass(frozen=True)
class DatasetFacts:
    """How the toolbox normalises a data set, on the 0..1 scale; `component` is the class that reads it here."""

    component: str
    num_classes: int
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    flip: bool = False


DATASETS: Mapping[str, DatasetFacts] = {
    "cifar10": DatasetFacts("CIFAR10", 10, 32, (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261), flip=True),
    "cifar100": DatasetFacts("CIFAR100", 100, 32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "gtsrb": DatasetFacts("GTSRB", 43, 32, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
#: the toolbox's networks -> the class here; all but the first are torchvision's, with stems for ImageNet
MODELS: Mapping[str, str] = {
    "preactresnet18": "PreActResNet18",
    "resnet18": "ResNet18",
    "resnet34": "ResNet34",
    "resnet50": "ResNet50",
    "alexnet": "AlexNet",
    "vgg11": "VGG11",
    "vgg16": "VGG16",
    "vgg19": "VGG19",
    "vgg19_bn": "VGG19BN",
    "squeezenet1_0": "SqueezeNet10",
    "densenet121": "DenseNet121",
    "densenet161": "DenseNet161",
    "shufflenet_v2_x1_0": "ShuffleNetV2",
    "mobilenet_v2": "MobileNetV2",
    "mobilenet_v3_large": "MobileNetV3Large",
    "resnext50_32x4d": "ResNeXt50",
    "wide_resnet50_2": "WideResNet50",
    "mnasnet1_0": "MNASNet",
    "efficientnet_b0": "EfficientNetB0",
    "efficientnet_b3": "EfficientNetB3",
    "convnext_tiny": "ConvNeXtTiny",
}
#: the scripts in `defense/` whose result is a network of the record's architecture -> the class here
SCRIPTS: Mapping[str, str] = {
    "abl": "ABL", "ac": "AC", "anp": "ANP", "bnp": "BNP", "clp": "CLP", "ep": "EP", "fp": "FP", "ft": "FT",
    "ft-sam": "FTSAM", "i-bau": "IBAU", "mcr": "MCR", "nad": "NAD", "nc": "NC", "npd": "NPD", "rnp": "RNP",
    "sau": "SAU", "spectral": "Spectral",
}  # fmt: skip
#: the networks that the toolbox's README names, but for vit_b_16, which is not offered here
ADVERTISED = (
    "preactresnet18", "vgg19", "vgg19_bn", "densenet161", "mobilenet_v3_large", "efficientnet_b3", "convnext_tiny",
)  # fmt: skip
#: those for which it has a version with masks or noise on the norms
WITH_OWN_NORMS = tuple(name for name in ADVERTISED if name != "vgg19")
#: scripts with code for some networks only -> these networks
NETWORKS: Mapping[str, tuple[str, ...]] = {
    "ac": (*ADVERTISED, "resnet18"), "nad": (*ADVERTISED, "resnet18"), "spectral": (*ADVERTISED, "resnet18"),
    "anp": WITH_OWN_NORMS, "bnp": WITH_OWN_NORMS, "ep": WITH_OWN_NORMS,
    "rnp": ("preactresnet18", "vgg19", "vgg19_bn"), "npd": ("preactresnet18",),
}  # fmt: skip
#: attacks that control training: their training sets are made afterwards, and mark samples without a trigger too
TRAINING_CONTROLLED = frozenset({"wanet", "inputaware", "bpp", "blind", "lira"})
