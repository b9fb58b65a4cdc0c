"""Names the third-party components that may have caused a failure, with the packages that provide them."""

from __future__ import annotations

import sys

from backdoor_bench_none.contracts.cell import AXES, Cell
from backdoor_bench_none.contracts.component import Choice, Component
from backdoor_bench_none.contracts.job import CELL, Outcome
from backdoor_bench_none.planning.stage_table import find_stage
from backdoor_bench_none.registry.components import Registry


def name_suspects(cell: Cell, outcome: Outcome, registry: Registry) -> list[str]:
    """The components at work that are not built in, with their providers.

    Where a traceback shows the files of some of them, only those are named.
    """
    at_work: tuple[str, ...] = AXES
    if outcome.kind is not None and outcome.kind != CELL:
        at_work = find_stage(outcome.kind).axes
    providers = {axis: registry.entry(axis, cell.choices[axis].name).provider for axis in at_work}
    third_party = {axis: provider for axis, provider in providers.items() if not provider.builtin}
    shown = [axis for axis in third_party if _file_of(cell.choices[axis]) in (outcome.traceback or "")]
    return [f"{axis} '{cell.choices[axis].name}' of plugin {third_party[axis]}" for axis in shown or third_party]


def _file_of(choice: Choice[Component]) -> str:
    """The source file of a component's class, as a traceback shows it."""
    module = sys.modules.get(type(choice.component).__module__)
    return f'"{getattr(module, "__file__", "no file")}"'
