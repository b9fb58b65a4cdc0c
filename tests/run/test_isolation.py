"""What a component leaves changed in its process does not reach the evaluation, and a word is said about it."""

from __future__ import annotations

import gc
import os
import random
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from backdoor_bench_none.api import Attack, Context, Defense, DefenseResult, DefenseTask, Stage
from backdoor_bench_none.contracts.record import Record
from backdoor_bench_none.run.isolation import STATES
from backdoor_bench_none.testing.bench import Bench, Patch

#: what a component does -> what is said to have changed
CHANGES: dict[str, tuple[Callable[[], Any], str]] = {
    "chdir": (lambda: os.chdir("/"), "the working directory"),
    "a removed directory": (lambda: (os.mkdir("x"), os.chdir("x"), os.rmdir("../x")), "the working directory"),
    "environment": (lambda: os.environ.update(OMP_NUM_THREADS="7", NEW="1"), "environment variables"),
    "an environment without PATH": (lambda: os.environ.pop("PATH"), "environment variables"),
    "dtype": (lambda: torch.set_default_dtype(torch.float64), "the default dtype"),
    "half": (lambda: torch.set_default_dtype(torch.float16), "the default dtype"),
    "device": (lambda: torch.set_default_device("meta"), "the default device"),
    "deterministic": (lambda: torch.use_deterministic_algorithms(True), "deterministic algorithms"),
    "no mkldnn": (lambda: torch.backends.mkldnn.set_flags(False), "switches of torch.backends"),  # type: ignore[no-untyped-call]
    "precision": (lambda: torch.set_float32_matmul_precision("medium"), "float32 precision"),
    "autocast": (lambda: torch.set_autocast_enabled("cpu", True), "autocast"),
    "no gradients": (lambda: torch.set_grad_enabled(False), "gradients"),
    "threads": (lambda: torch.set_num_threads(torch.get_num_threads() + 1), "the number of threads"),
    "a hook of all networks": (
        lambda: register_module_forward_hook(lambda module, given, made: -made), "hooks of all networks"
    ),
    "numpy": (lambda: np.seterr(all="raise"), "NumPy's handling of errors"),
    "gc": (gc.disable, "garbage collection"),
    "recursion": (lambda: sys.setrecursionlimit(sys.getrecursionlimit() + 50), "the recursion limit"),
    "warnings": (lambda: warnings.simplefilter("ignore"), "warning filters"),
    "signals": (lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN), "signal handlers"),
    "stdout": (lambda: setattr(sys, "stdout", None), "standard output"),
}  # fmt: skip


class Leaves(Defense):
    """Returns the victim, and leaves something changed."""

    stage: ClassVar[Stage] = Stage.POST_TRAINING
    starts_from_victim: ClassVar[bool] = True
    change: ClassVar[Callable[[], Any]]

    def run(self, task: DefenseTask, context: Context) -> DefenseResult:
        model = task.victim()
        type(self).change()
        return DefenseResult(model)


def leaving(change: Callable[[], Any]) -> Leaves:
    kind: type[Leaves] = type("Leaving", (Leaves,), {"__module__": __name__, "change": staticmethod(change)})
    return kind()


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench()


@pytest.fixture(scope="module")
def expected(bench: Bench) -> Record:
    """The record of a defense that returns the victim and leaves nothing changed."""
    return bench.stages(defense=leaving(int)).evaluate()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", CHANGES)
def test_nothing_of_it_reaches_the_evaluation(name: str, bench: Bench, here: Path, expected: Record) -> None:
    change, said = CHANGES[name]
    before = [state.read() for state in STATES if not state.silent]
    record = bench.stages(defense=leaving(change)).evaluate()
    assert (record.counts, record.outcomes) == (expected.counts, expected.outcomes)
    assert record.warnings == [f"the defense left changed, and it was put back: {said}"]
    assert [state.read() for state in STATES if not state.silent] == before


def test_random_numbers_go_on_as_before(bench: Bench) -> None:
    stages = bench.stages(defense=leaving(lambda: (random.seed(1), np.random.seed(1), torch.manual_seed(1))))
    stages.victim()
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index]
    assert stages.evaluate().warnings == []
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # type: ignore[index]


def test_it_is_put_back_after_an_error_too(bench: Bench, here: Path) -> None:
    def fail() -> None:
        torch.set_default_dtype(torch.float64)
        raise ValueError("it broke")

    with pytest.raises(ValueError, match="it broke"):
        bench.stages(defense=leaving(fail)).defense()
    assert torch.get_default_dtype() == torch.float32


def test_inference_mode_cannot_be_left_for_it(bench: Bench) -> None:
    mode = torch.inference_mode()
    try:
        with pytest.raises(RuntimeError, match=r"entered torch\.inference_mode and did not leave it"):
            bench.stages(defense=leaving(mode.__enter__)).defense()
    finally:
        mode.__exit__(None, None, None)


class Rude(Patch):
    """An attack that changes the default dtype."""

    def attack_test(self, task: Any, context: Context) -> Any:
        made = super().attack_test(task, context)
        torch.set_default_dtype(torch.float64)
        return made


def test_attacks_leave_nothing_either(bench: Bench) -> None:
    assert issubclass(Rude, Attack)
    expected = bench.stages(attack=Patch()).evaluate()
    record = bench.stages(attack=Rude()).evaluate()
    assert record.counts == expected.counts
    assert "the attack left changed, and it was put back: the default dtype" in record.warnings


def test_a_network_in_train_mode_is_evaluated_in_eval_mode(bench: Bench, expected: Record) -> None:
    class Training(Leaves):
        """Returns the victim in train mode."""

        def run(self, task: DefenseTask, context: Context) -> DefenseResult:
            model = task.victim().train()
            assert isinstance(model, nn.Module)
            return DefenseResult(model)

    assert bench.stages(defense=Training()).evaluate().counts == expected.counts
