"""How many images a forward pass takes, and that norms are measured anew without asking the device how often."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from backdoor_bench_none.api import Context, DatasetInfo, Pixels, inference_batch, iterate_normalized, reestimate_norms
from backdoor_bench_none.contracts import network
from backdoor_bench_none.testing.pretend_cuda import pretend_cuda

INFO = DatasetInfo("noise", (1, 4, 4), 2, 11, (0.0,), (1.0,))


@pytest.mark.parametrize(("side", "count"), [(8, 512), (28, 512), (32, 512), (64, 128), (96, 56), (128, 32), (224, 32)])
def test_large_images_make_small_batches(side: int, count: int) -> None:
    assert inference_batch(torch.empty(0, 3, side, side)) == count


def test_images_are_prepared_in_batches_of_that_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "inference_batch", lambda images: 4)
    images = torch.zeros(11, *INFO.shape, dtype=torch.uint8)
    pixels = Pixels.of(INFO, torch.device("cpu"))
    assert [len(batch) for batch in iterate_normalized(images, pixels)] == [4, 4, 3]


class Twice(nn.Module):
    """A network that uses one norm twice."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(2 * self.norm(images) + 1)


def reestimated(device: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (11, *INFO.shape), generator=generator, dtype=torch.uint8)
    model, place = Twice().to(device), torch.device(device)
    pixels = Pixels.of(INFO, place)
    reestimate_norms(model, {"norm": torch.tensor([0], device=place)}, images, pixels, Context(place, 0))
    assert model.norm.momentum == 0.1
    assert not model.norm._forward_pre_hooks
    return {name: buffer.cpu() for name, buffer in model.named_buffers()}


def test_reestimated_statistics_are_plain_means_over_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "inference_batch", lambda images: 3)
    model, pixels = Twice(), Pixels.of(INFO, torch.device("cpu"))
    model.norm.momentum = None
    images = torch.randint(256, (11, *INFO.shape), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with torch.no_grad():
        for batch in iterate_normalized(images, pixels):
            model(batch)
    measured = reestimated("cpu")
    assert model.norm.running_mean is not None
    assert model.norm.running_var is not None
    assert torch.equal(measured["norm.running_mean"], model.norm.running_mean)
    assert torch.equal(measured["norm.running_var"], model.norm.running_var)
    assert measured["norm.num_batches_tracked"] == 0


@pytest.mark.parametrize("size", [2, 6])
def test_reestimating_does_not_wait_for_the_device(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "inference_batch", lambda images: size)
    with pretend_cuda(roots=["inspection/neurons.py", "torch/nn/modules/batchnorm.py"]) as gpu:
        reestimated("cuda")
        assert gpu.waits_in("batchnorm.py") == {}
        assert gpu.waits_in("neurons.py") == {}
