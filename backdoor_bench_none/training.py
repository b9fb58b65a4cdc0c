"""The one training loop, for CPU and CUDA: the data set lies on the device
as uint8, every step is a handful of batched tensor operations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from backdoor_bench_none.component import Component
from backdoor_bench_none.context import Context
from backdoor_bench_none.data.dataset import DatasetInfo, ImageSet
from backdoor_bench_none.errors import TrainingError
from backdoor_bench_none.recipe import Recipe

if TYPE_CHECKING:
    from backdoor_bench_none.models.builder import ModelBuilder
    from backdoor_bench_none.task import TrainingTask

#: images per forward pass without gradients
INFERENCE_BATCH = 512


@dataclass(frozen=True)
class Batch:
    """One step's data on the device: normalised `images` (B, C, H, W),
    `labels` (B,), and their `indices` (B,) in the training set.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor


#: computes the loss of a batch, a scalar that the loop differentiates
Loss = Callable[[nn.Module, Batch], Tensor]
#: computes the loss of a batch, and leaves the gradients to step along in the parameters by itself
Gradients = Callable[[nn.Module, Batch, Context], Tensor]


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """The mean cross entropy of the batch."""
    return F.cross_entropy(model(batch.images), batch.labels)


@dataclass(frozen=True)
class Pixels:
    """Turns uint8 images into what networks see: scaled to 0..1,
    normalised per channel, and in training cropped and flipped.
    """

    scale: Tensor  # (C, 1, 1)
    shift: Tensor  # (C, 1, 1)
    crop_padding: int
    flip: bool

    @classmethod
    def of(cls, info: DatasetInfo, device: torch.device) -> Pixels:
        """The normalisation and augmentation of a data set."""
        mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (info.mean, info.std))
        return cls(1 / (255 * std), -mean / std, info.crop_padding, info.flip)

    def normalize(self, images: Tensor) -> Tensor:
        """(N, C, H, W) uint8 -> float32, zero mean and unit deviation, channels last."""
        return torch.addcmul(self.shift, images, self.scale).contiguous(memory_format=torch.channels_last)

    def draw_shifts(self, count: int, generator: torch.Generator) -> Tensor:
        """(N, 3) int64: the top and left of each image's crop in the padded image, and whether it is flipped."""
        corners = torch.randint(2 * self.crop_padding + 1, (count, 2), generator=generator)
        flipped = torch.rand(count, 1, generator=generator) < 0.5 * self.flip
        return torch.cat([corners, flipped.long()], dim=1)

    def augment(self, images: Tensor, shifts: Tensor) -> Tensor:
        """Crop each of `images` (N, C, H, W) uint8 out of its zero-padded self and flip it, as `shifts` (N, 3) says."""
        if not self.crop_padding and not self.flip:
            return images
        height, width = (torch.arange(extent, device=images.device) for extent in images.shape[2:])
        top, left, flipped = shifts[:, :, None].unbind(1)  # (N, 1) each
        rows = top + height  # (N, H)
        columns = left + torch.where(flipped.bool(), width.flip(0), width)  # (N, W)
        padded = F.pad(images, (self.crop_padding,) * 4)
        samples = torch.arange(len(images), device=images.device)
        # advanced indices around a slice: (N, H, W, C), which is channels last already
        return padded[samples[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


@dataclass(frozen=True)
class TrainingData:
    """A training set on the device, and how its pixels are prepared."""

    images: ImageSet
    info: DatasetInfo
    pixels: Pixels
    #: the client (N,) int64 that holds each sample, on the CPU; None where all data are in one place
    clients: Tensor | None = None

    @classmethod
    def of(
        cls, images: ImageSet, info: DatasetInfo, device: torch.device, clients: Tensor | None = None
    ) -> TrainingData:
        """`images` moved to `device`."""
        return cls(images.to(device), info, Pixels.of(info, device), clients)


@dataclass
class History:
    """The mean training loss of every epoch."""

    losses: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class FitOptions:
    """What a defense may change about training; the defaults are plain training on all samples."""

    #: indices (k,) of the samples to train on; all of them by default
    keep: Tensor | None = None
    #: leave BatchNorm's running statistics as they are (its affine parameters still train)
    freeze_batchnorm: bool = False
    loss: Loss = cross_entropy
    #: in place of differentiating `loss`
    gradients: Gradients | None = None
    #: how single clients train, by client: fields of the recipe that differ; for trainers with clients only
    local: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)


class Trainer(Component):
    """Base of all trainers: they fit a model to data; a defense trains through one and nothing else.

    One that `has_clients` divides the training set among them. One that `has_backbone` gives every network the
    weights of `pretrain`, except for its last layer, and trains that alone.
    """

    has_clients: ClassVar[bool] = False
    has_backbone: ClassVar[bool] = False

    def recipe(self) -> Mapping[str, Any]:
        """The fields of the training recipe that this trainer needs changed."""
        return {}

    def check(self, info: DatasetInfo) -> None:
        """Raise `ConfigError` if this trainer cannot train on that data set."""

    def split(self, labels: Tensor, num_classes: int, seed: int) -> Tensor:
        """The client (N,) int64 of every sample with these clean labels (N,), -1 for none; if it has clients."""
        raise NotImplementedError

    def pretrain(self, make_task: Callable[[], TrainingTask], build: ModelBuilder, context: Context) -> nn.Module:
        """The network whose weights, but for the last layer, are the frozen backbone; if it has one.

        `make_task()` reads the images for it, of classes of their own; `build` makes networks for the data set.
        """
        raise NotImplementedError

    def fit(
        self, model: nn.Module, data: TrainingData, recipe: Recipe, context: Context, options: FitOptions
    ) -> History:
        """Train `model` in place."""
        raise NotImplementedError


class Centralized(Trainer):
    """All data in one place: SGD over shuffled batches."""

    def fit(
        self, model: nn.Module, data: TrainingData, recipe: Recipe, context: Context, options: FitOptions
    ) -> History:
        """Train `model` in place; raises `TrainingError` when the loss is not finite."""
        with torch.random.fork_rng(devices=[context.device] if context.device.type == "cuda" else []):
            torch.manual_seed(context.seed)  # dropout draws from the global generator
            return self._fit(model, data, recipe, context, options)

    def _fit(
        self, model: nn.Module, data: TrainingData, recipe: Recipe, context: Context, options: FitOptions
    ) -> History:
        generator = context.generator("fit")
        indices = torch.arange(len(data.images)) if options.keep is None else options.keep.cpu()
        if len(indices) == 0:
            raise TrainingError("failed to train: no sample is left to train on")
        steps_per_epoch = len(recipe.batch_sizes(len(indices)))
        move(model, context.device)
        optimizer = _make_optimizer(model, recipe)
        if recipe.compile:
            model.compile()
        history = History()
        for epoch in range(recipe.epochs):
            _set_train_mode(model, options.freeze_batchnorm)
            total = torch.zeros((), device=context.device)
            for step, batch in enumerate(_batches(data, indices, recipe, generator)):
                _set_lr(optimizer, recipe.lr_at(epoch * steps_per_epoch + step, steps_per_epoch))
                total += _step(model, batch, optimizer, recipe, context, options)
            history.losses.append(_finite(total.item() / steps_per_epoch, epoch))
            context.log("loss", history.losses[-1], epoch)
            context.progress(epoch + 1, recipe.epochs)
            context.check_deadline()
        model.eval()
        return history


def _batches(data: TrainingData, indices: Tensor, recipe: Recipe, generator: torch.Generator) -> Iterator[Batch]:
    """One epoch; all its random numbers go to the device at once, so that no step waits for the host."""
    device = data.images.labels.device
    order = indices[torch.randperm(len(indices), generator=generator)].to(device)
    shifts = data.pixels.draw_shifts(len(order), generator).to(device)
    sizes = recipe.batch_sizes(len(order))
    steps = (torch.split(x[: sum(sizes)], sizes) for x in (order, shifts))
    for chosen, shift in zip(*steps, strict=True):
        images = data.images.images[chosen]
        if recipe.augment:
            images = data.pixels.augment(images, shift)
        yield Batch(data.pixels.normalize(images), data.images.labels[chosen], chosen)


def _step(
    model: nn.Module,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    context: Context,
    options: FitOptions,
) -> Tensor:
    optimizer.zero_grad(set_to_none=True)
    if options.gradients is not None:
        loss = options.gradients(model, batch, context)
    else:
        with context.autocast():
            loss = options.loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
    if recipe.clip_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
    optimizer.step()
    return loss.detach()


def _make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    head = set(map(id, last_layer(model).parameters()))
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_bias = name.endswith("bias") and recipe.bias_lr_factor != 1
        factor = recipe.bias_lr_factor if is_bias else 1.0
        if recipe.head_lr_factor != 1 and id(parameter) in head:
            factor = recipe.head_lr_factor
        groups.setdefault((factor, 0.0 if is_bias else recipe.weight_decay), []).append(parameter)
    parameters = [{"params": p, "factor": factor, "weight_decay": decay} for (factor, decay), p in groups.items()]
    if recipe.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=recipe.lr, fused=True)
    momentum, nesterov = recipe.momentum, recipe.nesterov and recipe.momentum > 0
    return torch.optim.SGD(parameters, lr=recipe.lr, momentum=momentum, nesterov=nesterov, fused=True)


def _set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["factor"]


def _set_train_mode(model: nn.Module, freeze_batchnorm: bool) -> None:
    model.train()
    if freeze_batchnorm:
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()


def move(model: nn.Module, device: torch.device) -> nn.Module:
    """`model` on `device`, in the channels-last layout."""
    return model.to(device).to(memory_format=torch.channels_last)


def _finite(loss: float, epoch: int) -> float:
    if not math.isfinite(loss):
        raise TrainingError(
            f"failed to train: the loss is not finite in epoch {epoch + 1}", "lower recipe.lr or set recipe.clip_norm"
        )
    return loss


def check_learned(history: History, num_classes: int) -> None:
    """Raise `TrainingError` if the last epoch's loss is no better than guessing, ln K."""
    chance, last = math.log(num_classes), history.losses[-1]
    if last > 0.98 * chance:
        raise TrainingError(
            f"failed to train: the loss stayed at chance level ({last:.3f}, ln {num_classes} is {chance:.3f})",
            "change recipe.lr, recipe.clip_norm or recipe.epochs",
        )


def last_layer(model: nn.Module) -> nn.Module:
    """The last convolution or linear layer in definition order: the one that makes the logits."""
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))]
    if not layers:
        raise TrainingError("the network has no convolution and no linear layer")
    return layers[-1]


def iterate_normalized(images: Tensor, pixels: Pixels, batch_size: int = INFERENCE_BATCH) -> Iterator[Tensor]:
    """`images` (N, C, H, W) uint8 in order, in normalised batches."""
    for chunk in torch.split(images, batch_size):
        yield pixels.normalize(chunk)


@torch.no_grad()
def predict_logits(model: nn.Module, images: Tensor, pixels: Pixels, context: Context) -> Tensor:
    """Logits (N, K) float32 of `images` (N, C, H, W) uint8, in order, in eval mode, in the precision of `context`."""
    model.eval()
    images = images.to(context.device)
    with context.autocast():
        logits = [model(batch).float() for batch in iterate_normalized(images, pixels)]
    return torch.cat(logits) if logits else torch.empty(0, device=context.device)
