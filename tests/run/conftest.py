"""What can be got at from an object."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import pytest
from torch import Tensor


def reach(thing: object, seen: dict[int, object]) -> Iterator[object]:
    """Everything that hangs on `thing` by attributes, closures, bound methods and containers."""
    if id(thing) in seen or isinstance(thing, (str, bytes, int, float, type)):
        return
    seen[id(thing)] = thing
    yield thing
    if isinstance(thing, Tensor):
        return
    inner = [*thing.values()] if isinstance(thing, Mapping) else list(getattr(thing, "__dict__", {}).values())
    inner += thing if isinstance(thing, (list, tuple, set)) else []
    inner += [getattr(thing, name, None) for name in ("__self__", "__func__", "func", "args", "keywords")]
    inner += [cell.cell_contents for cell in getattr(thing, "__closure__", None) or ()]
    for each in inner:
        yield from reach(each, seen)


@pytest.fixture
def reachable() -> Callable[[object], list[object]]:
    """Lists everything that can be reached from an object."""
    return lambda thing: list(reach(thing, {}))
