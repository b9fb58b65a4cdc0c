"""Checks of what attacks and defenses return, before it is kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from backdoor_bench_none.contracts.dataset import ImageSet
from backdoor_bench_none.contracts.defense import DefenseResult
from backdoor_bench_none.seeds import canonical_json


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
        canonical_json(dict(result.extras))
    except (TypeError, ValueError) as error:
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


def check_loadable(model: nn.Module, expected: nn.Module, remedy: str) -> None:
    """Raise `TypeError` if the weights of `model` do not fit `expected`, the network that is evaluated."""
    try:
        expected.load_state_dict(model.state_dict())
    except RuntimeError as error:
        raise TypeError(f"the network is not of the cell's architecture; override {remedy}: {error}") from error
