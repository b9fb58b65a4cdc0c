"""Input pixels, logits and output layers of networks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from backdoor_bench_none.contracts.context import Context
from backdoor_bench_none.contracts.dataset import DatasetInfo
from backdoor_bench_none.errors import TrainingError

if TYPE_CHECKING:
    from torch import Tensor

#: images per forward pass without gradients, up to 32x32 pixels
INFERENCE_BATCH = 512
#: the same for large images: maps of a VGG16 for 512 images of 224x224 would take 20 GB
LEAST_INFERENCE_BATCH = 32


@dataclass(frozen=True)
class Pixels:
    """Converts uint8 images to the input of networks.

    Images are scaled to 0..1 and normalised per channel; in training they are also cropped and flipped.
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
        flip_probability = 0.5 if self.flip else 0.0
        flipped = torch.rand(count, 1, generator=generator) < flip_probability
        return torch.cat([corners, flipped.long()], dim=1)

    def augment(self, images: Tensor, shifts: Tensor) -> Tensor:
        """Crop and flip `images` (N, C, H, W) uint8, padded with zeros, by `shifts` (N, 3) of `draw_shifts`."""
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


def move(model: nn.Module, device: torch.device) -> nn.Module:
    """`model` on `device`, in the channels-last layout."""
    return model.to(device).to(memory_format=torch.channels_last)


def inference_batch(images: Tensor) -> int:
    """How many of `images` (N, C, H, W) make a forward pass without gradients: 512 of 32x32 pixels, 32 at least."""
    fitting = INFERENCE_BATCH * 32 * 32 // (images.shape[-2] * images.shape[-1])
    return max(LEAST_INFERENCE_BATCH, min(fitting, INFERENCE_BATCH))


def iterate_normalized(images: Tensor, pixels: Pixels, batch_size: int | None = None) -> Iterator[Tensor]:
    """`images` (N, C, H, W) uint8 in order, in normalised batches; by default as large as fits any GPU."""
    for chunk in torch.split(images, batch_size or inference_batch(images)):
        yield pixels.normalize(chunk)


def predict_logits(model: nn.Module, images: Tensor, pixels: Pixels, context: Context) -> Tensor:
    """Logits (N, K) float32 of `images` (N, C, H, W) uint8, in order, in eval mode, in the precision of `context`."""
    model.eval()
    images = images.to(context.device)
    with torch.no_grad(), context.autocast():
        logits = [model(batch).float() for batch in iterate_normalized(images, pixels)]
    if not logits:
        return torch.empty(0, device=context.device)
    return torch.cat(logits)


def is_weighted(module: object) -> bool:
    """Whether a module is a layer with a weight matrix, one row for each output channel or feature."""
    return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear)


def unwrap(model: nn.Module) -> nn.Module:
    """The network inside `nn.DataParallel` and `torch.compile`, whose names of weights have a prefix."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def check_network(model: nn.Module, shape: tuple[int, int, int], num_classes: int) -> None:
    """Raise `TrainingError` unless a network can be trained and gives logits (N, K) for images (N, *shape), float32.

    It classifies two images in eval mode, and is left as it was.
    """
    for name, parameter in model.named_parameters():
        if isinstance(parameter, torch.nn.parameter.UninitializedParameter):
            raise TrainingError(f"its layer '{_owner(name)}' is lazy; give it its sizes, which `spec` has")
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise TrainingError(f"its layer '{_owner(name)}' is {parameter.dtype}; build it in float32")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise TrainingError("none of its parameters requires a gradient, so that nothing can be trained")
    modes = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            logits = model.eval()(torch.linspace(-1, 1, 2 * math.prod(shape), device=device).reshape(2, *shape))
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not isinstance(logits, torch.Tensor):
        raise TrainingError(
            f"it returns a {type(logits).__name__}; return the logits alone, a tensor (N, {num_classes})"
        )
    if logits.shape != (2, num_classes):
        raise TrainingError(f"it returns {tuple(logits.shape)} for 2 images, not logits (2, {num_classes})")


def _owner(parameter: str) -> str:
    """The module that has a parameter of this name."""
    return parameter.rpartition(".")[0] or "itself"


def find_logits_layer(model: nn.Module, example: Tensor) -> nn.Module:
    """The layer that makes the logits; of several, the one that ran last. See `find_logits_layers`."""
    return list(find_logits_layers(model, example).values())[-1]


def find_logits_layers(model: nn.Module, example: Tensor) -> dict[str, nn.Module]:
    """The layers whose output reaches the network's output through no other convolution or linear layer.

    They are returned by module name, in the order in which they ran on `example` (1, C, H, W), normalised. The search
    follows autograd's graph back from the output, through softmax, pooling and views, so that the order of definition
    does not matter. Where the graph is cut (a detached output), the result is the layer that ran last. The network is
    run once, in eval mode, and left unchanged. Raises `TrainingError` if it has no such layer.
    """
    calls: list[tuple[str, Any]] = []  # each call of a layer, with autograd's node of its output

    def watch(name: str) -> Any:  # noqa: ANN401
        return lambda module, inputs, output: calls.append((name, output.grad_fn))

    layers = {name: module for name, module in model.named_modules() if is_weighted(module)}
    handles = [module.register_forward_hook(watch(name)) for name, module in layers.items()]
    modes = {module: module.training for module in model.modules()}
    leaf = example.detach().clone().requires_grad_()
    try:
        with torch.enable_grad():
            output = model.eval()(leaf.clone())  # the network may change its input in place, which a leaf refuses
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    if not calls:
        raise TrainingError("the network has no convolution and no linear layer")
    nodes = {node for _, node in calls if node is not None}
    reached = _nodes_before_others(output if isinstance(output, torch.Tensor) else output[0], nodes)
    names = [name for name, node in calls if node in reached] or [calls[-1][0]]
    last_first = dict.fromkeys(reversed(names))  # a layer that ran twice stands where it ran last
    return {name: layers[name] for name in reversed(last_first)}


def logits_parameters(model: nn.Module, example: Tensor) -> list[nn.Parameter]:
    """The parameters of all layers that make the logits; see `find_logits_layers`."""
    return [parameter for layer in find_logits_layers(model, example).values() for parameter in layer.parameters()]


def _nodes_before_others(output: Tensor, stops: set[Any]) -> set[Any]:
    """The nodes of autograd's graph among `stops` that are reached first when going back from `output`."""
    reached, seen, waiting = set[Any](), set[Any](), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in stops:
            reached.add(node)
        else:
            waiting += [before for before, _ in node.next_functions]
    return reached
