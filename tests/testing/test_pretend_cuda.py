"""The pretended GPU refuses what CUDA refuses, allows what it allows, and counts what makes the host wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn import functional as F

from backdoor_bench_none.testing.pretend_cuda import pretend_cuda
from backdoor_bench_none.testing.pretended_device import Sightings, holds


@pytest.fixture
def gpu() -> Iterator[Sightings]:
    with pretend_cuda() as seen:
        yield seen


def on_cuda(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda")


def assign_by_index() -> None:
    on_cuda(4, 3)[torch.tensor([0, 1])] = torch.ones(2, 3)


REFUSED: dict[str, Callable[[], object]] = {
    "a sum of both devices": lambda: on_cuda(4, 3) + torch.ones(4, 3),
    "cat": lambda: torch.cat([on_cuda(4, 3), torch.ones(4, 3)]),
    "cat with a number": lambda: torch.stack([on_cuda(1)[0], torch.tensor(1.0)]),
    "numpy": lambda: on_cuda(4).numpy(),
    "an array": lambda: np.asarray(on_cuda(4)),
    "a CUDA index of a CPU tensor": lambda: torch.ones(4)[torch.tensor([0], device="cuda")],
    "a CUDA mask of a CPU tensor": lambda: torch.ones(4)[on_cuda(4) > 0],
    "index_put of a CPU tensor": assign_by_index,
    "a CPU generator on CUDA": lambda: torch.rand(3, device="cuda", generator=torch.Generator()),
    "a CUDA generator on the CPU": lambda: torch.rand(3, generator=torch.Generator("cuda")),
    "a layer on the CPU": lambda: nn.Linear(3, 2)(on_cuda(4, 3)),
    "equal": lambda: torch.equal(on_cuda(4, 3), torch.ones(4, 3)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cuda_refuses_is_refused(gpu: Sightings, what: str) -> None:
    with pytest.raises((RuntimeError, TypeError)):
        REFUSED[what]()
    assert len(gpu.mixed) == 1
    assert "test_pretend_cuda.py" in gpu.mixed[0]


def test_what_is_not_strict_notes_a_mix_and_goes_on() -> None:
    with pretend_cuda(strict=False) as gpu:
        total = on_cuda(3) + torch.ones(3)
        assert total.is_cuda
    assert len(gpu.mixed) == 1


def test_what_cuda_allows_is_allowed(gpu: Sightings) -> None:
    x, host = on_cuda(4, 3), torch.ones(4, 3)
    assert (x + torch.tensor(1.0)).is_cuda
    assert x[torch.tensor([0])].is_cuda
    assert x[1:].device == torch.device("cuda:0")
    assert torch.zeros_like(x).is_cuda
    x[:2] = host[:2]
    x.copy_(host)
    assert not x.cpu().is_cuda
    assert not host.is_cuda
    assert gpu.mixed == []


def test_a_copy_on_the_cpu_is_another_tensor(gpu: Sightings) -> None:
    x = on_cuda(4)
    host = x.cpu()
    host.zero_()
    assert x.any()
    assert not holds(host)


READS: dict[str, Callable[[Tensor], object]] = {
    "bool()": lambda x: bool(x.any()),
    "item": lambda x: x.sum().item(),
    "float()": lambda x: float(x.sum()),
    "int()": lambda x: int(x.sum()),
    "tolist": lambda x: x.tolist(),
    "boolean mask": lambda x: x[x > 0],
    "nonzero": lambda x: torch.nonzero(x),
    "unique": lambda x: torch.unique(x),
    "bincount": lambda x: torch.zeros_like(x).long().bincount(),
    "copy to the host": lambda x: x.cpu(),
    "synchronize": lambda x: torch.cuda.synchronize(),
    "repeat_interleave": lambda x: x.repeat_interleave(torch.ones_like(x).long()),
}


@pytest.mark.parametrize("kind", READS)
def test_a_read_is_counted_once_by_its_line(gpu: Sightings, kind: str) -> None:
    x = on_cuda(4)
    gpu.lap()
    READS[kind](x)
    (site,) = gpu.lap()[0].items()
    assert site[1] == 1
    assert site[0][0] == kind
    assert site[0][1].startswith("testing/test_pretend_cuda.py:")


def test_what_stays_on_the_device_is_no_wait(gpu: Sightings) -> None:
    x = on_cuda(4)
    x[x > 0] = 0.0
    torch.where(x > 0, x, -x).sum().clamp(min=1).to(torch.float64)
    assert not gpu.waits
    assert not gpu.copies


def test_copies_from_the_host_are_counted(gpu: Sightings) -> None:
    torch.ones(3).to("cuda")
    torch.tensor([1.0], device="cuda")
    assert sum(gpu.copies.values()) == 2


def test_only_lines_of_the_roots_are_named() -> None:
    with pretend_cuda(roots=["no/such/folder/"]) as gpu:
        on_cuda(3).tolist()
    assert list(gpu.waits) == [("tolist", "elsewhere")]
    assert gpu.waits_in("test_pretend") == {}


def test_the_generator_of_the_device_is_put_back_only_on_demand(gpu: Sightings) -> None:
    x, before = on_cuda(8), torch.cuda.get_rng_state()
    with torch.random.fork_rng(devices=[torch.device("cuda")]):
        torch.manual_seed(1)
        F.dropout(x)
    assert torch.equal(before, torch.cuda.get_rng_state())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
    assert not torch.equal(before, torch.cuda.get_rng_state())


def test_drawing_on_the_device_leaves_the_generator_of_the_cpu(gpu: Sightings) -> None:
    before = torch.get_rng_state()
    on_cuda(4)
    assert torch.equal(before, torch.get_rng_state())


@pytest.fixture
def model(gpu: Sightings) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)).cuda()


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_training_step_stays_on_the_device(gpu: Sightings, model: nn.Module, optimizer: str) -> None:
    images, labels = torch.randn(8, 1, 4, 4).to("cuda"), torch.arange(8, device="cuda") % 2
    chosen: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=True)
    if optimizer == "adam":
        chosen = torch.optim.Adam(model.parameters())
    gpu.lap()
    with torch.autocast("cuda", torch.bfloat16):
        loss = F.cross_entropy(model(images), labels)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    chosen.step()
    assert loss.is_cuda
    assert all(parameter.grad is not None and parameter.grad.is_cuda for parameter in model.parameters())
    assert not gpu.lap()[0]


def test_gradients_of_torch_func_are_on_the_device(gpu: Sightings, model: nn.Module) -> None:
    images, labels = torch.randn(8, 1, 4, 4).to("cuda"), torch.arange(8, device="cuda") % 2
    model.eval()
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits = functional_call(model, (weights, dict(model.named_buffers())), (image[None],))
        return F.cross_entropy(logits, label[None])

    gradients, _ = vmap(grad_and_value(loss), in_dims=(None, 0, 0))(weights, images, labels)
    assert all(gradient.is_cuda for gradient in gradients.values())


def test_a_file_is_loaded_to_the_device(gpu: Sightings, tmp_path: Path) -> None:
    torch.save({"x": torch.ones(2)}, tmp_path / "x.pt")
    assert torch.load(tmp_path / "x.pt", map_location="cuda")["x"].is_cuda
    assert not torch.load(tmp_path / "x.pt", map_location="cpu")["x"].is_cuda


def test_after_the_block_there_is_no_gpu() -> None:
    real = torch.cuda.is_available, torch.Generator
    with pretend_cuda():
        assert torch.cuda.is_available()
    assert (torch.cuda.is_available, torch.Generator) == real
    assert not torch.zeros(1).is_cuda
