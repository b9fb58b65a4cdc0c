"""The contract tests for authors of plugins: checks of everything that core relies on.

There are three ways to run them: `class TestMine(DefenseContract): defense = Mine()`,
`@parametrize_contracts([Mine()])`, and `bbn check my-package`.
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
    if name in __all__:  # imported on use: pytest loads this package in every run where it is installed
        return getattr(importlib.import_module("backdoor_bench_none.testing.contracts"), name)
    raise AttributeError(f"module 'backdoor_bench_none.testing' has no attribute '{name}'")
