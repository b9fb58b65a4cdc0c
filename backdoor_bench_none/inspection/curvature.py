"""The curvature of the loss over the input: the largest eigenvalues of its Hessian, by Lanczos."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn as nn
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor

#: multiples of the rounding of the longest product, below which a remainder is only rounding
EXHAUSTED = 1000


def input_curvature(model: nn.Module, inputs: Tensor, labels: Tensor, count: int, steps: int, seed: int) -> Tensor:
    """The `count` largest eigenvalues of the Hessian of each sample's cross entropy over its input, falling (N, count).

    `inputs` (N, ...) are normalised, `labels` (N,); `model` is in eval mode. Lanczos runs for `steps` steps on all
    samples at once, each step one Hessian-vector product. With K classes and piecewise linear activations the Hessian
    has at most K - 1 eigenvalues that are not zero, so that K steps find them all. Of D inputs there are D eigenvalues,
    and no more steps; `ValueError` for a larger `count`.
    """
    dimension = inputs[0].numel()
    if count > dimension:
        raise ValueError(f"{count} eigenvalues of a Hessian over {dimension} inputs")
    steps = min(steps, dimension)
    basis: list[Tensor] = []  # each (N, D)
    diagonal: list[Tensor] = []
    beside: list[Tensor] = []
    samples = inputs.detach().requires_grad_(True)
    loss = F.cross_entropy(model(samples), labels, reduction="sum")  # samples do not mix, so the Hessian is in blocks
    (gradient,) = torch.autograd.grad(loss, samples, create_graph=True)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(inputs.flatten(1).shape, generator=generator).to(inputs.device)
    vector = start / _lengths(start)
    scale = torch.zeros_like(vector[:, :1])
    for step in range(steps):
        basis.append(vector)
        (product,) = torch.autograd.grad(
            gradient, samples, vector.view_as(inputs), retain_graph=step < steps - 1, materialize_grads=True
        )
        rest = product.flatten(1)
        diagonal.append((rest * vector).sum(1))
        for _ in range(2):  # twice is enough against the loss of orthogonality in float32
            for known in basis:
                rest = rest - (rest * known).sum(1, keepdim=True) * known
        # what is left of a space that is exhausted is rounding, which would bring eigenvalues back a second time
        length, scale = _lengths(rest), torch.maximum(scale, _lengths(product.flatten(1)))
        length = torch.where(length > EXHAUSTED * torch.finfo(rest.dtype).eps * scale, length, 0.0)
        beside.append(length.squeeze(1))
        vector = torch.where(length > 0, rest / length, 0.0)
    tridiagonal = torch.diag_embed(torch.stack(diagonal, 1))
    if steps > 1:
        edge = torch.stack(beside[:-1], 1)
        tridiagonal = tridiagonal + torch.diag_embed(edge, 1) + torch.diag_embed(edge, -1)
    values: Tensor = torch.linalg.eigvalsh(tridiagonal.double())
    return values.flip(1)[:, :count].detach()


def _lengths(vectors: Tensor) -> Tensor:
    """The norm of each row of (N, D), as (N, 1)."""
    return vectors.square().sum(1, keepdim=True).sqrt()
