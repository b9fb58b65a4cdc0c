"""What the metrics of the theory cost."""

from __future__ import annotations

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from ratios import measure_ratio
from torch import nn
from torch.nn import functional as F

from backdoor_bench_none.contracts.architecture import ModelSpec
from backdoor_bench_none.contracts.context import choose_device
from backdoor_bench_none.inspection.curvature import input_curvature
from backdoor_bench_none.models.resnet import ResNet18

DEVICE = choose_device()
STEPS = 12


def test_curvature_against_gradients(benchmark: BenchmarkFixture) -> None:
    """100 images, 12 Hessian-vector products, against one gradient over the weights; and the time for 500 images."""
    model = ResNet18(width=0.25).build(ModelSpec(10, 3, 32, nn.ReLU)).to(DEVICE).eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(100, 3, 32, 32, generator=generator).to(DEVICE)
    labels = torch.randint(10, (100,), generator=generator).to(DEVICE)

    def gradient() -> None:
        model.zero_grad()
        F.cross_entropy(model(images), labels).backward()

    def curvature() -> None:
        input_curvature(model, images, labels, 3, STEPS, seed=0).sum().item()

    ratio = measure_ratio(curvature, gradient, rounds=3)
    benchmark.extra_info["curvature / gradients, a step"] = ratio / STEPS
    benchmark.pedantic(curvature, rounds=1)
    benchmark.extra_info["seconds for 500 images"] = 5 * benchmark.stats.stats.median
    assert ratio / STEPS <= 4
