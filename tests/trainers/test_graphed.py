"""Captured training steps make the same training as ordinary ones; without a GPU a stand-in makes the capture."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from backdoor_bench_none.contracts.context import Context
from backdoor_bench_none.contracts.dataset import DatasetInfo, ImageSet
from backdoor_bench_none.contracts.recipe import Recipe
from backdoor_bench_none.contracts.trainer import FitTask, TrainingData
from backdoor_bench_none.testing.pretend_cuda import pretend_cuda
from backdoor_bench_none.trainers import graphed
from backdoor_bench_none.trainers.centralized import Centralized
from backdoor_bench_none.trainers.graphed import WARM_UP, Capture, GraphedStep, NotCapturedWarning, use_tensor_rates

INFO = DatasetInfo("tiny", (1, 4, 4), 2, 64, (0.5,), (0.5,))
CPU = torch.device("cpu")
SIZE, STEPS = 4, 10


class Recorder:
    """Notes what a captured step was given, and how it was run."""

    def __init__(self) -> None:
        self.seen: list[tuple[list[int], list[list[int]]]] = []
        self.captured = 0
        self.replayed = 0

    def step(self, chosen: Tensor, shifts: Tensor) -> Tensor:
        self.seen.append((chosen.tolist(), shifts.tolist()))
        return chosen.sum().float()

    def capture(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.captured += 1

        def replay() -> Tensor:
            self.replayed += 1
            return run()

        return replay


def batches(count: int, size: int = SIZE) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randint(100, (size,), generator=generator), torch.randint(9, (size, 3), generator=generator))
        for _ in range(count)
    ]


def test_every_batch_is_seen_once_in_order_and_the_capture_is_made_once() -> None:
    recorder, given = Recorder(), batches(STEPS)
    step = GraphedStep(recorder.step, SIZE, CPU, recorder.capture)
    losses = [float(step(*batch)) for batch in given]
    assert recorder.seen == [(chosen.tolist(), shifts.tolist()) for chosen, shifts in given]
    assert losses == [float(chosen.sum()) for chosen, _ in given]
    assert (recorder.captured, recorder.replayed) == (1, STEPS - WARM_UP)


def test_a_batch_of_another_size_is_an_ordinary_step() -> None:
    recorder = Recorder()
    step = GraphedStep(recorder.step, SIZE, CPU, recorder.capture)
    for batch in [*batches(STEPS), *batches(1, SIZE - 1), *batches(1)]:
        step(*batch)
    assert len(recorder.seen[STEPS][0]) == SIZE - 1
    assert (recorder.captured, recorder.replayed) == (1, STEPS - WARM_UP + 1)


def test_a_step_that_cannot_be_captured_goes_on_and_says_why() -> None:
    def refuse(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing\nsecond line")

    recorder = Recorder()
    step = GraphedStep(recorder.step, SIZE, CPU, refuse)
    given = batches(STEPS)
    for batch in given[:WARM_UP]:
        step(*batch)
    with pytest.warns(NotCapturedWarning, match="slower: operation not permitted when stream is capturing$"):
        step(*given[WARM_UP])
    for batch in given[WARM_UP + 1 :]:
        step(*batch)  # warnings are errors here
    assert len(recorder.seen) == STEPS


@pytest.mark.parametrize("lr", [0.5, 0.125])
def test_rates_in_tensors_train_as_numbers_do(lr: float) -> None:
    """Powers of two, which both hold exactly."""
    torch.manual_seed(0)
    images, labels = torch.randn(8, 3), torch.arange(8) % 2
    weights = []
    for in_tensors in (False, True):
        torch.manual_seed(1)
        model = nn.Linear(3, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.5, fused=True)
        if in_tensors:
            use_tensor_rates(optimizer, CPU)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
        weights.append(model.weight.detach())
    assert torch.equal(*weights)


def train(device: torch.device, capture: Capture) -> Tensor:
    """The first weights of a small network after 20 steps."""
    torch.manual_seed(1)
    images, labels = torch.randn(64, 3, 8, 8).to(device), (torch.arange(64) % 2).to(device)
    convolution = nn.Conv2d(3, 8, 3)
    model = nn.Sequential(convolution, nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.125, momentum=0.5, fused=True)
    use_tensor_rates(optimizer, device)

    def run(chosen: Tensor, shifts: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
        loss.backward()
        optimizer.step()
        return loss.detach()

    step = GraphedStep(run, 16, device, capture)
    for index in range(20):
        order = torch.randperm(64, generator=torch.Generator().manual_seed(index))[:16]
        step(order.to(device), torch.zeros(16, 3, dtype=torch.int64, device=device))
    return convolution.weight.detach().cpu()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_captured_training_on_a_gpu_is_the_ordinary_one() -> None:
    weights = [train(torch.device("cuda"), capture) for capture in (lambda run: run, graphed.capture_graph)]
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-4, atol=1e-6)


def test_a_whole_fit_on_a_pretended_gpu_is_captured_and_is_that_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    monkeypatch.setattr(graphed, "capture_graph", recorder.capture)
    weights = []
    for name in ("cpu", "cuda"):
        with pretend_cuda():
            device = torch.device(name)
            torch.manual_seed(0)
            model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2)).to(device)
            images = torch.randint(256, (64, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
            part = ImageSet(images, images[:, 0, 0, 0].long() // 128).to(device)
            data = TrainingData.of(part, INFO, device)
            recipe = Recipe(epochs=7, batch_size=8, lr=0.1, augment=False)
            history = Centralized().fit(FitTask(model, data, recipe), Context(device, 0))
            weights.append([parameter.detach().cpu() for parameter in model.parameters()])
    assert (recorder.captured, recorder.replayed) == (1, 7 * 8 - WARM_UP)
    assert history.losses[-1] < history.losses[0]
    for ordinary, captured in zip(*weights, strict=True):
        torch.testing.assert_close(captured, ordinary, rtol=1e-4, atol=1e-5)
