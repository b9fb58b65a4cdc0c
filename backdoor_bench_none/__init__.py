"""Benchmark that crosses backdoor attacks with defenses, NONE among them, in reproducible comparison matrices.

The API for plugin authors is importable from this package, and loaded on first use: `from backdoor_bench_none import
Defense, hookimpl`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from backdoor_bench_none.contracts.markers import hookimpl

if TYPE_CHECKING:
    from backdoor_bench_none.api import *  # noqa: F403

__all__ = ["hookimpl"]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if not name.startswith("_"):
        api = importlib.import_module("backdoor_bench_none.api")
        if name in api.__all__:
            return getattr(api, name)
    raise AttributeError(f"module 'backdoor_bench_none' has no attribute '{name}'")
