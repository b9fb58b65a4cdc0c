"""The toolbox's networks: those of torchvision with stems for ImageNet, and its pre-activation ResNet-18."""

from __future__ import annotations

from typing import ClassVar

import torchvision
from pydantic import Field
from torch import Tensor, nn

from backdoor_bench_none.api import Architecture, Combination, ModelSpec


class ToolboxNetwork(Architecture):
    """Base of the toolbox's networks.

    They have fixed activation functions, so the cell's must be relu, and they take colour images.
    """

    #: the toolbox's name
    model_name: ClassVar[str]

    width: float = Field(1.0, ge=1, le=1, description="the toolbox has only one width")

    def skip(self, cell: Combination) -> str | None:
        """The reason why a cell does not fit: the network has fixed activation functions and three input channels."""
        if cell.activation.name != "relu":
            return f"{self.model_name} of BackdoorBench has its own activation functions: use relu"
        if cell.info.shape[0] != 3:
            return f"{self.model_name} of BackdoorBench takes colour images"
        return None

    def build(self, spec: ModelSpec) -> nn.Module:
        """torchvision's network, freshly initialised."""
        network: nn.Module = torchvision.models.get_model(self.model_name, weights=None, num_classes=spec.num_classes)
        return network


class PreActBlock(nn.Module):
    """Batch norm and activation before each of two convolutions: (N, inputs, S, S) to (N, outputs, S / stride, ...)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.act1 = nn.BatchNorm2d(inputs), nn.ReLU()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn2, self.act2 = nn.BatchNorm2d(outputs), nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """The convolved input plus the shortcut, which starts after the first activation where it is a convolution."""
        active = self.act1(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(active)
        out: Tensor = self.conv2(self.act2(self.bn2(self.conv1(active)))) + shortcut
        return out


class PreActNetwork(nn.Module):
    """3x3 stem, four stages of two blocks, average pooling without a norm or activation before it, one linear layer."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.layer1 = nn.Sequential(PreActBlock(64, 64, 1), PreActBlock(64, 64, 1))
        self.layer2 = nn.Sequential(PreActBlock(64, 128, 2), PreActBlock(128, 128, 1))
        self.layer3 = nn.Sequential(PreActBlock(128, 256, 2), PreActBlock(256, 256, 1))
        self.layer4 = nn.Sequential(PreActBlock(256, 512, 2), PreActBlock(512, 512, 1))
        self.avgpool, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.linear = nn.Linear(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, 3, S, S)."""
        features = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        logits: Tensor = self.linear(self.flatten(self.avgpool(features)))
        return logits


class PreActResNet18(ToolboxNetwork):
    """The toolbox's default: pre-activation ResNet-18 for small images, without a final norm and activation."""

    paper = "arXiv:1603.05027"
    model_name = "preactresnet18"

    def build(self, spec: ModelSpec) -> nn.Module:
        """The network with torch's default initialisation."""
        return PreActNetwork(spec.num_classes)


class ResNet18(ToolboxNetwork):
    """torchvision's resnet18, with its stem for ImageNet."""

    model_name = "resnet18"


class ResNet34(ToolboxNetwork):
    """torchvision's resnet34, with its stem for ImageNet."""

    model_name = "resnet34"


class ResNet50(ToolboxNetwork):
    """torchvision's resnet50, with its stem for ImageNet."""

    model_name = "resnet50"


class AlexNet(ToolboxNetwork):
    """torchvision's alexnet, with its stem for ImageNet."""

    model_name = "alexnet"


class VGG11(ToolboxNetwork):
    """torchvision's vgg11, with its stem for ImageNet."""

    model_name = "vgg11"


class VGG16(ToolboxNetwork):
    """torchvision's vgg16, with its stem for ImageNet."""

    model_name = "vgg16"


class VGG19(ToolboxNetwork):
    """torchvision's vgg19, with its stem for ImageNet."""

    model_name = "vgg19"


class VGG19BN(ToolboxNetwork):
    """torchvision's vgg19_bn, with its stem for ImageNet."""

    model_name = "vgg19_bn"


class SqueezeNet10(ToolboxNetwork):
    """torchvision's squeezenet1_0, with its stem for ImageNet."""

    model_name = "squeezenet1_0"


class DenseNet121(ToolboxNetwork):
    """torchvision's densenet121, with its stem for ImageNet."""

    model_name = "densenet121"


class DenseNet161(ToolboxNetwork):
    """torchvision's densenet161, with its stem for ImageNet."""

    model_name = "densenet161"


class ShuffleNetV2(ToolboxNetwork):
    """torchvision's shufflenet_v2_x1_0, with its stem for ImageNet."""

    model_name = "shufflenet_v2_x1_0"


class MobileNetV2(ToolboxNetwork):
    """torchvision's mobilenet_v2, with its stem for ImageNet."""

    model_name = "mobilenet_v2"


class MobileNetV3Large(ToolboxNetwork):
    """torchvision's mobilenet_v3_large, with its stem for ImageNet."""

    model_name = "mobilenet_v3_large"


class ResNeXt50(ToolboxNetwork):
    """torchvision's resnext50_32x4d, with its stem for ImageNet."""

    model_name = "resnext50_32x4d"


class WideResNet50(ToolboxNetwork):
    """torchvision's wide_resnet50_2, with its stem for ImageNet."""

    model_name = "wide_resnet50_2"


class MNASNet(ToolboxNetwork):
    """torchvision's mnasnet1_0, with its stem for ImageNet."""

    model_name = "mnasnet1_0"


class EfficientNetB0(ToolboxNetwork):
    """torchvision's efficientnet_b0, with its stem for ImageNet."""

    model_name = "efficientnet_b0"


class EfficientNetB3(ToolboxNetwork):
    """torchvision's efficientnet_b3, with its stem for ImageNet."""

    model_name = "efficientnet_b3"


class ConvNeXtTiny(ToolboxNetwork):
    """torchvision's convnext_tiny, with its stem for ImageNet."""

    model_name = "convnext_tiny"
