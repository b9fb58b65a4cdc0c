"""Makes the device of a process ready before anything is computed or measured on it."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def prepare_device(device: torch.device, memory: int | None = None) -> None:
    """Make a GPU the current one, bounded and started; on a CPU there is nothing to do.

    `memory` is how many bytes torch may allocate on the GPU; the CUDA context, some 500 MB, is not counted.
    """
    torch.backends.cudnn.benchmark = device.type == "cuda"  # all batches have one size, so the search pays off
    if device.type != "cuda":
        return
    if device.index is not None:
        torch.cuda.set_device(device)  # for code that says "cuda" where it should take the context's device
    torch.backends.cudnn.allow_tf32 = False  # or convolutions in float32 would round to 10 bits, and linear layers not
    if memory is not None:
        total = torch.cuda.mem_get_info(device)[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory / total), device.index)
    _start(device)


def _start(device: torch.device) -> None:
    """Load what the first operations load, which takes seconds and would be charged to the first stage."""
    images = torch.ones(1, 1, 2, 2, device=device)
    F.conv2d(images, images @ images)
    torch.cuda.synchronize(device)
