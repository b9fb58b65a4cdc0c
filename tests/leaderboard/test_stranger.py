"""A stranger's package: its code is imported by `verify` with --run-code only."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any, NamedTuple

import pytest

from backdoor_bench_none.executors.local import Local
from backdoor_bench_none.leaderboard.pack import pack
from backdoor_bench_none.leaderboard.track import read_track
from backdoor_bench_none.leaderboard.verification import Finding, Verification
from backdoor_bench_none.registry.components import Registry

#: leaves a line in a file whenever it is imported, in whatever process
SOURCE = """
import os
from typing import ClassVar
from backdoor_bench_none.api import Defense, DefenseResult, Stage, hookimpl

with open({marker!r}, "a") as file:
    file.write(f"{{os.getpid()}}\\n")

class Sleeper(Defense):
    '''Trains as usual, for fewer epochs.'''

    stage: ClassVar[Stage] = Stage.IN_TRAINING

    def run(self, task, context):
        model = task.new_model()
        task.fit(model, context, epochs=4)
        return DefenseResult(model)

@hookimpl
def bbn_defenses():
    return {{"sleeper": Sleeper}}

@hookimpl
def bbn_modify_plan(cells):
    if "STRANGER_DROPS" in os.environ:
        cells[:] = [cell for cell in cells if cell.seed != 2]
"""
Verify = Callable[..., Verification]
Faults = Callable[[Verification], list[Finding]]


class Stranger(NamedTuple):
    folder: Path
    marker: Path
    packages: Path

    @property
    def processes(self) -> set[int]:
        """Those that imported the module."""
        return {int(line) for line in self.marker.read_text().split()} if self.marker.exists() else set()

    def install(self, version: str) -> None:
        """One distribution, of this version only."""
        for old in self.packages.glob("*.dist-info/METADATA"):
            old.write_text(f"Metadata-Version: 2.1\nName: bbn-sleeper\nVersion: {version}\n")

    def forget(self) -> None:
        """As a fresh process that never imported it."""
        sys.modules.pop("sleeper_module", None)
        self.marker.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory, track_folder: Path, in_this_process: Any) -> Iterator[Stranger]:
    """Installed, run on the track, and packed."""
    from backdoor_bench_none.cli.main import run_cli
    from backdoor_bench_none.leaderboard import track as tracks

    base = tmp_path_factory.mktemp("stranger")
    stranger = Stranger(base / "submission", base / "imported", base / "packages")
    info = stranger.packages / "bbn_sleeper-1.2.dist-info"
    info.mkdir(parents=True)
    (stranger.packages / "sleeper_module.py").write_text(dedent(SOURCE).format(marker=str(stranger.marker)))
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bbn-sleeper\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text("[backdoor_bench_none]\nsleeper = sleeper_module\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracks, "FOLDER", track_folder)
        patch.setattr(Local, "open", in_this_process)
        patch.chdir(base)
        patch.syspath_prepend(str(stranger.packages))
        track = read_track("tiny-v1")
        (base / "b.yaml").write_text(track.benchmark_text("sleeper"))
        assert run_cli(["run", "b.yaml", "--quiet", "-d", "sleeper"]) == 0
        pack(track, Registry.default(), base / "results", stranger.folder, defense="sleeper", params={})
    yield stranger
    stranger.forget()


@pytest.fixture(autouse=True)
def installed(stranger: Stranger, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Importable, and not yet imported."""
    stranger.install("1.2")
    monkeypatch.syspath_prepend(str(stranger.packages))
    stranger.forget()
    yield
    stranger.forget()


def test_the_marker_tells_of_an_import(stranger: Stranger) -> None:
    assert stranger.processes == set()
    assert "sleeper" in Registry.default().names("defense")
    assert stranger.processes == {os.getpid()}


def test_without_run_code_nothing_of_it_is_imported(stranger: Stranger, verify: Verify, faults: Faults) -> None:
    verification = verify(stranger.folder, sample=6)
    assert faults(verification) == []
    assert (verification.verdict, len(verification.reevaluated), verification.repeated) == ("reevaluated", 6, {})
    assert stranger.processes == set()
    assert "sleeper_module" not in sys.modules


def test_the_command_does_not_import_it_either(stranger: Stranger, bbn: Callable[..., Any]) -> None:
    said = bbn("leaderboard", "verify", stranger.folder, "--verifications", "found")
    assert said.code == 0
    assert "6 models evaluated again, 0 cells run again" in said.out
    assert "reevaluated; wrote" in said.out
    said = bbn("leaderboard", "build", stranger.folder)
    assert said.code == 0
    assert stranger.processes == set()


@pytest.mark.usefixtures("worker_processes")
def test_no_worker_imports_it_while_another_defense_is_run_again(
    stranger: Stranger, arena: Any, verify: Verify
) -> None:
    assert verify(arena.submissions / "no_defense", sample=2).verdict == "verified"
    assert stranger.processes == set()


@pytest.mark.usefixtures("worker_processes")
def test_with_run_code_it_is_run_again_in_processes_of_its_own(
    stranger: Stranger, verify: Verify, faults: Faults
) -> None:
    verification = verify(stranger.folder, sample=2, run_code=True)
    assert faults(verification) == []
    assert (verification.verdict, len(verification.reevaluated), len(verification.repeated)) == ("verified", 6, 2)
    assert stranger.processes > {os.getpid()}
    assert {verification.reevaluated[key] == counts for key, counts in verification.repeated.items()} == {True}


def test_another_version_of_it_is_not_run(stranger: Stranger, verify: Verify) -> None:
    stranger.install("1.3")
    verification = verify(stranger.folder, sample=6, run_code=True)
    assert (verification.verdict, verification.repeated) == ("reevaluated", {})
    (reason,) = [finding.message for finding in verification.findings if finding.check == "code"]
    assert "another package or version" in reason


def test_its_hooks_cannot_leave_cells_out(
    stranger: Stranger, verify: Verify, faults: Faults, monkeypatch: pytest.MonkeyPatch, forge_of: Callable[[Path], Any]
) -> None:
    monkeypatch.setenv("STRANGER_DROPS", "1")
    forged = forge_of(stranger.folder)
    for name in ("clean/s2", "badnets/s2"):
        forged.record_path(name).unlink()
        forged.weights_path(name).unlink()
    verification = verify(forged.seal(), run_code=True)
    assert [each.check for each in faults(verification)] == ["complete", "complete"]


def test_altered_weights_are_found_without_its_code(
    stranger: Stranger, verify: Verify, faults: Faults, forge_of: Callable[[Path], Any]
) -> None:
    forged = forge_of(stranger.folder)
    tensors = forged.tensors("badnets/s1")
    forged.edit_tensors("badnets/s1", **{name: x * -1 for name, x in tensors.items()})
    verification = verify(forged.seal())
    (fault,) = faults(verification)
    assert (fault.check, fault.cell) == ("numbers", "digits/badnets/sleeper/mlp/relu/s1")


@pytest.mark.parametrize("change", ["clean_fraction", "sees_ground_truth"])
def test_what_it_declares_agrees_with_parameters_and_records(
    change: str, stranger: Stranger, verify: Verify, faults: Faults, forge_of: Callable[[Path], Any]
) -> None:
    forged = forge_of(stranger.folder)
    forged.manifest[change] = {"clean_fraction": 0.1, "sees_ground_truth": True}[change]
    verification = verify(forged.seal())
    assert verification.verdict == "refused"
    assert {"record"} < {each.check for each in faults(verification)} | {"declarations"}


def test_a_package_that_calls_its_defense_as_ours_is_not_taken_for_ours(
    stranger: Stranger, verify: Verify, faults: Faults, forge: Callable[..., Any]
) -> None:
    forged = forge("no_defense")
    forged.manifest["source"] = {"distribution": "bbn-sleeper", "version": "1.2"}
    verification = verify(forged.seal(), sample=6)
    assert (verification.verdict, verification.repeated) == ("reevaluated", {})
