"""The software and the machine behind a record."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from backdoor_bench_none.contracts.cell import Cell
from backdoor_bench_none.contracts.context import Context
from backdoor_bench_none.registry.components import Registry
from backdoor_bench_none.system import cpu_name

LIBRARIES = ("torch", "torchvision", "numpy", "scikit-learn", "opencv-python-headless")


def describe(cell: Cell, context: Context, registry: Registry) -> dict[str, Any]:
    """Versions, device, precision, threads, and the provider of each component of the cell."""
    cuda = torch.version.cuda if context.device.type == "cuda" else None
    precision = "float32" if context.amp is None else str(context.amp).removeprefix("torch.")
    facts = {
        "providers": name_providers(cell, registry),
        "python": platform.python_version(),
        "libraries": installed_libraries(),
        "device": device_name(context.device),
        "precision": precision,
        "threads": torch.get_num_threads(),
        "cuda": cuda,
        "deterministic": context.device.type == "cpu",
    }
    if cell.recipe_deviation:
        facts["recipe_deviation"] = cell.recipe_deviation
    return facts


def name_providers(cell: Cell, registry: Registry) -> dict[str, str]:
    """The distribution and version behind each component of the cell, by axis."""
    providers = {axis: registry.entry(axis, choice.name).provider for axis, choice in cell.choices.items()}
    return {axis: f"{provider.distribution} {provider.version}" for axis, provider in providers.items()}


def installed_libraries() -> dict[str, str]:
    """The versions of the installed libraries that results depend on."""
    versions = {name: installed_version(name) for name in LIBRARIES}
    return {name: known for name, known in versions.items() if known is not None}


def installed_version(distribution: str) -> str | None:
    """The installed version of a distribution; None if it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def device_name(device: torch.device) -> str:
    """The name of the GPU, or that of the CPU where the system reports it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_name()
