"""Whatever lies in place of a record or an artifact: every verb names it and goes on, and a run makes it again."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from backdoor_bench_none.cli.main import run_cli
from backdoor_bench_none.results.files import DamagedRecordWarning, read_record_file
from backdoor_bench_none.results.store import Artifact, DamagedArtifactWarning, Store

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes and links as Unix has them")
VERBS = (["plan"], ["table"], ["table", "--all"], ["status"], ["report", "--output", "r.html"])


BENCHMARK = """\
version: 1
name: damage
matrix:
  dataset: {name: digits, params: {image_size: 8}, recipe: {epochs: 1}}
  attack: badnets
  defense: [no_defense, {name: none, params: {epochs: 1}}]
  architecture: {name: mlp, params: {hidden: 16, depth: 1}}
"""


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a benchmark of two cells and their results."""
    folder = tmp_path_factory.mktemp("good")
    (folder / "benchmark.yaml").write_text(BENCHMARK)
    with contextlib.chdir(folder):
        assert run_cli(["run", "-q"]) == 0
    return folder


@pytest.fixture
def results(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the results; the current folder has the benchmark too."""
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "results"


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """What waits for a pipe that nobody writes to is interrupted."""

    def interrupt(*_: object) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def replaced(path: Path, make: Callable[[Path], Any]) -> None:
    path.unlink()
    make(path)


def edited(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def without_counts(values: dict[str, Any]) -> None:
    values["counts"] = None
    del values["checksum"]


#: what happens to a file -> what is said of a record then
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "it is empty"),
    "half": (lambda path: path.write_bytes(path.read_bytes()[:300]), "it is not JSON"),
    "nested": (lambda path: path.write_text("[" * 100_000), "it is not JSON"),
    "bytes": (lambda path: path.write_bytes(b"\xff\xfe\0"), "it is not JSON"),
    "dangling": (lambda path: replaced(path, lambda p: p.symlink_to("/nowhere/x")), "a link to '/nowhere/x'"),
    "loop": (lambda path: replaced(path, lambda p: p.symlink_to(p.name)), "symbolic links"),
    "pipe": (lambda path: replaced(path, os.mkfifo), "no file but a pipe"),
    "folder": (lambda path: replaced(path, Path.mkdir), "no file but a folder"),
}
EDITS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a count": (lambda v: v["counts"]["benign_accuracy"].update(hits=1), "the checksum is another"),
    "a label": (lambda v: v["axes"]["defense"].update(label="mine"), "the checksum is another"),
    "a seed": (lambda v: v.update(seed=7), "the checksum is another"),
    "no counts": (without_counts, "it is done and has no counts"),
    "its key": (lambda v: (v.update(key="ab" * 8), v.pop("checksum")), "the record of another cell, abab"),
    "an axis": (lambda v: (v["axes"].pop("attack"), v.pop("checksum")), "it lacks attack"),
    "its version": (lambda v: (v.update(schema=9), v.pop("checksum")), "it is no record: schema"),
}


def check_record(path: Path, fault: str, bbn: Any) -> None:
    """Every verb names the record and goes on, `check` finds it, and a run makes it again."""
    before = json.loads((path.parent / "before").read_text()) if (path.parent / "before").exists() else None
    for verb in VERBS:
        with pytest.warns(DamagedRecordWarning, match=rf"{path.stem}.*counts as missing: .*{fault}"):
            assert bbn(*verb).code == 0
    said = bbn("results", "check")
    assert said.code == 1
    assert path.name in said.out
    assert fault in said.out
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DamagedRecordWarning)
        assert bbn("run").code == 0
    assert read_record_file(path).status == "done"
    assert before is None or json.loads(path.read_text())["counts"] == before["counts"]
    assert bbn("results", "check").code == 0


def a_record(results: Path) -> Path:
    path = sorted((results / "records").glob("*/*.json"))[0]
    (path.parent / "before").write_bytes(path.read_bytes())
    return path


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record(damage: str, results: Path, bbn: Any) -> None:
    path = a_record(results)
    DAMAGES[damage][0](path)
    check_record(path, DAMAGES[damage][1], bbn)


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_record(edit: str, results: Path, bbn: Any) -> None:
    path = a_record(results)
    edited(path, EDITS[edit][0])
    check_record(path, EDITS[edit][1], bbn)


def test_two_swapped_records(results: Path, bbn: Any) -> None:
    first, second = sorted((results / "records").glob("*/*.json"))
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    with pytest.warns(DamagedRecordWarning, match="the record of another cell"):
        said = bbn("status")
    assert "2 left" in said.out
    assert bbn("results", "check").out.count("the record of another cell") == 2


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("stage", ["victim", "data", "defense"])
def test_a_damaged_artifact(stage: str, damage: str, results: Path) -> None:
    """It is noticed when it is read, and a new one is written in its place."""
    store = Store(results)
    path = store.artifact_paths(stage)[0]
    key = path.name.partition(".")[0]
    loaded = store.load_artifact(stage, key)
    assert loaded is not None
    # copies: what is loaded lies in the file itself, which is about to be cut off
    kept = Artifact({name: tensor.clone() for name, tensor in loaded.tensors.items()}, loaded.meta)
    del loaded
    DAMAGES[damage][0](path)
    assert [each.path for each in store.find_damage()] == [path]
    with pytest.warns(DamagedArtifactWarning, match=f"{stage} {key}"):
        assert store.load_artifact(stage, key) is None
    store.save_artifact(stage, key, kept)
    assert store.load_artifact(stage, key) is not None
    assert list(store.find_damage()) == []


def test_repair_sets_aside_and_a_run_makes_it_again(results: Path, bbn: Any) -> None:
    record = sorted((results / "records").glob("*/*.json"))[0]
    artifact = Store(results).artifact_paths("defense")[0]
    record.write_text("{")
    artifact.write_bytes(b"")
    (record.parent / f".{record.name}.123").write_text("half")
    said = bbn("results", "check", "--repair")
    assert said.code == 0
    assert said.out.count("damaged") >= 3
    assert sorted(path.name for path in (results / "damaged").iterdir()) == sorted(
        [f"{record.name}.0", f"{artifact.name}.0", f".{record.name}.123.0"]
    )
    assert bbn("results", "check").out.splitlines()[-1] == "all intact"
    assert bbn("run").code == 0
    assert "2 done" in bbn("status").out


@pytest.mark.parametrize("what", ["index.sqlite", "locks", "records", "artifacts"])
@pytest.mark.parametrize("kind", ["pipe", "file", "folder"])
def test_something_else_in_place_of_a_part_of_the_folder(what: str, kind: str, results: Path, bbn: Any) -> None:
    """Verbs that read go on; a run either goes on or says what is in the way."""
    part = results / what
    part.rename(results / "before")
    {"pipe": os.mkfifo, "file": Path.touch, "folder": Path.mkdir}[kind](part)
    for verb in VERBS:
        said = bbn(*verb)
        assert said.code in (0, 2), (verb, said.err)
        assert "Traceback" not in said.err
    said = bbn("run", "-q")
    assert said.code in (0, 1, 2)
    assert "Traceback" not in said.err
