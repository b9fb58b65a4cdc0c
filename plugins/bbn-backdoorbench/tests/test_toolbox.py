"""BackdoorBench's defenses in our matrix, on a stand-in checkout that speaks its files."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from standins import Said

from backdoor_bench_none.api import BenchError, DeadlineError, Record, Store

Bbn = Callable[..., Said]
Write = Callable[..., Path]
Evaluate = Callable[..., dict[str, Record]]
FT = '{name: "backdoorbench:ft", params: {options: {epochs: 50}}, as: ft}'


@pytest.fixture
def path(write_record: Write, write_benchmark: Write) -> Path:
    """A benchmark of the toolbox's ft on a record."""
    return write_benchmark(write_record(), defense=FT)


def files(home: Path) -> set[str]:
    return {str(path.relative_to(home)) for path in home.rglob("*")}


@pytest.mark.slow
def test_its_network_is_evaluated_by_us(checkout: Callable[..., Path], path: Path, tmp_path: Path) -> None:
    """With the real console, and the environment as a user sets it."""
    home = checkout()
    before = files(home)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "COLUMNS": "250"}
    code = "import sys; from backdoor_bench_none.cli.main import run_cli; sys.exit(run_cli(sys.argv[1:]))"
    command = [sys.executable, "-c", f"if __name__ == '__main__':\n    {code.replace('; ', chr(10) + '    ')}", "run"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ft was told which samples are poisoned" in done.stdout
    (ft,) = Store(tmp_path / "results").records()
    assert ft.counts is not None
    assert ft.clean_fraction == 0.05
    # the stand-in gives every image its last class
    assert ft.counts.benign_accuracy.hits == 3
    assert ft.counts.attack_success_rate is not None
    assert ft.counts.attack_success_rate.hits == 0
    assert files(home) == before  # nothing is written into the user's checkout


def test_no_trace_is_left_behind(
    checkout: Callable[..., Path], path: Path, evaluate: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    checkout()
    assert evaluate(path)["ft"].status == "done"
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize(
    ("ending", "reason"),
    [
        ("dies", r"defense/ft\.py ended with code 1: .*a line before \| the loss is nan"),
        ("writes nothing", r"defense/ft\.py ended without writing defense_result\.pt"),
        ("wrong weights", r"defense_result\.pt' do not fit the network .*: features\.0\.weight is absent"),
        ("malice", r"defense_result\.pt' is not unpickled: .*print"),
    ],
)
def test_a_script_that_fails(
    ending: str, reason: str, checkout: Callable[..., Path], path: Path, evaluate: Evaluate
) -> None:
    checkout(ending)
    with pytest.raises(BenchError, match=reason):
        evaluate(path)


#: a script, and a child that writes on for as long as it lives
HANGS = """
import os, subprocess, sys, time
beat = "import os, time\\nwhile True:\\n open(os.environ['HEARTBEAT'], 'a').write('x'); time.sleep(0.05)"
subprocess.Popen([sys.executable, "-S", "-c", beat])
open(os.environ["HEARTBEAT"] + ".pid", "w").write(str(os.getpid()))
time.sleep(600)
"""


def test_a_script_that_hangs_is_ended_with_its_children(
    checkout: Callable[..., Path], path: Path, evaluate: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beats = tmp_path / "heartbeat"
    monkeypatch.setenv("HEARTBEAT", str(beats))
    (checkout() / "defense" / "ft.py").write_text(HANGS)
    with pytest.raises(DeadlineError):
        evaluate(path, seconds=6)
    process = int((tmp_path / "heartbeat.pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
    count = beats.stat().st_size
    assert count > 0
    time.sleep(0.5)
    assert beats.stat().st_size == count


def test_modules_of_the_checkout_are_imported_without_a_trace(
    checkout: Callable[..., Path], path: Path, evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    home = checkout()
    (home / "utils" / "helper.py").write_text("answer = 42\n")
    script = home / "defense" / "ft.py"
    script.write_text("import sys; sys.path.append('./')\nfrom utils.helper import answer\n" + script.read_text())
    before = files(home)
    assert evaluate(path)["ft"].status == "done"
    assert files(home) == before


def test_an_interpreter_that_is_not_there_is_named(
    checkout: Callable[..., Path], path: Path, evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout()
    monkeypatch.setenv("BBN_BACKDOORBENCH_PYTHON", "/nowhere/python")
    with pytest.raises(BenchError, match="'/nowhere/python' cannot be started: No such file"):
        evaluate(path)


@pytest.mark.parametrize("script", ["abl", "ac", "spectral", "bnp", "ep", "mcr"])
def test_a_script_that_reads_the_training_set_needs_a_training_set(
    script: str, write_record: Write, write_benchmark: Write, evaluate: Evaluate
) -> None:
    record = write_record(lambda raw: raw.update(bd_train=None))
    skipped = evaluate(write_benchmark(record, defense=f'{{name: "backdoorbench:{script}", as: script}}'))["script"]
    assert skipped.status == "skipped"
    assert skipped.reason == "the record has no training set (bd_train is empty), which this defense needs"


def test_a_script_that_repairs_a_network_needs_none(
    checkout: Callable[..., Path], write_record: Write, write_benchmark: Write, evaluate: Evaluate
) -> None:
    """It is given the clean images, as the toolbox's are."""
    checkout()
    record = write_record(lambda raw: raw.update(bd_train=None))
    assert evaluate(write_benchmark(record, defense=FT))["ft"].status == "done"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("unset", "BBN_BACKDOORBENCH_HOME is not set"),
        ("nothing there", r"is not a checkout of BackdoorBench: defense/ft\.py is not there"),
        ("no yaml", r"the checkout has no config/defense/ft/cifar10\.yaml"),
    ],
)
def test_a_checkout_that_is_none(
    damage: str,
    reason: str,
    checkout: Callable[..., Path],
    path: Path,
    evaluate: Evaluate,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    home = checkout()
    if damage == "unset":
        monkeypatch.delenv("BBN_BACKDOORBENCH_HOME")
    elif damage == "nothing there":
        monkeypatch.setenv("BBN_BACKDOORBENCH_HOME", str(home / "nowhere"))
    else:
        (home / "config" / "defense" / "ft" / "cifar10.yaml").unlink()
    with pytest.raises(BenchError, match=reason):
        evaluate(path)


def test_a_temporary_folder_that_the_toolbox_would_mistake_for_its_records(
    checkout: Callable[..., Path], path: Path, evaluate: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout()
    (tmp_path / "recordings").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "recordings"))
    with pytest.raises(BenchError, match="cannot work below"):
        evaluate(path)
