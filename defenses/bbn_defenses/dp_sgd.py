"""DP-SGD as a defense (gradient shaping, Hong et al., 2020): clipped per-sample gradients, summed with noise."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

import torch
import torch.nn as nn
import torch.nn.functional as F
from pydantic import Field

from backdoor_bench_none.api import (
    Batch,
    Combination,
    Context,
    Defense,
    DefenseResult,
    DefenseTask,
    Stage,
    TrainingError,
)

if TYPE_CHECKING:
    from torch import Tensor

#: samples whose gradients are computed at once on a CPU: of 8, 16 and a whole batch of 64 the fastest, or close to it
CPU_CHUNK = 16
#: bytes of per-sample gradients that are held at once on a GPU: those of a batch of 128 in AlexNet at 224 px are 29 GB
GRADIENT_BYTES = 2 << 30
#: gradients of one sample each, by parameter name: (B, *shape of the parameter)
PerSample: TypeAlias = "dict[str, Tensor]"


class GroupNorm(Defense):
    """The control of `dp_sgd`: the same network with GroupNorm instead of BatchNorm, trained as usual.

    There is no clipping and no noise. BatchNorm mixes the samples of a batch, so that it has no per-sample gradient;
    what DP-SGD loses must be read against this network.
    """

    paper: ClassVar[str] = "arXiv:1803.08494"
    stage: ClassVar[Stage] = Stage.IN_TRAINING

    def skip(self, cell: Combination) -> str | None:
        """Not on a frozen backbone."""
        if cell.trainer.component.has_backbone:
            return "the norms of a frozen backbone cannot be replaced"
        return None

    def adapt(self, model: nn.Module) -> nn.Module:
        """`model` with each BatchNorm of C channels replaced by a GroupNorm of gcd(32, C) groups, as by Opacus."""
        return replace_batchnorm(model)

    def run(self, task: DefenseTask, context: Context) -> DefenseResult:
        """The converted network, trained from initial weights."""
        model = self.adapt(task.new_model())
        task.fit(model, context)
        return DefenseResult(model)


class DPSGD(GroupNorm):
    """Trains by p <- p - lr * (sum of clipped per-sample gradients + noise) / B (Abadi et al., 2016).

    The paper's settings: clip 4.0 with noise 0.1, and clip 1.0 with noise 0.5 (the default; Table 1 agrees with it).
    Hong et al. list the noise as an absolute deviation in places, as a multiple of clip in others; `noise_unit` offers
    both. Batches are shuffled, not Poisson-sampled; `epsilon` is Opacus' RDP account for the sampling rate B / N, and
    infinite where the noise is too small to account for. The network is trained from initial weights by the cell's
    recipe.
    """

    paper: ClassVar[str] = "arXiv:1607.00133, arXiv:2002.11497"

    clip: float = Field(1.0, gt=0, description="highest L2 norm of a sample's gradient over all parameters")
    noise: float = Field(
        0.5, ge=0, description="deviation of the noise added to the sum of clipped gradients, in noise_unit"
    )
    noise_unit: Literal["multiplier", "absolute"] = Field(
        "multiplier", description="multiplier: times clip, as in Opacus; absolute: as it is"
    )
    delta: float = Field(1e-5, gt=0, lt=1, description="delta of the reported epsilon")
    lr: float | None = Field(None, gt=0, description="highest learning rate; default: the recipe's")
    epochs: int | None = Field(None, ge=1, description="epochs; default: the recipe's")
    method: Literal["vmap", "loop"] = Field(
        "vmap", description="how per-sample gradients are computed: batched, or one after the other"
    )
    chunk: int | None = Field(
        None,
        ge=1,
        description="samples whose gradients are held at once; default: 16 on a CPU, where that is fastest, else 2 GB",
    )

    def skip(self, cell: Combination) -> str | None:
        """Not with clients, nor on a frozen backbone."""
        if cell.trainer.component.has_clients:
            return "the privacy account is for one trainer"
        return super().skip(cell)

    def run(self, task: DefenseTask, context: Context) -> DefenseResult:
        """The converted network, trained with clipping and noise; `epsilon` in extras."""
        model = self.adapt(task.new_model())
        if self.method == "vmap" and (shared := _shared_layer(model)) is not None:
            raise TrainingError(f"dp_sgd: the layer {shared} is used under two names", "`method: loop` can train it")
        generator = torch.Generator(context.device).manual_seed(context.derive("noise").seed)

        def gradients(model: nn.Module, batch: Batch, context: Context) -> Tensor:
            return self.step(model, batch, context, generator)

        changes: dict[str, Any] = {"lr": self.lr, "epochs": self.epochs}
        # the gradients of the samples are clipped, their sum is not
        changes = {"clip_norm": None} | {name: value for name, value in changes.items() if value is not None}
        task.fit(model, context, gradients=gradients, **changes)
        batch_size = min(task.recipe.batch_size, len(task.train))
        steps = (self.epochs or task.recipe.epochs) * len(task.recipe.batch_sizes(len(task.train)))
        return DefenseResult(
            model, extras={"epsilon": self.epsilon(batch_size / len(task.train), steps), "delta": self.delta}
        )

    @property
    def noise_std(self) -> float:
        """The deviation of the noise on the sum of clipped gradients."""
        if self.noise_unit == "multiplier":
            return self.noise * self.clip
        return self.noise

    def step(self, model: nn.Module, batch: Batch, context: Context, generator: torch.Generator) -> Tensor:
        """Leave the private gradient of the batch in `model`, and return the mean loss.

        The sum of clipped gradients and noise is divided by the size of the batch.
        """
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
        losses = []
        differentiate = by_vmap if self.method == "vmap" else by_loop
        chunk = self.chunk or default_chunk(parameters.values(), context.device)
        for part in _parts(batch, chunk):
            gradients, loss = differentiate(model, part)
            losses.append(loss)
            factors = (self.clip / (_norms(gradients) + 1e-6)).clamp(max=1)  # (B,)
            for name, gradient in gradients.items():
                sums[name] += torch.einsum("b,b...->...", factors, gradient)
        for name, parameter in parameters.items():
            noise = torch.randn(parameter.shape, generator=generator, device=parameter.device) * self.noise_std
            parameter.grad = (sums[name] + noise) / len(batch.labels)
        return torch.cat(losses).mean()

    def epsilon(self, sample_rate: float, steps: int) -> float | None:
        """The epsilon of (epsilon, delta)-differential privacy; None for infinite."""
        from opacus.accountants import RDPAccountant

        if self.noise_std == 0:
            return None
        accountant = RDPAccountant()
        accountant.history = [(self.noise_std / self.clip, sample_rate, steps)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the accountant warns about every order that fails
            epsilon = accountant.get_epsilon(self.delta)
        if not math.isfinite(epsilon):
            return None
        return float(epsilon)


def default_chunk(parameters: Iterable[Tensor], device: torch.device) -> int:
    """How many samples' gradients are computed at once: 16 on a CPU, else as many as `GRADIENT_BYTES` hold."""
    if device.type == "cpu":
        return CPU_CHUNK
    of_one = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    return max(1, GRADIENT_BYTES // of_one)


def replace_batchnorm(model: nn.Module) -> nn.Module:
    """`model`, changed in place: GroupNorm in place of BatchNorm, in gcd(32, C) groups as Opacus does it."""
    device = next(model.parameters()).device
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                # of features without a map, a group of one has no deviation
                groups = 1 if isinstance(child, nn.BatchNorm1d) else math.gcd(32, child.num_features)
                setattr(module, name, nn.GroupNorm(groups, child.num_features, affine=child.affine, device=device))
    return model


def _shared_layer(model: nn.Module) -> str | None:
    """The two names of a layer that stands in a network twice, which torch.func cannot differentiate; None if none."""
    names: dict[nn.Module, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if module in names and any(True for _ in module.parameters()):
            return f"'{names[module]}', also '{name}',"
        names[module] = name
    return None


def by_vmap(model: nn.Module, batch: Batch) -> tuple[PerSample, Tensor]:
    """Per-sample gradients and losses (B,) by torch.func: one batched backward pass."""
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    buffers = dict(model.named_buffers())

    def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, (parameters, buffers), (image[None],))
        return F.cross_entropy(logits, label[None])

    each = torch.func.vmap(torch.func.grad_and_value(loss), in_dims=(None, 0, 0), randomness="different")
    gradients, losses = each(parameters, batch.images, batch.labels)
    return gradients, losses


def by_loop(model: nn.Module, batch: Batch) -> tuple[PerSample, Tensor]:
    """Per-sample gradients and losses (B,), one sample after the other."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows, losses = [], []
    for image, label in zip(batch.images, batch.labels, strict=True):
        loss = F.cross_entropy(model(image[None]), label[None])
        rows.append(torch.autograd.grad(loss, list(parameters.values())))
        losses.append(loss.detach())
    return dict(zip(parameters, map(torch.stack, zip(*rows, strict=True)), strict=True)), torch.stack(losses)


def _parts(batch: Batch, size: int) -> list[Batch]:
    columns = (torch.split(x, size) for x in (batch.images, batch.labels, batch.indices))
    return [Batch(*part) for part in zip(*columns, strict=True)]


def _norms(gradients: PerSample) -> Tensor:
    """The L2 norm (B,) of each sample's gradient over all parameters."""
    norms = [torch.linalg.vector_norm(g.flatten(1).float(), dim=1) for g in gradients.values()]
    whole: Tensor = torch.linalg.vector_norm(torch.stack(norms), dim=0)
    return whole
