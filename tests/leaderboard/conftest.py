"""A tiny track, run and packed once, and what it takes to forge a submission of it."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from backdoor_bench_none.cli.main import run_cli
from backdoor_bench_none.contracts.context import Context
from backdoor_bench_none.contracts.executor import Event, Group
from backdoor_bench_none.contracts.job import Settings
from backdoor_bench_none.executors.local import Local
from backdoor_bench_none.leaderboard import track as tracks
from backdoor_bench_none.leaderboard.pack import pack
from backdoor_bench_none.leaderboard.submission import open_submission
from backdoor_bench_none.leaderboard.verification import Finding, Verification
from backdoor_bench_none.leaderboard.verify import Verifier
from backdoor_bench_none.planning.plan import Plan
from backdoor_bench_none.registry import plugins
from backdoor_bench_none.registry.components import Registry
from backdoor_bench_none.registry.plugins import Plugins
from backdoor_bench_none.run.jobs import run_job
from backdoor_bench_none.run.progress import Lines

REAL_TRACKS = tracks.FOLDER
REAL_POOL = Local.open
TINY = """\
track: tiny-v1
title: Tiny digits
rules: |
  Any defense.
highest_clean_fraction: 0.2
benchmark:
  version: 1
  name: tiny-v1
  seeds: [0, 1, 2]
  matrix:
    dataset: [{name: digits, params: {image_size: 8}, recipe: {epochs: 8}}]
    attack: [clean, {name: badnets, params: {trigger_kind: corner, poison_rate: 0.1}}]
    defense: [no_defense]
    architecture: [{name: mlp, params: {hidden: 16, depth: 1}}]
"""
PARAMS: Mapping[str, dict[str, Any]] = {
    "no_defense": {},
    "none": {"epochs": 1},
    "fine_tune": {"epochs": 4, "clean_fraction": 0.1},
}


@dataclass(frozen=True)
class Arena:
    """The results of all defenses in `PARAMS` on the track, and a submission of each in submissions/NAME."""

    folder: Path

    @property
    def results(self) -> Path:
        return self.folder / "results"

    @property
    def submissions(self) -> Path:
        return self.folder / "submissions"

    def plan(self, defense: str, **params: Any) -> Plan:
        """The cells of a defense, with other parameters if some are given."""
        registry = Registry(Plugins(external=False))
        return tracks.read_track("tiny-v1").plan(registry, defense, {**PARAMS[defense], **params})


class ThisProcess:
    """A pool that does each job at once in this process: what is forged is the same, and nothing has to start."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.events: list[Event] = []

    def has_room(self, group: Group) -> bool:
        return not self.events

    def submit(self, group: Group) -> None:
        (job,) = group
        outcome = run_job(job, self.settings, "cpu", 1, lambda done, total: None)
        self.events.append(Event(job.id, outcome=outcome))

    def wait(self, timeout: float) -> list[Event]:
        events, self.events = self.events, []
        return events


@contextmanager
def open_in_this_process(executor: Local, settings: Settings) -> Iterator[ThisProcess]:
    yield ThisProcess(settings)


class Forgery:
    """A copy of a submission, edited by somebody who knows how it is checked; cells are named as 'badnets/s0'."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest: dict[str, Any] = json.loads((folder / "submission.json").read_text())
        self.keys = {}
        for path in sorted((folder / "records").iterdir()):
            record = json.loads(path.read_text())
            self.keys[f"{record['axes']['attack']['label']}/s{record['seed']}"] = path.stem

    def record_path(self, cell: str) -> Path:
        return self.folder / "records" / f"{self.keys[cell]}.json"

    def weights_path(self, cell: str) -> Path:
        return self.folder / "weights" / f"{self.keys[cell]}.safetensors"

    def record(self, cell: str) -> dict[str, Any]:
        record: dict[str, Any] = json.loads(self.record_path(cell).read_text())
        return record

    def write_record(self, cell: str, record: object) -> None:
        self.record_path(cell).write_text(json.dumps(record))

    def tensors(self, cell: str) -> dict[str, Tensor]:
        return load_file(self.weights_path(cell))

    def edit_tensors(self, cell: str, **changes: Tensor | None) -> None:
        """Replace tensors, or leave out those that are None."""
        tensors = {name: x for name, x in {**self.tensors(cell), **changes}.items() if x is not None}
        save_file(tensors, self.weights_path(cell))

    def seal(self) -> Path:
        """List all files with their hashes, as if they had been packed."""
        parts = sorted(path for part in ("records", "weights") for path in (self.folder / part).iterdir())
        hashes = {str(p.relative_to(self.folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in parts}
        self.manifest["files"] = hashes
        (self.folder / "submission.json").write_text(json.dumps(self.manifest))
        return self.folder


Forge = Callable[..., Forgery]
Verify = Callable[..., Verification]


@pytest.fixture(scope="session")
def track_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tracks")
    (folder / "tiny-v1.yaml").write_text(TINY)
    return folder


@pytest.fixture(autouse=True)
def tiny_track(track_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The tiny track is the only one, in an empty current folder; jobs are done in this process; and this is a
    release, also from a checkout.
    """
    monkeypatch.setattr(tracks, "FOLDER", track_folder)
    monkeypatch.setattr(Local, "open", open_in_this_process)
    monkeypatch.setattr(plugins, "own_version", lambda: "0.1.0")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def real_tracks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracks, "FOLDER", REAL_TRACKS)


@pytest.fixture(scope="session")
def in_this_process() -> Callable[..., Any]:
    """The way to open such a pool, for fixtures that outlive a test."""
    return open_in_this_process


@pytest.fixture
def worker_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs are done in processes of their own, as usual."""
    monkeypatch.setattr(Local, "open", REAL_POOL)


@pytest.fixture(scope="session")
def arena(track_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Arena:
    arena = Arena(tmp_path_factory.mktemp("arena"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracks, "FOLDER", track_folder)
        patch.setattr(Local, "open", open_in_this_process)
        patch.setattr(plugins, "own_version", lambda: "0.1.0")
        patch.chdir(arena.folder)
        track = tracks.read_track("tiny-v1")
        entries = ", ".join(f"{{name: {name}, params: {json.dumps(params)}}}" for name, params in PARAMS.items())
        text = track.benchmark_text().replace("defense: [no_defense]", f"defense: [{entries}]")
        Path("benchmark.yaml").write_text(text)
        assert run_cli(["run", "--quiet"]) == 0
        for name, params in PARAMS.items():
            about: dict[str, Any] = {
                "claims": {"asr": 0.5},
                "authors": "A. Author",
                "paper": "",
                "code": "https://example.org/code",
            }
            about |= {"defense": name, "params": params}
            pack(track, Registry.default(), arena.results, arena.submissions / name, **about)
    return arena


@pytest.fixture(scope="session")
def forgery() -> type[Forgery]:
    """`Forgery`, for fixtures that outlive a test."""
    return Forgery


@pytest.fixture
def forge_of(tmp_path: Path) -> Callable[..., Forgery]:
    """Makes a `Forgery` of a submission."""

    def copy(folder: Path, to: str = "forged") -> Forgery:
        shutil.copytree(folder, tmp_path / to)
        return Forgery(tmp_path / to)

    return copy


@pytest.fixture
def forge(arena: Arena, forge_of: Callable[..., Forgery]) -> Forge:
    """Makes a `Forgery` of the submission of a defense of ours."""
    return lambda name="fine_tune", to="forged": forge_of(arena.submissions / name, to)


@pytest.fixture
def verify(tmp_path: Path) -> Verify:
    """Verifies a submission; `sample` cells are run again, none by default."""

    def run(path: Path, sample: int = 0, seed: int = 0, run_code: bool = False) -> Verification:
        lines = Lines(Console(file=io.StringIO()))
        with open_submission(path) as folder:
            context = Context(torch.device("cpu"), 0)
            return Verifier(folder, tmp_path / "work", context, run_code, sample, seed, lines).verify()

    return run


@pytest.fixture
def faults() -> Callable[[Verification], list[Finding]]:
    """The findings that do not hold."""
    return lambda verification: [finding for finding in verification.findings if not finding.ok]


@pytest.fixture
def tree() -> Callable[[Path], dict[str, str]]:
    """All files below a folder, links unfollowed, with hashes."""

    def look(folder: Path) -> dict[str, str]:
        return {
            str(path.relative_to(folder)): "link"
            if path.is_symlink()
            else hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*"))
            if path.is_symlink() or path.is_file()
        }

    return look
