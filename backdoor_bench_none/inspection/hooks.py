"""Reading the outputs of a network's modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias

import torch.nn as nn

if TYPE_CHECKING:
    from torch import Tensor

Hook: TypeAlias = "Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]"


@contextmanager
def record_outputs(
    model: nn.Module,
    modules: Mapping[str, str],
    reduce: Callable[[nn.Module, Tensor], Tensor] = lambda module, output: output,
) -> Iterator[dict[str, Tensor]]:
    """Yield a dictionary that every forward pass fills with the outputs of `modules`.

    Under each key of `modules` it holds `reduce` of that module and its output. Outputs are reduced inside the hook,
    before an activation in place overwrites them.
    """
    outputs: dict[str, Tensor] = {}
    known = dict(model.named_modules())
    if unknown := [name for name in modules.values() if name not in known]:
        raise ValueError(f"the network has no module {unknown}; it has: {', '.join(filter(None, known))}")

    def keep(key: str) -> Hook:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            outputs[key] = reduce(module, output)

        return hook

    handles = [known[name].register_forward_hook(keep(key)) for key, name in modules.items()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
