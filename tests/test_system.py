"""What an operating system does not offer is done without."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from backdoor_bench_none import system
from backdoor_bench_none.contracts.record import Record
from backdoor_bench_none.planning.plan import Plan
from backdoor_bench_none.planning.stage_table import record_key
from backdoor_bench_none.results.store import Store, UnlockedFolderWarning

#: hides modules and the folder /proc before anything is imported, as on Windows, and runs `bbn` once for each argument
ELSEWHERE = """
import builtins, os, pathlib, signal, sys
for name in ("fcntl", "resource"):
    sys.modules[name] = None  # an import raises ImportError
del os.sched_getaffinity
del signal.pthread_sigmask
import backdoor_bench_none.system as system
system.PROC = pathlib.Path("no such folder")
assert system.fcntl is None and system.resource is None
from backdoor_bench_none.cli.main import run_cli
sys.exit(max(run_cli(line.split()) for line in sys.argv[1:]))
"""


def elsewhere(folder: Path, *lines: str) -> str:
    """What `bbn` prints where these modules do not exist, called with each line in one process."""
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning", "-c", ELSEWHERE, *lines],
        cwd=folder, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_records_tables_and_reports_need_no_unix(
    tiny_plan: Callable[..., Plan], make_record: Callable[..., Record], tmp_path: Path
) -> None:
    record = make_record(record_key(tiny_plan(defense="none").cells[0]), ba=91, asr=7)
    Store(tmp_path / "results").write_record(record)
    shown = elsewhere(
        tmp_path,
        f"results show {record.key}",
        "table --results results --format markdown --all",
        "report --results results --output page.html",
    )
    assert record.key in shown
    assert "91.0" in shown.partition("cell")[2]
    assert record.key in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: Any, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(system, "fcntl", SimpleNamespace(flock=flock, LOCK_EX=2))
    store = Store(tmp_path / "results")
    with pytest.warns(UnlockedFolderWarning, match="one run is safe there, two at once are not"):
        store.create()
    with store.lock("poison", "ab"):  # goes on without
        pass


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO])
def test_other_faults_of_a_lock_are_raised(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: Any, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(system, "fcntl", SimpleNamespace(flock=flock, LOCK_EX=2))
    with (tmp_path / "file").open("w") as file, pytest.raises(OSError, match=os.strerror(code)):
        system.lock_file(file)


def test_no_facts_of_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "PROC", tmp_path)
    assert not system.reset_peak_memory()
    assert system.read_peak_memory() is None
    assert isinstance(system.cpu_name(), str)
    system.limit_memory(None)


def test_facts_of_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self/status").write_text("Name:\tx\nVmHWM:\t   12 kB\n")
    (tmp_path / "cpuinfo").write_text("processor : 0\nmodel name\t: A CPU\nflags\t: fpu amx_bf16 sse\n")
    monkeypatch.setattr(system, "PROC", tmp_path)
    system.cpu_has_bf16.cache_clear()
    try:
        assert system.reset_peak_memory()
        assert system.read_peak_memory() == 12 * 1024
        assert system.cpu_name() == "A CPU"
        assert system.cpu_has_bf16()
    finally:
        system.cpu_has_bf16.cache_clear()


def test_cores_are_counted_without_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert system.count_cores() == 1


def test_whether_mps_runs_is_seen_by_its_pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    assert system.describe_mps().startswith("does not run")
    (tmp_path / "control").touch()
    assert system.describe_mps().startswith("runs")
