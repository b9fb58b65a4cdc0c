"""The modules of a residual network."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from backdoor_bench_none.contracts.architecture import ModelSpec
from backdoor_bench_none.models.convolution import StridedPointwise

LARGEST_SMALL_IMAGE = 64


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut: (N, inputs, S, S) to (N, outputs, S / stride, S / stride)."""

    def __init__(self, inputs: int, outputs: int, stride: int, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.act1 = activation()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                StridedPointwise(inputs, outputs, stride, bias=False), nn.BatchNorm2d(outputs)
            )
        self.act2 = activation()

    def forward(self, x: Tensor) -> Tensor:
        """The activated sum of the convolved input and the shortcut."""
        shortcut = self.downsample(x)
        out = self.act1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out = out + shortcut
        activated: Tensor = self.act2(out)
        return activated


class ResidualNetwork(nn.Module):
    """Stem, four stages of two blocks, global average pooling, one linear layer; children as in torchvision."""

    def __init__(self, spec: ModelSpec, widths: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.maxpool: nn.Module = nn.Identity()
        if spec.image_size > LARGEST_SMALL_IMAGE:
            self.conv1 = nn.Conv2d(spec.channels, widths[0], 7, stride=2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        else:
            self.conv1 = nn.Conv2d(spec.channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.act1 = spec.activation()
        self.layer1 = make_stage(widths[0], widths[0], 1, spec.activation)
        self.layer2 = make_stage(widths[0], widths[1], 2, spec.activation)
        self.layer3 = make_stage(widths[1], widths[2], 2, spec.activation)
        self.layer4 = make_stage(widths[2], widths[3], 2, spec.activation)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(widths[3], spec.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, channels, S, S)."""
        x = self.maxpool(self.act1(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(self.flatten(self.avgpool(x)))
        return logits


def make_stage(inputs: int, outputs: int, stride: int, activation: Callable[[], nn.Module]) -> nn.Sequential:
    """Two basic blocks, the first with the stride."""
    return nn.Sequential(BasicBlock(inputs, outputs, stride, activation), BasicBlock(outputs, outputs, 1, activation))
