"""The training loop, for CPU and CUDA.

The data set lies on the device as uint8; every step is a handful of batched tensor operations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn as nn

from backdoor_bench_none.contracts.context import Context
from backdoor_bench_none.contracts.network import logits_parameters, move
from backdoor_bench_none.contracts.recipe import Recipe
from backdoor_bench_none.contracts.trainer import Batch, FitTask, History, Trainer, TrainingData, cross_entropy
from backdoor_bench_none.errors import TrainingError
from backdoor_bench_none.trainers.graphed import LEAST_STEPS, GraphedStep, Step, use_tensor_rates

if TYPE_CHECKING:
    from torch import Tensor


class Centralized(Trainer):
    """All data in one place: SGD over shuffled batches."""

    def fit(self, task: FitTask, context: Context) -> History:
        """Train `task.model` in place; raises `TrainingError` when the loss is not finite."""
        devices = [context.device] if context.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(context.seed)  # dropout draws from the global generator
            return self._fit(task, context)

    def _fit(self, task: FitTask, context: Context) -> History:
        generator = context.generator("fit")
        model, recipe, indices = task.model, task.recipe, task.indices()
        if len(indices) == 0:
            raise TrainingError("failed to train: no sample is left to train on")
        steps_per_epoch = len(recipe.batch_sizes(len(indices)))
        move(model, context.device)
        optimizer = _make_optimizer(task)
        network = _compiled(model) if _can_compile(task) else model

        def make_step(chosen: Tensor, shifts: Tensor) -> Tensor:
            return _step(task, network, _batch(task.data, chosen, shifts, recipe), optimizer, context)

        step: Step = make_step
        if context.device.type == "cuda" and _can_capture(task, recipe.epochs * steps_per_epoch):
            use_tensor_rates(optimizer, context.device)
            step = GraphedStep(make_step, recipe.batch_sizes(len(indices))[0], context.device)
        history = History()
        for epoch in range(recipe.epochs):
            _set_train_mode(model, task.freeze_batchnorm)
            total = torch.zeros((), device=context.device)
            for index, (chosen, shifts) in enumerate(_draw_epoch(task.data, indices, recipe, generator)):
                _set_lr(optimizer, recipe.lr_at(epoch * steps_per_epoch + index, steps_per_epoch))
                total += step(chosen, shifts)
            history.losses.append(_finite(total.item() / steps_per_epoch, epoch))
            context.log("loss", history.losses[-1], epoch)
            context.progress(epoch + 1, recipe.epochs)
            context.check_deadline()
        model.eval()
        return history


def _draw_epoch(
    data: TrainingData, indices: Tensor, recipe: Recipe, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """The indices (B,) and the shifts (B, 3) of each batch of an epoch.

    All random numbers go to the device at once, so that no step waits for the host.
    """
    device = data.images.labels.device
    order = indices[torch.randperm(len(indices), generator=generator)].to(device)
    shifts = data.pixels.draw_shifts(len(order), generator).to(device)
    sizes = recipe.batch_sizes(len(order))
    steps = (torch.split(x[: sum(sizes)], sizes) for x in (order, shifts))
    yield from zip(*steps, strict=True)


def _batch(data: TrainingData, chosen: Tensor, shifts: Tensor, recipe: Recipe) -> Batch:
    images = data.images.images[chosen]
    if recipe.augment:
        images = data.pixels.augment(images, shifts)
    return Batch(data.pixels.normalize(images), data.images.labels[chosen], chosen)


def _can_compile(task: FitTask) -> bool:
    """Whether the recipe asks for `torch.compile`; compiled code does not run below `torch.func.vmap`."""
    return task.recipe.compile and _is_plain(task)


def _can_capture(task: FitTask, steps: int) -> bool:
    """Whether a step may be captured, and there are enough of them."""
    return _is_plain(task) and not task.recipe.compile and task.recipe.optimizer == "sgd" and steps >= LEAST_STEPS


def _is_plain(task: FitTask) -> bool:
    """Whether nothing of a network but its output is read, which Python code in hooks and losses could do."""
    is_usual = task.loss is cross_entropy and task.gradients is None
    return is_usual and not any(map(_has_hooks, task.model.modules()))


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _compiled(model: nn.Module) -> nn.Module:
    """A wrapper that runs `model` compiled; the model itself is as before."""
    wrapper: nn.Module = torch.compile(model)  # type: ignore[assignment]
    return wrapper


def _step(
    task: FitTask, network: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer, context: Context
) -> Tensor:
    """One step; `network` is the task's, or a wrapper around it."""
    optimizer.zero_grad(set_to_none=True)
    if task.gradients is not None:
        loss = task.gradients(task.model, batch, context)
    else:
        with context.autocast():
            loss = task.loss(network, batch)
        loss.backward()  # type: ignore[no-untyped-call]
    if task.recipe.clip_norm is not None:
        nn.utils.clip_grad_norm_(task.model.parameters(), task.recipe.clip_norm)
    optimizer.step()
    return loss.detach()


def _make_optimizer(task: FitTask) -> torch.optim.Optimizer:
    model, recipe = task.model, task.recipe
    head: set[int] = set()
    if recipe.head_lr_factor != 1:
        head = _parameters_of_logits(task)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        factor, decay = 1.0, recipe.weight_decay
        if name.endswith("bias") and recipe.bias_lr_factor != 1:
            factor, decay = recipe.bias_lr_factor, 0.0
        if id(parameter) in head:
            factor = recipe.head_lr_factor
        groups.setdefault((factor, decay), []).append(parameter)
    parameters = [{"params": p, "factor": factor, "weight_decay": decay} for (factor, decay), p in groups.items()]
    if recipe.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=recipe.lr, fused=True)
    momentum, nesterov = recipe.momentum, recipe.nesterov and recipe.momentum > 0
    return torch.optim.SGD(parameters, lr=recipe.lr, momentum=momentum, nesterov=nesterov, fused=True)


def _parameters_of_logits(task: FitTask) -> set[int]:
    """The ids of the parameters of the layers that make the logits."""
    return {id(parameter) for parameter in logits_parameters(task.model, task.data.example())}


def _set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        rate = lr * group["factor"]
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def _set_train_mode(model: nn.Module, freeze_batchnorm: bool) -> None:
    model.train()
    if freeze_batchnorm:
        for module in model.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.eval()


def _finite(loss: float, epoch: int) -> float:
    if not math.isfinite(loss):
        raise TrainingError(
            f"failed to train: the loss is not finite in epoch {epoch + 1}", "lower recipe.lr or set recipe.clip_norm"
        )
    return loss
