"""The contract kit: every built-in passes it, and its doors open for strangers."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from textwrap import dedent
from typing import Any, ClassVar

import pytest
import torch
from bbn_attacks.badnets import BadNets
from bbn_attacks.clean import Clean

from backdoor_bench_none.api import Component, Defense, DefenseResult, Stage
from backdoor_bench_none.contracts.kinds import BASES
from backdoor_bench_none.models.activations import ReLU
from backdoor_bench_none.models.mlp import MLP
from backdoor_bench_none.planning.stage_table import poison_key
from backdoor_bench_none.registry.components import Registry
from backdoor_bench_none.registry.plugins import Plugins
from backdoor_bench_none.testing import ArchitectureContract, parametrize_contracts, run_contract
from backdoor_bench_none.testing.bench import Bench
from backdoor_bench_none.testing.checks import run_check
from backdoor_bench_none.testing.contracts import open_bench

REGISTRY = Registry(Plugins(external=False))
#: where the defaults take long, others
QUICK: Mapping[str, Mapping[str, Any]] = {
    "label_consistent": {"steps": 5, "crafter": {"width": 0.125, "epochs": 2, "steps": 2}},
    "hidden_trigger": {"steps": 20},
    "natural": {"areas": [0.05], "epochs": 2, "max_candidates": 2},
    "dp_sgd": {"epochs": 1},
    "dba": {"malicious_epochs": 3},
    "trojannet": {"steps": 300},
}
#: the other data sets are files that are not on every machine
DATASETS = ("digits", "blobs")


def built_ins() -> Iterator[Component]:
    for kind in BASES:
        for name in REGISTRY.names(kind):
            if kind != "dataset" or name in DATASETS:
                yield REGISTRY.create(kind, name, QUICK.get(name))


@parametrize_contracts(built_ins())
def test_every_built_in_passes(contract: Callable[[], None]) -> None:
    contract()


# the doors

DOORS = """
import pytest
from bbn_attacks.badnets import BadNets
from bbn_attacks.clean import Clean
from backdoor_bench_none.api import TriggerAttack
from backdoor_bench_none.models.mlp import MLP
from backdoor_bench_none.planning.stage_table import poison_key
from backdoor_bench_none.testing import ArchitectureContract, AttackContract, DefenseContract, parametrize_contracts

class Unfinished(TriggerAttack):
    def trigger(self, info):
        return BadNets().trigger(info)

WHY = "it has no docstring"

class TestSubclass(AttackContract):
    attack = Unfinished()

class TestExpected(AttackContract):
    attack = Unfinished()
    expected_failures = {"documented": WHY}

class TestFixed(AttackContract):
    attack = BadNets()
    expected_failures = {"documented": WHY}

class TestArchitecture(ArchitectureContract):
    architecture = MLP(hidden=8)

class TestOwn(TestArchitecture):
    def test_more(self):
        assert self.architecture.hidden == 8

class Abstract(DefenseContract):
    pass

@parametrize_contracts([Unfinished(), Clean()])
def test_decorated(contract): contract()

@parametrize_contracts([Unfinished()], expected_failures={"documented": WHY})
def test_expected(contract): contract()

@parametrize_contracts([Clean()], expected_failures={"documented": WHY})
def test_fixed(contract): contract()

def test_fixtures(bbn_bench, bbn_device):
    assert (bbn_device, bbn_bench.device.type) == ("cpu", "cpu")
    assert len(bbn_bench.stages(attack=Clean()).defense_task().train) == 240
"""
#: tests that do not pass, with how they end; all others pass
ENDS = {
    "TestSubclass::test_contract[Unfinished-documented]": "FAILED",
    "TestExpected::test_contract[Unfinished-documented]": "XFAIL",
    "TestFixed::test_contract[BadNets-documented]": "FAILED",
    "test_decorated[Unfinished-documented]": "FAILED",
    "test_expected[Unfinished-documented]": "XFAIL",
    "test_fixed[Clean-documented]": "FAILED",
}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What pytest says of the file above, in a process of its own."""
    folder = tmp_path_factory.mktemp("doors")
    (folder / "test_mine.py").write_text(DOORS)
    command = [sys.executable, "-m", "pytest", "-vrxX", "-p", "no:cacheprovider", "-p", "no:xdist", "-Werror"]
    done = subprocess.run([*command, str(folder)], cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_doors_give_one_test_for_each_check(report: str) -> None:
    ends = dict(re.findall(r"^test_mine\.py::(\S+) (PASSED|FAILED|XFAIL|XPASS|ERROR)", report, re.MULTILINE))
    assert {name: end for name, end in ends.items() if end != "PASSED"} == ENDS
    for door in ("TestSubclass::test_contract[Unfinished", "test_decorated[Unfinished", "test_decorated[Clean"):
        assert {f"{door}-{check}]" for check in ("documented", "pickles", "deterministic", "labels")} <= set(ends)
    assert "TestOwn::test_more" in ends
    assert "TestOwn::test_contract[MLP-width]" in ends
    assert not [name for name in ends if name.startswith("Abstract")]


@pytest.mark.slow
def test_a_failed_check_says_what_to_mend(report: str) -> None:
    assert "Unfinished: documented: the class has no docstring; `bbn show` prints it" in report


@pytest.mark.slow
def test_what_was_expected_to_fail_and_passes_is_told(report: str) -> None:
    assert report.count("[XPASS(strict)] it has no docstring") == 2


def test_an_unknown_check_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"there is no check \['documentd'\]; there are documented, "):
        parametrize_contracts([Clean()], expected_failures={"documentd": "misspelt"})
    with pytest.raises(ValueError, match=r"there is no check \['stage'\]"):
        type("Wrong", (ArchitectureContract,), {"architecture": MLP(), "expected_failures": {"stage": "not its kind"}})


def test_what_is_no_component_is_refused_at_once() -> None:
    with pytest.raises(TypeError, match="str is not a component; subclass one of activation, architecture, attack"):
        parametrize_contracts(["badnets"])  # type: ignore[list-item]


def test_a_function_is_the_third_door() -> None:
    verdicts = {verdict.check: verdict.reason for verdict in run_contract(ReLU())}
    assert set(verdicts.values()) == {""}
    assert {"documented", "identity", "activation"} <= set(verdicts)


# what pytest loads everywhere


def test_the_pytest_plugin_imports_nothing_heavy(tmp_path: Path) -> None:
    code = """
    import sys
    import backdoor_bench_none.testing.pytest_plugin
    import backdoor_bench_none.testing
    print(sorted({"torch", "torchvision", "numpy", "pydantic", "scipy", "sklearn", "pluggy"} & set(sys.modules)))
    """
    command = [sys.executable, "-c", "import pytest\n" + dedent(code)]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True).stdout
    assert said.strip() == "['pluggy']"  # it is pytest's own


# the bench


class Same(BadNets):
    """Has the parameters of another."""


def test_a_class_that_is_defined_again_is_another(fault: Callable[[str, Component], str]) -> None:
    """As in a notebook, where the first attempt is mended and checked once more."""

    def define(count: int) -> type[Defense]:
        class Mine(Defense):
            """Counts."""

            stage: ClassVar[Stage] = Stage.IN_TRAINING

            def run(self, task: Any, context: Any) -> DefenseResult:
                scores = torch.zeros(count)
                return DefenseResult(task.new_model(), scores=scores)

            returns = ("scores",)

        return Mine

    assert "scores has shape (3,)" in fault("result_well_formed", define(3)())
    assert fault("result_well_formed", define(240)()) == ""


def test_two_attacks_with_equal_parameters_do_not_share_artifacts() -> None:
    bench = open_bench()
    keys = [poison_key(bench.cell(attack=attack)) for attack in (BadNets(target=0), Same(target=0), BadNets(target=0))]
    assert keys[0] == keys[2] != keys[1]


def test_a_check_puts_global_state_back() -> None:
    def meddle(component: object, bench: Bench) -> None:
        torch.set_grad_enabled(False)
        torch.manual_seed(123)
        raise RuntimeError("in the middle")

    before = torch.random.get_rng_state()
    verdict = run_check(meddle, Clean(), open_bench())
    assert verdict.reason == "RuntimeError: in the middle"
    assert torch.is_grad_enabled()
    assert torch.equal(torch.random.get_rng_state(), before)
