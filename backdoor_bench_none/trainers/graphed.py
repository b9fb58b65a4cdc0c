"""Training steps as CUDA graphs: one launch makes a whole step, where hundreds would leave a GPU waiting."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import torch

if TYPE_CHECKING:
    from torch import Tensor

#: takes the indices (B,) of a batch and the shifts (B, 3) of its images, makes a step and returns its loss
Step: TypeAlias = "Callable[[Tensor, Tensor], Tensor]"
#: records what a function does on the GPU and returns a function that does it again; the results are the same tensors
Capture: TypeAlias = "Callable[[Callable[[], Tensor]], Callable[[], Tensor]]"

#: ordinary steps before the capture, in which cuDNN chooses its algorithms and the optimizer makes its state
WARM_UP = 3
#: a training of fewer steps is over before the capture has paid off
LEAST_STEPS = 50


class NotCapturedWarning(UserWarning):
    """A network's training step cannot be captured; its steps are launched one operation at a time."""


class GraphedStep:
    """A step that is captured after `WARM_UP` ordinary ones; batches of another size than `size` are ordinary steps.

    The learning rates of its optimizer must be tensors; see `use_tensor_rates`.
    """

    def __init__(self, step: Step, size: int, device: torch.device, capture: Capture | None = None) -> None:
        self._step = step
        self._capture = capture or capture_graph
        self._chosen = torch.zeros(size, dtype=torch.int64, device=device)
        self._shifts = torch.zeros(size, 3, dtype=torch.int64, device=device)
        self._count = 0
        self._replay: Callable[[], Tensor] | None = None

    def __call__(self, chosen: Tensor, shifts: Tensor) -> Tensor:
        """One step; its loss, which the next call overwrites."""
        if len(chosen) != len(self._chosen):
            return self._step(chosen, shifts)
        self._chosen.copy_(chosen)
        self._shifts.copy_(shifts)
        self._count += 1
        if self._count <= WARM_UP:
            return self._run()
        if self._replay is None:
            self._replay = self._captured()
        return self._replay()

    def _run(self) -> Tensor:
        return self._step(self._chosen, self._shifts)

    def _captured(self) -> Callable[[], Tensor]:
        try:
            return self._capture(self._run)
        except RuntimeError as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            message = f"the training step cannot be a CUDA graph, and is slower: {reason}"
            warnings.warn(message, NotCapturedWarning, stacklevel=2)
            return self._run


def capture_graph(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A function that launches what `step` launches, as one CUDA graph; capturing itself makes no step."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        loss = step()

    def replay() -> Tensor:
        graph.replay()
        return loss

    return replay


def use_tensor_rates(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Keep the learning rates on the device, where a captured step reads them."""
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(float(group["lr"]), device=device)
