"""Everything the author of a plugin imports; `docs/api.md` documents it, and `API_VERSION` counts its changes.

Names are imported when they are first used, so that a module with hooks, which needs `hookimpl` alone, does not import
torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from backdoor_bench_none.contracts.markers import hookimpl as hookimpl

if TYPE_CHECKING:
    from backdoor_bench_none.exports import *  # noqa: F403


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name.startswith("_") and name != "__all__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("backdoor_bench_none.exports"), name)
