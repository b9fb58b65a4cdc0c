"""A strided 1x1 convolution whose weight gradients are right on CPUs too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.nn as nn

if TYPE_CHECKING:
    from torch import Tensor

#: input channels from which on oneDNN's workspace suffices: its widest block (AVX-512; on AVX2 it is 8)
SAFE_CHANNELS = 16


class StridedPointwise(nn.Conv2d):
    """A 1x1 convolution of stride > 1 without padding: (N, inputs, S, S) to (N, outputs, ceil(S / stride), ...).

    With fewer input channels than a SIMD block, channels last, oneDNN's gradient of such weights writes past its
    workspace (https://github.com/uxlfoundation/oneDNN/issues/6035): a wrong gradient, a hang or an abort. A narrow one
    therefore convolves the pixels that the stride leaves, which is the same function.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, **options: Any) -> None:
        super().__init__(inputs, outputs, 1, stride=stride, **options)

    def forward(self, input: Tensor) -> Tensor:
        """The convolved images."""
        if self.in_channels >= SAFE_CHANNELS:
            return super().forward(input)
        rows, columns = self.stride
        # dilating a 1x1 kernel does nothing, but torch sends it to oneDNN at every batch size, as a strided one
        return nn.functional.conv2d(input[:, :, ::rows, ::columns], self.weight, self.bias, dilation=2)
