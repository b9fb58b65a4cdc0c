"""The curvature of the loss over the input, against closed forms and whole Hessians."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backdoor_bench_none.api import Context, DatasetInfo, Evaluation, ImageSet
from backdoor_bench_none.inspection.curvature import input_curvature
from backdoor_bench_none.metrics.curvature import Curvature

CPU = Context(torch.device("cpu"), 0)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(*layers: nn.Module, seed: int = 0) -> nn.Sequential:
    model = nn.Sequential(*layers)
    for index, parameter in enumerate(model.parameters()):
        parameter.data = draw(*parameter.shape, seed=seed + index) * 0.5
    return model.eval()


def test_a_linear_softmax_model_by_its_closed_form() -> None:
    """The Hessian is W' (diag(p) - p p') W, whatever the label."""
    model, inputs, labels = seeded(nn.Linear(12, 4)), draw(5, 12, seed=7), torch.tensor([0, 1, 2, 3, 0])
    weight, bias = (parameter.detach().double() for parameter in model.parameters())
    likely = (inputs.double() @ weight.T + bias).softmax(1)
    hessians = torch.stack([weight.T @ (torch.diag(p) - torch.outer(p, p)) @ weight for p in likely])
    expected = torch.linalg.eigvalsh(hessians).flip(1)[:, :3]
    torch.testing.assert_close(input_curvature(model, inputs, labels, 3, 6, 0), expected, rtol=1e-4, atol=1e-5)


def loss_of(model: nn.Module, label: Tensor, sample: Tensor) -> Tensor:
    return F.cross_entropy(model(sample), label)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Softplus, nn.ELU])
def test_a_deep_network_by_its_whole_hessian(activation: type[nn.Module]) -> None:
    model = seeded(nn.Flatten(), nn.Linear(9, 8), activation(), nn.Linear(8, 8), activation(), nn.Linear(8, 3)).double()
    inputs, labels = draw(4, 1, 3, 3, seed=3).double(), torch.tensor([0, 1, 2, 1])
    for index in range(4):
        sample, label = inputs[index : index + 1], labels[index : index + 1]
        loss = partial(loss_of, model, label)
        whole = torch.autograd.functional.hessian(loss, sample).reshape(9, 9)
        expected = torch.linalg.eigvalsh(whole).flip(0)[:2]
        measured = input_curvature(model, sample, label, 2, 9, 0)[0]
        torch.testing.assert_close(measured, expected, rtol=1e-6, atol=1e-8)


def test_samples_do_not_mix() -> None:
    model, inputs = seeded(nn.Linear(6, 5), nn.Softplus(), nn.Linear(5, 3)).double(), draw(7, 6, seed=1).double()
    labels = torch.arange(7) % 3
    together = input_curvature(model, inputs, labels, 2, 6, 0)
    alone = torch.cat([input_curvature(model, inputs[i : i + 1], labels[i : i + 1], 2, 6, 5) for i in range(7)])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-9)


def test_a_flat_loss_has_no_curvature() -> None:
    model = seeded(nn.Linear(6, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(
        input_curvature(model, draw(4, 6), torch.zeros(4, dtype=torch.long), 2, 4, 0), torch.zeros(4, 2).double()
    )


def test_the_metric_is_the_mean_over_the_first_images() -> None:
    """Two logits +- a * brightness / std: the largest eigenvalue is 4 a^2 p (1 - p) / std^2 ... of one pixel."""
    info = DatasetInfo("one pixel", (1, 1, 1), 2, 4, (0.5,), (0.25,))
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False)).eval()
    model[1].weight.data = torch.tensor([[1.0], [-1.0]])  # type: ignore[union-attr]
    images = torch.tensor([0, 255, 51, 102], dtype=torch.uint8).view(4, 1, 1, 1)
    test = ImageSet(images, torch.tensor([0, 1, 0, 1]))
    empty = torch.empty(0, dtype=torch.long)
    evaluation = Evaluation(model, test.labels, test.labels, empty, empty, empty, test=test, info=info)
    values = [(level / 255 - 0.5) / 0.25 for level in (0, 255, 51)]
    sigmoid = [1 / (1 + math.exp(-2 * value)) for value in values]
    expected = sum(4 * p * (1 - p) for p in sigmoid) / 3
    assert Curvature(images=3, count=1).compute(evaluation, CPU) == {"lambda_1": pytest.approx(expected, rel=1e-4)}


def test_without_images_there_are_no_values() -> None:
    labels = torch.zeros(2, dtype=torch.long)
    assert Curvature().compute(Evaluation(nn.Identity(), labels, labels, labels, labels, labels), CPU) == {}


def test_a_hessian_has_as_many_eigenvalues_as_inputs() -> None:
    """Two inputs, one eigenvalue below zero: nothing is filled up with zeros, which would sort above it."""

    class Saddle(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            value = 2 * x[:, 0] ** 2 - 0.5 * x[:, 1] ** 2
            return torch.stack([value, torch.zeros_like(value)], 1)

    inputs, labels = torch.zeros(3, 2), torch.ones(3, dtype=torch.long)
    values = input_curvature(Saddle(), inputs, labels, 2, 12, seed=0)
    # at the origin the loss is ln 2 + value / 2 to second order
    torch.testing.assert_close(values, torch.tensor([[2.0, -0.5]] * 3).double(), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="3 eigenvalues of a Hessian over 2 inputs"):
        input_curvature(Saddle(), inputs, labels, 3, 12, seed=0)
