"""The gradients of narrow strided 1x1 convolutions on CPUs, where oneDNN's write past their workspace."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from backdoor_bench_none.models.convolution import SAFE_CHANNELS, StridedPointwise

#: prints the largest relative error of the weight gradient, against float64, over channels; a plain convolution aborts,
#: hangs or is wrong by .3 to 1 on AVX2 below 8 channels
CODE = """
import sys, torch
from backdoor_bench_none.models.convolution import StridedPointwise
torch.set_num_threads(int(sys.argv[1]))
torch.manual_seed(0)
worst = 0.0
for channels in (3, 6, 7, 8, 15, 16):
    for batch, side in ((32, 32), (64, 8), (7, 16)):
        layer = StridedPointwise(channels, 13, 2, bias=False).to(memory_format=torch.channels_last)
        images = torch.randn(batch, channels, side, side).contiguous(memory_format=torch.channels_last)
        grad = torch.randn(batch, 13, side // 2, side // 2)
        (exact,) = torch.autograd.grad(layer.double()(images.double()), layer.weight, grad.double())
        layer.float()
        for _ in range(2):
            (got,) = torch.autograd.grad(layer(images), layer.weight, grad)
            worst = max(worst, float((got - exact).abs().max() / exact.abs().max()))
print(worst)
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_weight_gradients_are_exact(threads: int) -> None:
    done = subprocess.run([sys.executable, "-c", CODE, str(threads)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-4  # 9e-7 where it is right


@pytest.mark.parametrize("channels", [1, 5, SAFE_CHANNELS - 1, SAFE_CHANNELS])
@pytest.mark.parametrize(("stride", "side"), [(1, 4), (2, 8), (2, 7), (3, 7)])
def test_it_is_a_convolution(channels: int, stride: int, side: int) -> None:
    layer = StridedPointwise(channels, 3, stride)
    images = torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(0))
    expected = nn.functional.conv2d(images.double(), layer.weight.double(), layer.bias.double(), stride=stride)
    torch.testing.assert_close(layer(images).double(), expected, rtol=1e-5, atol=1e-6)
    assert isinstance(layer, nn.Conv2d)
    assert set(layer.state_dict()) == {"weight", "bias"}
