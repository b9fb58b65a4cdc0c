"""What a defense is given, and what can be got at from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import pytest
from bbn_defenses.no_defense import NoDefense
from torch import Tensor

from backdoor_bench_none.api import Context, DefenseResult, DefenseTask


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


@pytest.fixture
def given_tasks(monkeypatch: pytest.MonkeyPatch) -> list[DefenseTask]:
    """The tasks that `no_defense` is given from now on; it returns the victim, as it does anyway."""
    tasks: list[DefenseTask] = []

    def run(self: NoDefense, task: DefenseTask, context: Context) -> DefenseResult:
        tasks.append(task)
        return DefenseResult(task.victim())

    monkeypatch.setattr(NoDefense, "run", run)
    return tasks
