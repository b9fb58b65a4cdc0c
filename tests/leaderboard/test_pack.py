"""What goes into a submission, and what is refused before there is one."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from backdoor_bench_none.cli.init import text_from
from backdoor_bench_none.contracts.measures import Count, Counts
from backdoor_bench_none.contracts.record import Record
from backdoor_bench_none.leaderboard.submission import open_submission, read_submission
from backdoor_bench_none.leaderboard.track import read_track, track_names
from backdoor_bench_none.planning.plan import make_plan, plan_config
from backdoor_bench_none.planning.reading import parse_config
from backdoor_bench_none.planning.stage_table import defense_key, record_key
from backdoor_bench_none.registry import plugins
from backdoor_bench_none.registry.components import Registry
from backdoor_bench_none.registry.plugins import Plugins
from backdoor_bench_none.results.store import Store

Bbn = Callable[..., Any]
Tree = Callable[[Path], dict[str, str]]
COUNTS = Counts(benign_accuracy=Count(hits=1, total=2), attack_success_rate=None, robust_accuracy=None)
FINE_TUNE = ("-d", "fine_tune", "-p", "epochs=4", "-p", "clean_fraction=0.1", "--track", "tiny-v1")


@pytest.fixture
def results(arena: Any, tmp_path: Path) -> Path:
    """A copy of the results, to be harmed."""
    shutil.copytree(arena.results, tmp_path / "results")
    return tmp_path / "results"


@pytest.fixture
def pack(bbn: Bbn, results: Path, tmp_path: Path) -> Callable[..., Any]:
    """`bbn leaderboard pack` of fine_tune into the folder `mine`."""
    return lambda *more: bbn("leaderboard", "pack", *FINE_TUNE, "--output", "mine", *more)


def refused(said: Any, message: str, hint: str = "") -> None:
    """A user's fault, told without a traceback, and nothing was written."""
    assert said.code == 2
    assert "Traceback" not in said.err
    assert re.search(f"^error: .*{message}", said.err, re.MULTILINE), said.err
    assert re.search(f"^hint: .*{hint}", said.err, re.MULTILINE) or not hint, said.err
    assert [path.name for path in Path().iterdir() if "mine" in path.name] == []


def test_a_submission_is_whole(arena: Any, pack: Callable[..., Any], tmp_path: Path) -> None:
    said = pack("--authors", "Ä. Author", "--paper", "https://example.org", "--claim", "asr=0.5", "--claim", "ba=1")
    assert said.code == 0
    assert said.out == "wrote mine: fine_tune (backdoor-bench-none 0.1.0), 6 cells of tiny-v1\n"
    plan = arena.plan("fine_tune")
    submission, records = read_submission(tmp_path / "mine")
    assert set(records) == {record_key(cell) for cell in plan.cells}
    parts = {
        f"{part}/{key}.{end}" for key in records for part, end in (("records", "json"), ("weights", "safetensors"))
    }
    there = {str(path.relative_to("mine")) for path in Path("mine").rglob("*") if path.is_file()}
    assert there == {"submission.json", *parts}
    hashes = {name: hashlib.sha256((tmp_path / "mine" / name).read_bytes()).hexdigest() for name in parts}
    assert submission.files == hashes
    assert submission.claims == {"asr": 0.5, "ba": 1.0}
    assert (submission.authors, submission.paper, submission.code) == ("Ä. Author", "https://example.org", "")
    assert (submission.source.distribution, submission.source.version) == ("backdoor-bench-none", "0.1.0")
    assert (submission.track, submission.track_sha256) == ("tiny-v1", read_track("tiny-v1").sha256)
    assert (submission.stage, submission.clean_fraction, submission.sees_ground_truth) == ("post_training", 0.1, False)
    assert submission.defense.params == {"clean_fraction": 0.1, "epochs": 4, "batch_size": 64, "lr": None}


@pytest.mark.parametrize("defense", ["none", "fine_tune"])
def test_weights_are_the_tensors_of_the_stage_and_nothing_else(defense: str, arena: Any) -> None:
    store, folder = Store(arena.results), arena.submissions / defense
    for cell in arena.plan(defense).cells:
        artifact = store.load_artifact("defense", defense_key(cell))
        assert artifact is not None
        path = folder / "weights" / f"{record_key(cell)}.safetensors"
        packed = load_file(path)
        assert set(packed) == set(artifact.tensors)
        assert all(packed[name].equal(tensor) for name, tensor in artifact.tensors.items())
        assert any(name == "flagged" for name in packed) == (defense == "none")
        with safe_open(path, framework="pt") as file:
            assert not file.metadata()
        assert Record.model_validate_json(
            (folder / "records" / f"{record_key(cell)}.json").read_text()
        ) == store.read_record(record_key(cell))


def test_an_archive_holds_the_same_as_a_folder(pack: Callable[..., Any], bbn: Bbn, tmp_path: Path, tree: Tree) -> None:
    assert pack().code == 0
    assert bbn("leaderboard", "pack", *FINE_TUNE, "--output", "new/mine-0.1.zip").code == 0
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["mine-0.1.zip"]
    with open_submission(tmp_path / "new" / "mine-0.1.zip") as folder:
        assert tree(folder) == tree(tmp_path / "mine")
        assert read_submission(folder) == read_submission(tmp_path / "mine")
    assert not folder.exists()


def test_labels_are_the_tracks_whatever_the_benchmark_file_called_the_cell(
    arena: Any, pack: Callable[..., Any], results: Path, tmp_path: Path
) -> None:
    store, cell = Store(results), arena.plan("fine_tune").cells[0]
    record = store.read_record(record_key(cell))
    assert record is not None
    axes = {name: value.model_copy(update={"label": f"my {name}"}) for name, value in record.axes.items()}
    store.write_record(record.model_copy(update={"axes": axes, "title": "mine"}))
    assert pack().code == 0
    assert read_submission(tmp_path / "mine")[1][record_key(cell)] == record


def test_missing_cells_are_counted_and_named(arena: Any, pack: Callable[..., Any], results: Path) -> None:
    cells = arena.plan("fine_tune").cells
    for cell in cells[1:3]:
        Store(results).record_path(record_key(cell)).unlink()
    title = re.escape(cells[1].title)
    refused(pack(), f"2 of 6 cells of the track are missing, the first is {title}: not run yet", "bbn init.*bbn run")


def test_a_failed_cell_is_missing(arena: Any, pack: Callable[..., Any], results: Path) -> None:
    cell = arena.plan("fine_tune").cells[0]
    Store(results).write_record(Record.of(cell, record_key(cell), "failed", reason="it broke"))
    refused(pack(), f"1 of 6 cells .* {re.escape(cell.title)}: failed")


def test_vanished_and_damaged_weights(arena: Any, pack: Callable[..., Any], results: Path) -> None:
    store, cell = Store(results), arena.plan("fine_tune").cells[3]
    path = store.find_artifact("defense", defense_key(cell))
    assert path is not None
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="is damaged"):
        refused(pack(), f"{re.escape(cell.title)}: its weights are damaged")
    refused(pack(), f"1 of 6 cells .* {re.escape(cell.title)}: its weights are no longer there")


def test_too_much_clean_data(bbn: Bbn, arena: Any, results: Path) -> None:
    for cell in arena.plan("fine_tune", clean_fraction=0.25).cells:
        record = Record.of(cell, record_key(cell), "done", counts=COUNTS)
        Store(results).write_record(record)
        path = results / "artifacts" / "defense" / defense_key(cell)[:2] / f"{defense_key(cell)}.0.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    options = [word.replace("0.1", "0.25") for word in FINE_TUNE]
    message = "fine_tune asks for 0.25 of the training set as clean data; tiny-v1 allows 0.2"
    refused(bbn("leaderboard", "pack", *options, "--output", "mine"), message)


def test_a_defense_of_a_bbnfile_cannot_be_installed_by_others(bbn: Bbn, tmp_path: Path) -> None:
    (tmp_path / "bbnfile.py").write_text(
        "from backdoor_bench_none.api import hookimpl\nfrom bbn_defenses.no_defense import NoDefense\n"
        "class Mine(NoDefense):\n    pass\n"
        "@hookimpl\ndef bbn_defenses():\n    return {'mine': Mine}\n"
    )
    said = bbn("leaderboard", "pack", "-d", "mine", "--track", "tiny-v1", "--output", "mine")
    refused(said, "'mine' comes from .*bbnfile.*, which others cannot install", "bbn new defense")


def test_a_checkout_is_no_release(pack: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "own_version", lambda: "0+checkout")
    refused(pack(), r"backdoor-bench-none 0\+checkout\), which others cannot install")


@pytest.mark.parametrize("name", ["mine", "mine.zip"])
def test_what_is_there_is_not_overwritten(name: str, pack: Callable[..., Any], tmp_path: Path, tree: Tree) -> None:
    path = tmp_path / name
    if name == "mine":
        path.mkdir()
        path /= "thesis.tex"
    path.write_text("years of work")
    before = tree(tmp_path)
    said = pack("--output", name)
    assert (said.code, said.err.splitlines()[0]) == (2, f"error: '{name}' exists already")
    assert tree(tmp_path) == before


CLAIMS = ["asr=1.5", "asr=-0.1", "asr=.nan", "asr=two", "asr=true", "asr=[0.1]", "speed=1"]


@pytest.mark.parametrize("claim", CLAIMS)
def test_claims_are_shares_of_known_metrics(claim: str, pack: Callable[..., Any]) -> None:
    refused(pack("--claim", claim), f"--claim {claim.split('=')[0]}=", "ba, asr, ra, der, as a fraction of 1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--authors", "A" * 501), "authors: .*at most 500 characters"),
        (("--code", "a\nb"), "code: .*control characters"),
        (("--track", "tiny-v2"), "there is no track 'tiny-v2'"),
        (("-d", "fine_tone"), "unknown defense 'fine_tone'"),
        (("-p", "epochs=zero"), "epochs"),
        (("--claim", "asr"), "'asr' is not NAME=VALUE"),
    ],
)
def test_faults_of_the_command_line(options: tuple[str, ...], message: str, pack: Callable[..., Any]) -> None:
    refused(pack(*options), message)


# the tracks that are shipped


@pytest.mark.usefixtures("real_tracks")
def test_the_tracks_are_listed_with_their_rules(bbn: Bbn) -> None:
    assert track_names() == ["cifar10-v1", "digits-v1"]
    said = bbn("leaderboard", "tracks")
    assert said.code == 0
    for name in track_names():
        track = read_track(name)
        assert f"{name}: {track.title}\n" in said.out
        assert all(f"  {rule}\n" in said.out for rule in track.rules.splitlines())


@pytest.mark.usefixtures("real_tracks")
@pytest.mark.parametrize("defense", [None, "none"])
def test_digits_plans(defense: str | None) -> None:
    """3 attacks x 2 architectures x 3 seeds."""
    cells = read_track("digits-v1").plan(Registry(Plugins(external=False)), defense).cells
    assert len({record_key(cell) for cell in cells}) == 18
    assert {cell.defense.name for cell in cells} == {defense or "no_defense"}


@pytest.mark.usefixtures("real_tracks")
@pytest.mark.parametrize(("name", "cells"), [("digits-v1", 18), ("cifar10-v1", 63)])
def test_every_track_is_a_benchmark_without_faults(name: str, cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """CIFAR-10 need not be on this machine."""
    monkeypatch.setenv("BBN_DATA", "nowhere")
    track = read_track(name)
    assert track.name == name
    config, source = parse_config(track.benchmark_text(), "track.yaml")
    plan = plan_config(config, source, Registry(Plugins(external=False)), need_data=False)
    assert len(plan.cells) == cells
    assert len({(cell.attack.label, cell.architecture.label, cell.seed) for cell in plan.cells}) == cells
    assert config.seeds == [0, 1, 2]
    assert config.budget.cell_timeout is not None


@pytest.mark.usefixtures("real_tracks")
def test_init_writes_the_benchmark_of_a_track(bbn: Bbn, tmp_path: Path) -> None:
    """With a defense added as its first line says, its cells are those of the track."""
    assert bbn("init", "track.yaml", "--from", "digits-v1").code == 0
    text = (tmp_path / "track.yaml").read_text()
    assert text == text_from("digits-v1")
    track, registry = read_track("digits-v1"), Registry(Plugins(external=False))
    assert all(f"# - {rule}\n" in text for rule in track.rules.splitlines())
    assert yaml.safe_load(text) == track.benchmark
    (tmp_path / "track.yaml").write_text(text.replace("defense: [no_defense]", "defense: [no_defense, none, nad]"))
    keys = {record_key(cell): cell.defense.name for cell in make_plan(tmp_path / "track.yaml", registry).cells}
    assert len(keys) == 54
    for defense in ("no_defense", "none", "nad"):
        assert {record_key(cell) for cell in track.plan(registry, defense).cells} == {
            key for key, name in keys.items() if name == defense
        }


@pytest.mark.usefixtures("real_tracks")
def test_init_knows_no_other_track(bbn: Bbn) -> None:
    refused(bbn("init", "x.yaml", "--from", "digits-v2"), "'digits-v2'", "digits-v1")
