"""What a record says of the software and the machine behind it."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from backdoor_bench_none.cell import AXES, Cell
from backdoor_bench_none.context import Context
from backdoor_bench_none.registry import Registry

LIBRARIES = ("torch", "torchvision", "numpy", "scikit-learn", "opencv-python-headless")


def describe(cell: Cell, context: Context, registry: Registry) -> dict[str, Any]:
    """Versions, device, precision, threads, and who provides each component of the cell."""
    return {
        "providers": name_providers(cell, registry),
        "python": platform.python_version(),
        "libraries": {name: found for name in LIBRARIES if (found := installed_version(name))},
        "device": device_name(context.device),
        "precision": "float32" if context.amp is None else str(context.amp).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if context.device.type == "cuda" else None,
        "deterministic": context.device.type == "cpu",
    }


def name_providers(cell: Cell, registry: Registry) -> dict[str, str]:
    """The distribution and version behind each component of the cell, by axis."""
    providers = {axis: registry.entry(axis, getattr(cell, axis).name).provider for axis in AXES}
    return {axis: f"{provider.distribution} {provider.version}" for axis, provider in providers.items()}


def installed_version(distribution: str) -> str | None:
    """The installed version of a distribution."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def device_name(device: torch.device) -> str:
    """The name of the GPU, or of the CPU as far as the system tells it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
