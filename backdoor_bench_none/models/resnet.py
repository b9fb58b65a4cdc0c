"""ResNet-18 with the stem for small images of the released NONE code, and the ImageNet stem for large ones."""

from __future__ import annotations

import torch.nn as nn

from backdoor_bench_none.contracts.architecture import Architecture, ModelSpec


class ResNet18(Architecture):
    """ResNet-18 of the released NONE code: 3x3 stem of stride 1 without pooling up to 64 px, 11 173 962 parameters.

    Above 64 px it has the ImageNet stem (7x7 of stride 2, max pooling) and is torchvision's network. Every activation
    is a separate module; the released code shares one instance in the whole network.
    """

    paper = "NONE, section 5.1; arXiv:1512.03385"

    def build(self, spec: ModelSpec) -> nn.Module:
        """The network with He-normal convolutions (fan-out) and batch norms at scale 1 and shift 0."""
        from backdoor_bench_none.models.residual import ResidualNetwork  # derives from torch's classes

        widths = (self.scale(64), self.scale(128), self.scale(256), self.scale(512))
        network = ResidualNetwork(spec, widths)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        return network
