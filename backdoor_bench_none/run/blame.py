"""Whose component a failure may be due to: the packages of others are named with their versions."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from backdoor_bench_none.cell import AXES, Cell
from backdoor_bench_none.registry import Registry
from backdoor_bench_none.run.jobs import JobKind, Outcome

#: the components at work in a job
AT_WORK: Mapping[JobKind, tuple[str, ...]] = {
    "data": ("dataset",),
    "crafter": ("attack", "dataset"),
    "backbone": ("trainer", "architecture", "activation", "dataset"),
    "poison": ("attack",),
    "benign": ("architecture", "activation", "trainer"),
    "victim": ("attack", "architecture", "activation", "trainer"),
    "cell": AXES,
}


def name_suspects(cell: Cell, outcome: Outcome, registry: Registry) -> list[str]:
    """Those of the components at work that are not built in, with their providers; where a traceback shows the files
    of some, only these.
    """
    axes = AXES if outcome.kind is None else AT_WORK[outcome.kind]
    strangers = {axis: registry.entry(axis, getattr(cell, axis).name).provider for axis in axes}
    strangers = {axis: provider for axis, provider in strangers.items() if not provider.builtin}
    shown = [axis for axis in strangers if _file_of(cell, axis) in (outcome.traceback or "")]
    return [f"{axis} '{getattr(cell, axis).name}' of plugin {strangers[axis]}" for axis in shown or strangers]


def _file_of(cell: Cell, axis: str) -> str:
    module = sys.modules.get(type(getattr(cell, axis).component).__module__)
    return f'"{getattr(module, "__file__", "no file")}"'
