"""What attacks and defenses return is checked before it is kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from backdoor_bench_none.contracts.dataset import ImageSet
from backdoor_bench_none.contracts.defense import DefenseResult
from backdoor_bench_none.seeds import canonical_json


def check_result(result: DefenseResult, count: int) -> None:
    """Raise `TypeError` or `ValueError` if a defense returned something else than it may."""
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
        raise TypeError(f"extras hold something that JSON does not: {error}") from error


@contextmanager
def forbid_changes(**given: ImageSet | None) -> Iterator[None]:
    """Raise `TypeError` if the images or labels of a set, by name, were written to inside."""
    tensors = {
        f"{name}.{part}": getattr(data, part)
        for name, data in given.items()
        for part in ("images", "labels")
        if data is not None
    }
    before = {name: tensor._version for name, tensor in tensors.items()}
    yield
    changed = [name for name, tensor in tensors.items() if tensor._version != before[name]]
    if changed:
        raise TypeError(f"{' and '.join(changed)} changed in place; change a clone")


def check_loadable(model: nn.Module, expected: nn.Module, remedy: str) -> None:
    """Raise `TypeError` if core could not build the returned network again to evaluate it."""
    try:
        expected.load_state_dict(model.state_dict())
    except RuntimeError as error:
        raise TypeError(f"the network is not of the cell's architecture; override {remedy}: {error}") from error
