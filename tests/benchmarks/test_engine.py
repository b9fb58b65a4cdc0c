"""The training loop against a bare loop in memory, and NONE's inspection against a bare inference pass."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from ratios import measure_ratio
from torch import nn
from torch.nn import functional as F

from backdoor_bench_none.contracts.architecture import ModelSpec
from backdoor_bench_none.contracts.context import Context, choose_amp, choose_device
from backdoor_bench_none.contracts.dataset import DatasetInfo, ImageSet
from backdoor_bench_none.contracts.network import Pixels, move, predict_logits
from backdoor_bench_none.contracts.recipe import Recipe
from backdoor_bench_none.contracts.trainer import FitTask, TrainingData
from backdoor_bench_none.inspection.neurons import collect_activations, find_layers
from backdoor_bench_none.models.resnet import ResNet18
from backdoor_bench_none.trainers.centralized import Centralized

INFO = DatasetInfo("random", (3, 32, 32), 10, 2048, (0.5,) * 3, (0.25,) * 3, crop_padding=4, flip=True)
RECIPE = Recipe(epochs=1, batch_size=128, lr=0.01)
WIDTH = 1.0 if torch.cuda.is_available() else 0.25


@pytest.fixture
def context() -> Context:
    device = choose_device()
    return Context(device, seed=0, amp=choose_amp(device))


@pytest.fixture
def images(context: Context) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (INFO.train_size, *INFO.shape), generator=generator, dtype=torch.uint8)
    return ImageSet(pixels, torch.randint(10, (len(pixels),), generator=generator)).to(context.device)


@pytest.fixture
def model(context: Context) -> nn.Module:
    return move(ResNet18(width=WIDTH).build(ModelSpec(10, 3, 32, nn.ReLU)), context.device)


def synchronize(context: Context) -> None:
    if context.device.type == "cuda":
        torch.cuda.synchronize()


def test_epoch_against_bare_loop(
    benchmark: BenchmarkFixture, context: Context, images: ImageSet, model: nn.Module
) -> None:
    """The bare loop steps through batches that are cropped, flipped, normalised and laid out beforehand."""
    data = TrainingData.of(images, INFO, context.device)
    pixels = data.pixels
    shifts = pixels.draw_shifts(len(images), torch.Generator()).to(context.device)
    ready = [
        (pixels.normalize(pixels.augment(part, shift)), labels)
        for part, shift, labels in zip(*(x.split(128) for x in (images.images, shifts, images.labels)), strict=True)
    ]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True)

    def bare() -> None:
        model.train()
        for batch, labels in ready:
            with context.autocast():
                loss = F.cross_entropy(model(batch), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        synchronize(context)

    def engine() -> None:
        Centralized().fit(FitTask(model, data, RECIPE), context)
        synchronize(context)

    ratio = measure_ratio(engine, bare)
    benchmark.extra_info["engine / bare loop"] = ratio
    benchmark.pedantic(engine, rounds=1)
    assert ratio <= 1.10


def test_inspection_against_inference(
    benchmark: BenchmarkFixture, context: Context, images: ImageSet, model: nn.Module
) -> None:
    """Both in float32, over the same images."""
    single = Context(context.device, seed=0)
    pixels = Pixels.of(INFO, context.device)
    layers = find_layers(model.eval(), pixels.normalize(images.images[:1]))

    def inspect() -> None:
        collect_activations(model, layers, "pre_activation", images.images, pixels, single)
        synchronize(context)

    def infer() -> None:
        predict_logits(model, images.images, pixels, single)
        synchronize(context)

    ratio = measure_ratio(inspect, infer)
    benchmark.extra_info["inspection / inference"] = ratio
    benchmark.pedantic(inspect, rounds=1)
    assert ratio <= 1.3
