"""The results folder: never half a file, whatever happens; damage is noticed; locks are the kernel's."""

from __future__ import annotations

import errno
import os
import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from backdoor_bench_none.contracts.record import Record
from backdoor_bench_none.errors import BenchError, StoreError
from backdoor_bench_none.results.store import Artifact, DamagedArtifactWarning, Store

MakeRecord = Callable[..., Record]
KEYS = ("aa00000000000000", "aa11111111111111", "bb00000000000000")
PATIENCE = 30.0


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "results")


def files(store: Store) -> list[str]:
    return sorted(path.name for path in store.root.rglob("*") if path.is_file())


def weights(value: float = 1.0) -> Artifact:
    return Artifact({"x": torch.full((5000,), value)}, {"note": "kept"})


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing more than `size` bytes into a file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# writing


def test_a_record_is_read_as_it_was_written(store: Store, make_record: MakeRecord) -> None:
    record = make_record()
    store.write_record(record)
    assert store.read_record(record.key) == record
    assert files(store) == [f"{record.key}.json"]


def test_an_artifact_is_read_as_it_was_written(store: Store) -> None:
    channels_last = torch.arange(24.0).reshape(1, 2, 3, 4).contiguous(memory_format=torch.channels_last)
    store.save_artifact("victim", KEYS[0], Artifact({"w": channels_last, "none": torch.empty(0, 3)}, {"losses": [1.5]}))
    read = store.load_artifact("victim", KEYS[0])
    assert read is not None
    assert torch.equal(read.tensors["w"], channels_last)
    assert read.tensors["none"].shape == (0, 3)
    assert read.meta == {"losses": [1.5]}
    assert len(files(store)) == 1


def test_what_is_absent_is_none(store: Store) -> None:
    assert store.read_record(KEYS[0]) is None
    assert store.load_artifact("victim", KEYS[0]) is None
    assert store.records() == []


def test_a_reader_never_sees_half_a_record(
    store: Store, make_record: MakeRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = make_record(seed=1), make_record(seed=2)
    store.write_record(old)

    class Crash(BaseException):
        pass

    def crash(self: Path, target: Path) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", crash)
        with pytest.raises(Crash):
            store.write_record(new)
    assert store.records() == [old]
    store.write_record(new)
    assert store.records() == [new]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_error_leaves_the_old_record_and_no_temporary(
    call: str, store: Store, make_record: MakeRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = make_record(seed=1)
    store.write_record(old)

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os if call == "fsync" else Path, call, fail)
    with pytest.raises(StoreError, match="No space left") as caught:
        store.write_record(make_record(seed=2))
    assert caught.value.hint is not None
    assert files(store) == [f"{old.key}.json"]
    assert store.read_record(old.key) == old


@pytest.mark.parametrize("what", ["record", "artifact"])
def test_a_full_disk_is_an_error_and_leaves_nothing(what: str, store: Store, make_record: MakeRecord) -> None:
    large = make_record(extras={"text": "x" * 20_000})
    with largest_file(4096), pytest.raises(StoreError, match="cannot be written"):
        store.write_record(large) if what == "record" else store.save_artifact("victim", KEYS[0], weights())
    assert files(store) == []


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written") as caught:
        Store(tmp_path / "file" / "results").create()
    assert "--results" in str(caught.value.hint)


# damage


def flip(data: bytes) -> bytes:
    return data[:-7] + bytes([data[-7] ^ 1]) + data[-6:]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "flipped": flip,
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "garbage": lambda data: b"\xff\x00 not tensors",
    "longer": lambda data: data + b"\0",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_artifact_is_noticed_and_removed(damage: str, store: Store) -> None:
    store.save_artifact("victim", KEYS[0], weights())
    path = store.find_artifact("victim", KEYS[0])
    assert path is not None
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with pytest.warns(DamagedArtifactWarning, match=f"victim {KEYS[0]}"):
        assert store.load_artifact("victim", KEYS[0]) is None
    assert files(store) == []
    store.save_artifact("victim", KEYS[0], weights(2.0))
    again = store.load_artifact("victim", KEYS[0])
    assert again is not None
    assert torch.equal(again.tensors["x"], torch.full((5000,), 2.0))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe\x00", b'{"schema": 2}', b"null"])
def test_an_unreadable_record_counts_as_missing(content: bytes, store: Store, make_record: MakeRecord) -> None:
    good, bad = make_record(KEYS[0]), store.record_path(KEYS[1])
    store.write_record(good)
    bad.write_bytes(content)
    with pytest.warns(UserWarning, match=f"{KEYS[1]}.*missing"):
        assert store.read_record(KEYS[1]) is None
    with pytest.warns(UserWarning, match=KEYS[1]):
        assert store.records() == [good]


# finding a record


@pytest.fixture
def three(store: Store, make_record: MakeRecord) -> Store:
    for key in KEYS:
        store.write_record(make_record(key))
    return store


@pytest.mark.parametrize("prefix", ["b", "bb", "bb00", KEYS[2]])
def test_find_by_prefix(prefix: str, three: Store) -> None:
    assert three.find_record(prefix).key == KEYS[2]


@pytest.mark.parametrize("prefix", ["a", "aa"])
def test_an_ambiguous_prefix_names_the_candidates(prefix: str, three: Store) -> None:
    with pytest.raises(BenchError, match=f"{KEYS[0]}, {KEYS[1]}") as caught:
        three.find_record(prefix)
    assert caught.value.hint == "give more digits"


@pytest.mark.parametrize("prefix", ["c", "", "*", "?", "[ab]", "bb000000000000001"])
def test_an_unknown_key(prefix: str, three: Store) -> None:
    with pytest.raises(BenchError, match="there is no record '" + re.escape(prefix)):
        three.find_record(prefix)


def test_no_records_at_all(store: Store) -> None:
    with pytest.raises(BenchError) as caught:
        store.find_record("aa")
    assert caught.value.hint == "`bbn run` makes records"


def test_a_damaged_record_is_not_called_ambiguous(three: Store) -> None:
    three.record_path(KEYS[2]).write_text("{")
    with pytest.raises(BenchError, match="cannot be read: it is not JSON"):
        three.find_record(KEYS[2])


# locks, between real processes


def hold_lock(root: Path, connection: Connection) -> None:
    with Store(root).lock("victim", KEYS[0]):
        connection.send("held")
        connection.recv()
    connection.send("released")


Holder = tuple[BaseProcess, Connection]


@pytest.fixture
def holder(store: Store, processes: BaseContext) -> Iterator[Callable[[], Holder]]:
    """Starts a process that takes the lock, says so, and keeps it until told to let go."""
    started: list[BaseProcess] = []

    def start() -> Holder:
        ours, theirs = processes.Pipe()
        process = processes.Process(target=hold_lock, args=(store.root, theirs))
        process.start()
        started.append(process)
        return process, ours

    yield start
    for process in started:
        process.kill()
        process.join()


def has(holder: Holder, seconds: float = PATIENCE) -> bool:
    return holder[1].poll(seconds) and holder[1].recv() == "held"


def release(holder: Holder) -> None:
    holder[1].send("let go")
    assert holder[1].poll(PATIENCE)
    assert holder[1].recv() == "released"


def test_a_second_process_waits_for_the_lock(holder: Callable[[], Holder]) -> None:
    first = holder()
    assert has(first)
    second = holder()
    assert not has(second, 1.5)
    release(first)
    assert has(second)


def test_the_lock_of_a_killed_process_is_free(holder: Callable[[], Holder]) -> None:
    first = holder()
    assert has(first)
    first[0].kill()
    first[0].join()
    assert has(holder())


def test_a_third_process_waits_while_the_second_holds_the_lock(holder: Callable[[], Holder]) -> None:
    first = holder()
    assert has(first)
    second = holder()
    assert not has(second, 1.0)
    release(first)
    assert has(second)
    assert not has(holder(), 1.5)
