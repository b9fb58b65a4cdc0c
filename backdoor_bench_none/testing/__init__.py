"""The contract kit for authors of plugins: what core relies on, as checks with three doors.

`class TestMine(DefenseContract): defense = Mine()`, or `@parametrize_contracts([Mine()])`, or `bbn check my-package`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from backdoor_bench_none.testing.contracts import (
        ArchitectureContract,
        AttackContract,
        Contract,
        DefenseContract,
        parametrize_contracts,
        run_contract,
    )

__all__ = [
    "ArchitectureContract",
    "AttackContract",
    "Contract",
    "DefenseContract",
    "parametrize_contracts",
    "run_contract",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name in __all__:  # lazily: pytest imports this package in every run, wherever it is installed
        return getattr(importlib.import_module("backdoor_bench_none.testing.contracts"), name)
    raise AttributeError(f"module 'backdoor_bench_none.testing' has no attribute '{name}'")
