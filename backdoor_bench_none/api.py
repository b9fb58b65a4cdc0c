"""Everything the author of a plugin imports; `docs/api.md` documents it, and `API_VERSION` counts its changes.

`exports.py` declares where each name comes from. A name is imported when it is first used, and nothing else with it: a
module with hooks, which needs `hookimpl` alone, does not import torch, and one with a defense not torchvision.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
from functools import cache
from typing import TYPE_CHECKING, Any

from backdoor_bench_none.contracts.markers import hookimpl as hookimpl

if TYPE_CHECKING:
    from backdoor_bench_none.exports import *  # noqa: F403


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name == "__all__":
        return sorted(_sources())
    if name not in _sources():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, original = _sources()[name]
    value = getattr(importlib.import_module(module), original, None)
    if value is None:  # a module of a package
        value = importlib.import_module(f"{module}.{original}")
    globals()[name] = value
    return value


@cache
def _sources() -> dict[str, tuple[str, str]]:
    """The module of each name that `exports.py` imports and its name there, read without running it."""
    source = pkgutil.get_data("backdoor_bench_none", "exports.py")
    assert source is not None
    imports = [node for node in ast.parse(source).body if isinstance(node, ast.ImportFrom) and node.module]
    return {
        alias.asname or alias.name: (str(node.module), alias.name)
        for node in imports if node.module != "__future__"
        for alias in node.names
    }  # fmt: skip
