"""The pytest plugin: an option and two fixtures.

pytest loads it wherever this package is installed, so it imports nothing heavy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from backdoor_bench_none.testing.bench import Bench


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --bbn-device."""
    group = parser.getgroup("backdoor-bench-none")
    group.addoption("--bbn-device", default="cpu", help="where contract checks run: cpu (default), cuda or cuda:N")


@pytest.fixture(scope="session")
def bbn_device(request: pytest.FixtureRequest) -> str:
    """The device given by --bbn-device."""
    return str(request.config.getoption("--bbn-device"))


@pytest.fixture(scope="session")
def bbn_bench(bbn_device: str) -> Bench:
    """A bench with tiny data, which runs a component in core's stages: `bbn_bench.stages(defense=Mine())`."""
    from backdoor_bench_none.testing.contracts import open_bench

    return open_bench(bbn_device)
