"""Crosses backdoor attacks and defenses, NONE among them, into comparison matrices people can trust.

What the author of a plugin needs is here, imported when it is first used: `from backdoor_bench_none import Defense,
hookimpl`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from backdoor_bench_none.contracts.markers import hookimpl

if TYPE_CHECKING:
    from backdoor_bench_none.api import *  # noqa: F403

__all__ = ["hookimpl"]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    api = importlib.import_module("backdoor_bench_none.api") if not name.startswith("_") else None
    if api is not None and name in api.__all__:
        return getattr(api, name)
    raise AttributeError(f"module 'backdoor_bench_none' has no attribute '{name}'")
