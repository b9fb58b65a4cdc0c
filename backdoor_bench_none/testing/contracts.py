"""Three ways to run the checks: a test class, a decorator, and a function that `bbn check` calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from typing import Any, ClassVar

from backdoor_bench_none.contracts.component import Component
from backdoor_bench_none.contracts.kinds import BASES
from backdoor_bench_none.testing.attack_checks import ATTACK_CHECKS
from backdoor_bench_none.testing.bench import Bench
from backdoor_bench_none.testing.checks import COMPONENT_CHECKS, Check, Verdict, name_of, run_check
from backdoor_bench_none.testing.defense_checks import DEFENSE_CHECKS
from backdoor_bench_none.testing.network_checks import checks_of_kind

#: check -> the reason why it is expected to fail
ExpectedFailures = Mapping[str, str]


@cache
def open_bench(device: str = "cpu") -> Bench:
    """The bench of this process, which computes once what several checks need."""
    return Bench(device)


def kind_of(component: Component) -> str:
    """The kind of a component: `attack`, `defense`, ...; `TypeError` if it is not a component."""
    for kind, base in BASES.items():
        if isinstance(component, base):
            return kind
    raise TypeError(f"{type(component).__name__} is not a component; subclass one of {', '.join(sorted(BASES))}")


def checks_for(component: Component) -> tuple[Check, ...]:
    """All checks of a component."""
    kind = kind_of(component)
    own = {"attack": ATTACK_CHECKS, "defense": DEFENSE_CHECKS}.get(kind) or tuple(checks_of_kind(kind))
    return (*COMPONENT_CHECKS, *own)


def run_contract(component: Component, device: str = "cpu") -> Iterator[Verdict]:
    """Run all checks of `component`, one by one."""
    for check in checks_for(component):
        yield run_check(check, component, open_bench(device))


def parametrize_contracts(
    components: Iterable[Component], *, expected_failures: ExpectedFailures | None = None
) -> Callable[[Any], Any]:
    """Decorates a test that takes `contract` and calls it: `def test_mine(contract): contract()`.

    There is one test for each component and check. `expected_failures` maps a check, as `deadline`, to the reason why
    it fails; the test fails if such a check passes.
    """
    import pytest

    expected = dict(expected_failures or {})
    params = []
    checks: list[tuple[Component, str, Check]] = []
    for component in components:
        checks += [(component, name_of(check), check) for check in checks_for(component)]
    if unknown := set(expected) - {name for _, name, _ in checks}:
        known = ", ".join(dict.fromkeys(name for _, name, _ in checks))
        raise ValueError(f"expected_failures: there is no check {sorted(unknown)}; there are {known}")
    for component, name, check in checks:
        marks = []
        if name in expected:
            marks.append(pytest.mark.xfail(reason=expected[name], strict=True))
        test_id = f"{type(component).__name__}-{name}"
        params.append(pytest.param(_Contract(check, component), id=test_id, marks=marks))
    return pytest.mark.parametrize("contract", params)


class _Contract:
    """One check of one component, to be called by a test."""

    def __init__(self, check: Check, component: Component) -> None:
        self._check, self._component = check, component

    def __call__(self, device: str = "cpu") -> None:
        import pytest

        verdict = run_check(self._check, self._component, open_bench(device))
        if verdict.skipped:
            pytest.skip(verdict.skipped)
        if verdict.reason:
            raise AssertionError(f"{type(self._component).__name__}: {verdict.check}: {verdict.reason}")


class Contract:
    """Base of test classes: a subclass names a component and gets one test for each check."""

    component: ClassVar[Component]
    expected_failures: ClassVar[ExpectedFailures] = {}
    #: the attribute in which a subclass names its component
    _attribute: ClassVar[str] = "component"

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        component = cls.__dict__.get(cls._attribute)
        if component is not None:

            def test_contract(self: Contract, contract: _Contract, bbn_device: str) -> None:
                contract(bbn_device)  # one function for each class, since pytest stores marks on it

            decorate = parametrize_contracts([component], expected_failures=cls.expected_failures)
            cls.test_contract = decorate(test_contract)  # type: ignore[attr-defined]


class AttackContract(Contract):
    """The tests of an attack: `class TestMine(AttackContract): attack = Mine(...)`."""

    _attribute = "attack"


class DefenseContract(Contract):
    """The tests of a defense: `class TestMine(DefenseContract): defense = Mine(...)`."""

    _attribute = "defense"


class ArchitectureContract(Contract):
    """The tests of an architecture: `class TestMine(ArchitectureContract): architecture = Mine(...)`."""

    _attribute = "architecture"
