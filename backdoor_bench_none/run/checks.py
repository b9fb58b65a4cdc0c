"""Checks of what data sets, attacks and defenses return, before it is kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from backdoor_bench_none.contracts.attack import PoisonedSamples
from backdoor_bench_none.contracts.context import Context
from backdoor_bench_none.contracts.dataset import DatasetInfo, ImageSet
from backdoor_bench_none.contracts.defense import DefenseResult
from backdoor_bench_none.contracts.network import Pixels, move, predict_logits
from backdoor_bench_none.seeds import canonical_json

#: the largest difference between two computations of equal logits, in their range: tensor cores round to 10 bits
ROUNDING = 0.01
NOT_FINITE = "the network's logits are not all finite: it has diverged; lower its learning rate, or clip its gradients"


def check_result(result: DefenseResult, count: int) -> None:
    """Raise `TypeError` or `ValueError` if a defense's result for `count` training samples is not valid."""
    if not isinstance(result, DefenseResult):
        raise TypeError(f"a defense returns a DefenseResult, not {type(result).__name__}")
    if not isinstance(result.model, nn.Module):
        raise TypeError(f"model is {type(result.model).__name__}, not a torch.nn.Module")
    for name, tensor in (("flagged", result.flagged), ("scores", result.scores)):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is {type(tensor).__name__}, not a tensor")
        if tensor.shape != (count,):
            shape = tuple(tensor.shape)
            raise ValueError(f"{name} has shape {shape}, not one value for each of the {count} training samples")
    if result.flagged is not None and result.flagged.dtype != torch.bool:
        raise TypeError(f"flagged is {result.flagged.dtype}, not bool")
    if result.scores is not None and not bool(torch.isfinite(result.scores).all()):
        raise ValueError("scores are not all finite")
    try:
        canonical_json(dict(result.extras)).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"extras hold a value that JSON cannot hold: {error}") from error


@contextmanager
def forbid_changes(**sets: ImageSet | None) -> Iterator[None]:
    """Raise `TypeError` if the images or labels of one of these sets are changed in place inside."""
    tensors: dict[str, Tensor] = {}
    for name, data in sets.items():
        if data is not None:
            tensors |= {f"{name}.images": data.images, f"{name}.labels": data.labels}
    # torch counts writes into a tensor; comparing the counts costs nothing, unlike comparing copies of the data
    before = {name: tensor._version for name, tensor in tensors.items()}
    yield
    changed = [name for name, tensor in tensors.items() if tensor._version != before[name]]
    if changed:
        raise TypeError(f"{' and '.join(changed)} changed in place; change a clone")


def check_dataset(train: ImageSet, test: ImageSet, info: DatasetInfo) -> None:
    """Raise `TypeError` or `ValueError` if a data set does not hold what its `info` says."""
    if len(train) != info.train_size:
        raise ValueError(f"load: there are {len(train)} training images, info says {info.train_size}")
    for name, part in (("training", train), ("test", test)):
        if not len(part):
            raise ValueError(f"load: there are no {name} images")
        check_images(part.images, (len(part), *info.shape), f"load: {name}")
        _check_whole_numbers(part.labels, len(part), info.num_classes, f"load: {name}.labels")


def check_samples(samples: PoisonedSamples, count: int, info: DatasetInfo, name: str) -> None:
    """Raise `TypeError` or `ValueError` if what an attack's method `name` returned for `count` samples is wrong."""
    if not isinstance(samples, PoisonedSamples):
        raise TypeError(f"{name} returned {type(samples).__name__}, not PoisonedSamples")
    size = len(samples.indices)
    _check_whole_numbers(samples.indices, size, count, f"{name}.indices")
    _check_whole_numbers(samples.labels, size, info.num_classes, f"{name}.labels")
    check_images(samples.images, (size, *info.shape), name)
    if len(torch.unique(samples.indices)) != size:
        raise ValueError(f"{name}.indices names a sample twice")
    if samples.decoys is not None and (samples.decoys.dtype != torch.bool or samples.decoys.shape != (size,)):
        raise TypeError(f"{name}.decoys is not ({size},) bool")


def check_images(images: Tensor, shape: tuple[int, ...], what: str) -> None:
    """Raise `TypeError` or `ValueError` unless `images` are a uint8 tensor of this shape on the CPU."""
    if not isinstance(images, Tensor):
        raise TypeError(f"{what}.images is {type(images).__name__}, not a tensor")
    if images.dtype != torch.uint8:
        raise TypeError(f"{what}.images is {images.dtype}, not uint8 in 0..255")
    if tuple(images.shape) != shape:
        raise ValueError(f"{what}.images has shape {tuple(images.shape)}, not {shape}")
    if images.device.type != "cpu":
        raise ValueError(f"{what}.images is on {images.device}, not on the CPU")


def _check_whole_numbers(values: Tensor, count: int, end: int, what: str) -> None:
    """`values` are (count,) int64 from 0 to `end` - 1, on the CPU."""
    if not isinstance(values, Tensor) or values.dtype != torch.int64:
        raise TypeError(f"{what} is {getattr(values, 'dtype', type(values).__name__)}, not int64")
    if values.device.type != "cpu":
        raise ValueError(f"{what} is on {values.device}, not on the CPU")
    if tuple(values.shape) != (count,):
        raise ValueError(f"{what} has shape {tuple(values.shape)}, not ({count},)")
    if bool(((values < 0) | (values >= end)).any()):
        raise ValueError(f"{what} is not within 0 to {end - 1}")


def check_loadable(model: nn.Module, expected: nn.Module, remedy: str) -> None:
    """Raise `TypeError` if the weights of `model` do not fit `expected`, the network that is evaluated."""
    try:
        expected.load_state_dict(model.state_dict())
    except RuntimeError as error:
        raise TypeError(f"the network is not of the cell's architecture; override {remedy}: {error}") from error


def is_same_network(first: nn.Module, second: nn.Module, images: Tensor, pixels: Pixels, context: Context) -> bool:
    """Whether two networks have the same weights where both have them, and the same logits for `images`."""
    weights, others = first.state_dict(), second.state_dict()
    shared = weights.keys() & others.keys()
    if not all(torch.equal(weights[name].cpu(), others[name].cpu()) for name in shared):
        return False
    one, other = (predict_logits(move(each, context.device), images, pixels, context) for each in (first, second))
    return torch.equal(one, other)


def check_rebuilt(
    model: nn.Module, rebuilt: nn.Module, images: Tensor, pixels: Pixels, context: Context, remedy: str
) -> None:
    """Raise `TypeError` unless `rebuilt`, the network that is evaluated, computes what `model` does, in eval mode.

    The weights of `model` are loaded into it. Hooks, a replaced `forward`, another activation, and state that is no
    parameter and no buffer are lost then. `images` (N, C, H, W) uint8 are classified by both, in float32; logits may
    differ by `ROUNDING` of their range. `ValueError` if they are not finite.
    """
    for name, weights in model.state_dict().items():
        if weights.is_floating_point() and weights.dtype != torch.float32:
            raise TypeError(f"the network's {name} is {weights.dtype}; return the network in float32, by model.float()")
    check_loadable(model, rebuilt, remedy)
    single = replace(context, amp=None)
    given, made = (predict_logits(move(each, context.device), images, pixels, single) for each in (model, rebuilt))
    if not bool(torch.isfinite(given).all()):
        raise ValueError(NOT_FINITE)
    scale = (given.max() - given.min()).clamp(min=torch.finfo(given.dtype).tiny)
    if given.shape != made.shape or bool((given - made).abs().max() > ROUNDING * scale):
        differing = float((given.argmax(1) != made.argmax(1)).double().mean())
        raise TypeError(
            f"the network computes something else once its weights are loaded into a new one: {differing:.0%} of "
            f"{len(images)} predictions differ; hooks, a replaced forward and state outside state_dict are lost, so "
            f"make them parts of the network that {remedy} returns"
        )
