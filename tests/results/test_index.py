"""The index says what the records say, follows them, and is never needed."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from random import Random

import pytest

from backdoor_bench_none.contracts.measures import Detection
from backdoor_bench_none.contracts.record import Record
from backdoor_bench_none.results import index
from backdoor_bench_none.results.files import read_record_file
from backdoor_bench_none.results.index import read_measurements
from backdoor_bench_none.results.measurement import COLUMNS, Measurement
from backdoor_bench_none.results.store import Store

MakeRecord = Callable[..., Record]


@pytest.fixture
def store(tmp_path: Path, make_record: MakeRecord) -> Store:
    """Three records: done with a detection, failed, done without a trigger."""
    store = Store(tmp_path)
    detection = Detection(
        true_positive=3, false_positive=10, true_negative=90, false_negative=1, auroc=0.5, tpr_at_1_fpr=0.25
    )
    store.write_record(make_record("aa" * 8, detection=detection, seconds={"victim": 2.0, "defense": 1.5}))
    store.write_record(make_record("ab" * 8, ba=None, status="failed", reason="it broke"))
    store.write_record(make_record("bb" * 8, asr=None, clean_fraction=0.05))
    return store


def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The record files that are opened from now on."""
    opened: list[Path] = []

    def noted(path: Path) -> Record:
        opened.append(path)
        return read_record_file(path)

    monkeypatch.setattr(index, "read_record_file", noted)
    return opened


def test_measurements_are_the_records(store: Store) -> None:
    expected = [Measurement.of(record) for record in store.records()]
    assert read_measurements(store.root) == expected
    assert read_measurements(store.root) == expected  # from the index
    done = expected[0]
    assert (done.ba_hits, done.ba_total, done.asr_hits, done.tpr_at_1_fpr) == (90, 100, 80, 0.25)
    assert (done.seconds, done.victim_seconds) == (1.5, 2.0)
    assert (expected[1].status, expected[1].reason, expected[1].ba_total) == ("failed", "it broke", None)
    assert (expected[2].asr_total, expected[2].clean_fraction) == (None, 0.05)


def test_rates_are_those_of_the_counts(store: Store) -> None:
    done, failed, clean = read_measurements(store.root)
    assert [done.rate(name) for name in ("ba", "asr", "ra")] == [0.9, 0.8, 0.8]
    assert failed.rate("ba") is None
    assert (clean.rate("ba"), clean.rate("asr")) == (0.9, None)


def test_records_are_read_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    read_measurements(store.root)
    opened = reads(monkeypatch)
    read_measurements(store.root)
    assert opened == []


def test_only_records_that_changed_are_read_again(
    store: Store, make_record: MakeRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_measurements(store.root)
    store.write_record(make_record("ab" * 8, ba=77))
    store.record_path("bb" * 8).unlink()
    store.write_record(make_record("cc" * 8, ba=66))
    opened = reads(monkeypatch)
    hits = {measured.key: measured.ba_hits for measured in read_measurements(store.root)}
    assert hits == {"aa" * 8: 90, "ab" * 8: 77, "cc" * 8: 66}
    assert sorted(path.stem for path in opened) == ["ab" * 8, "cc" * 8]


@pytest.mark.parametrize("damage", [b"", b"not a database", Random(0).randbytes(5000)], ids=["empty", "text", "noise"])
def test_a_damaged_index_does_not_matter(damage: bytes, store: Store) -> None:
    expected = read_measurements(store.root)
    (store.root / index.NAME).write_bytes(damage)
    assert read_measurements(store.root) == expected


def test_an_index_of_another_revision_is_made_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = read_measurements(store.root)
    monkeypatch.setattr(index, "REVISION", index.REVISION + 1)
    assert read_measurements(store.root) == expected


def test_a_folder_that_cannot_be_written(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [Measurement.of(record) for record in store.records()]

    def refuse(path: Path) -> sqlite3.Connection:
        raise sqlite3.OperationalError("unable to open database file")

    monkeypatch.setattr(index, "_open", refuse)
    assert read_measurements(store.root) == expected
    assert not (store.root / index.NAME).exists()


def test_a_record_that_cannot_be_read_counts_as_missing(store: Store) -> None:
    store.record_path("aa" * 8).write_text("{}")
    with pytest.warns(UserWarning, match="cannot be read and counts as missing"):
        measurements = read_measurements(store.root)
    assert [measured.key for measured in measurements] == ["ab" * 8, "bb" * 8]


def test_a_record_under_another_name_counts_as_missing(store: Store) -> None:
    other = store.record_path("ac" * 8)
    other.parent.mkdir()
    other.write_bytes(store.record_path("aa" * 8).read_bytes())
    with pytest.warns(UserWarning, match="the record of another cell, aaaaaaaaaaaaaaaa"):
        assert len(read_measurements(store.root)) == 3


def test_no_results(tmp_path: Path) -> None:
    assert read_measurements(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_temporary_files_of_the_store_are_no_records(store: Store) -> None:
    (store.record_path("aa" * 8).parent / ".half.json").write_text("{")
    assert len(read_measurements(store.root)) == 3


def test_columns_are_the_fields() -> None:
    assert tuple(field.name for field in fields(Measurement)) == COLUMNS


def test_the_index_is_a_plain_table(store: Store) -> None:
    read_measurements(store.root)
    with sqlite3.connect(store.root / index.NAME) as database:
        rows = database.execute("SELECT defense, ba_hits FROM records WHERE status = 'done' ORDER BY key").fetchall()
    assert rows == [("none", 90), ("none", 90)]


def test_a_table_of_all_records_needs_no_torch(store: Store) -> None:
    code = """
    import sys
    from backdoor_bench_none.cli.main import run_cli
    status = run_cli(["table", "--all", "--results", sys.argv[1], "--format", "json"])
    slow = {"torch", "torchvision", "sklearn", "matplotlib"} & set(sys.modules)
    sys.exit(f"imported {slow}" if slow else status)
    """
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(line[4:] for line in code.splitlines()), str(store.root)],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {row["status"] for row in json.loads(done.stdout)} == {"done", "failed"}
