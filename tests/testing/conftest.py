"""One check of the kit, carried out on one component."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from backdoor_bench_none.api import Component
from backdoor_bench_none.testing.checks import name_of, run_check
from backdoor_bench_none.testing.contracts import checks_for, open_bench


@pytest.fixture
def fault() -> Callable[[str, Component], str]:
    """What the check of that name says of a component; "" if it passes."""

    def run(name: str, component: Component) -> str:
        check = {name_of(check): check for check in checks_for(component)}[name]
        return run_check(check, component, open_bench()).reason

    return run
