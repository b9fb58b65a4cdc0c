"""A submission is a stranger's: what does not belong in it is refused, and nothing outside is touched."""

from __future__ import annotations

import io
import json
import os
import re
import stat
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backdoor_bench_none.leaderboard import submission as rules
from backdoor_bench_none.leaderboard.submission import (
    SubmissionError,
    as_plain,
    hash_file,
    open_submission,
    read_submission,
)
from backdoor_bench_none.leaderboard.submission import read_json as read

Bbn = Callable[..., Any]
Forge = Callable[..., Any]
Tree = Callable[[Path], dict[str, str]]
KEY = "0123456789abcdef"


@pytest.fixture(autouse=True)
def inner_folder(tiny_track: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current folder is one below the temporary one, so that what escapes from it is seen there."""
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")


def read_whole(path: Path) -> None:
    with open_submission(path) as folder:
        read_submission(folder)


def refuse_everywhere(path: Path, message: str, bbn: Bbn, tree: Tree) -> None:
    """`verify` and `build` refuse it, say why without a traceback, and leave everything as it is."""
    before = tree(Path.cwd().parent)
    said = bbn("leaderboard", "verify", path)
    assert said.code == 2, said.out + said.err
    assert "Traceback" not in said.err
    assert re.search(f"^error: .*(?:{message})", said.err, re.MULTILINE), said.err
    assert tree(Path.cwd().parent) == before
    said = bbn("leaderboard", "build", path, "--output", "site")
    assert said.code == 0
    assert re.search(f"^refused {re.escape(path.name)}: .*(?:{message})", said.err, re.MULTILINE), said.err
    after = tree(Path.cwd().parent)
    new = {Path(name).parts[1] for name in set(after) - set(before)}
    assert new == {"site"}
    assert {name: after[name] for name in before} == before


# archives


def entry(name: str, mode: int = 0o644, kind: int = stat.S_IFREG) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = (kind | mode) << 16
    info.compress_type = zipfile.ZIP_DEFLATED
    return info


def archive(*parts: tuple[zipfile.ZipInfo | str, bytes | str]) -> Path:
    path = Path("hostile.zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in parts:
            file.writestr(name, data)
    return path


ODD_NAMES = [
    "../outside.json", "records/../../outside.json", "/tmp/bbn-outside.json", "C:\\outside.json", "..\\outside.json",
    "records/../submission.json", "./submission.json", "records//0123456789abcdef.json", "evil.pt", "weights/model.pkl",
    "setup.py", "records/0123456789ABCDEF.json", f"records/{KEY}.json/x", f"weights/{KEY}.json", "verification.json",
    "submission.json\n", f"records/{KEY}.json\n", "SUBMISSION.JSON", "records/.hidden", "ｓubmission.json",
]  # fmt: skip


@pytest.mark.parametrize("name", ODD_NAMES)
def test_names_in_an_archive(name: str, bbn: Bbn, tree: Tree) -> None:
    path = archive(("submission.json", "{}"), (name, "{}"))
    refuse_everywhere(path, "does not belong in a submission", bbn, tree)
    assert not Path("/tmp/bbn-outside.json").exists()


def test_links_in_an_archive(bbn: Bbn, tree: Tree) -> None:
    path = archive((entry("submission.json", kind=stat.S_IFLNK), "/etc/passwd"))
    refuse_everywhere(path, "'submission.json' is a symbolic link", bbn, tree)


def test_a_name_twice_in_an_archive(bbn: Bbn, tree: Tree) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        path = archive(("submission.json", "{}"), ("submission.json", "{}"))
    refuse_everywhere(path, "a file occurs twice", bbn, tree)


def test_a_bomb_that_says_so(bbn: Bbn, tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "LARGEST_SUBMISSION", 10**6)
    path = archive(*[(f"weights/{number:016x}.safetensors", bytes(10**5)) for number in range(11)])
    assert path.stat().st_size < 20_000
    refuse_everywhere(path, "unpacks to more than .* 1000000 bytes", bbn, tree)


def test_a_json_bomb_that_says_so(bbn: Bbn, tree: Tree) -> None:
    path = archive(("submission.json", b" " * (rules.LARGEST_JSON + 1)))
    assert path.stat().st_size < 20_000
    refuse_everywhere(path, f"'submission.json' is larger than {rules.LARGEST_JSON}", bbn, tree)


def test_too_many_files(bbn: Bbn, tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "MOST_FILES", 3)
    path = archive(*[(f"weights/{number:016x}.safetensors", b"") for number in range(4)])
    refuse_everywhere(path, "more than 3 files", bbn, tree)


@pytest.mark.parametrize("declared", [10, 2 * 10**6])
def test_a_bomb_that_lies_about_its_size(declared: int, bbn: Bbn, tree: Tree, tmp_path: Path) -> None:
    """The sizes in the archive's directory and in front of the part are changed; 1 MB of zeros follows."""
    path = archive((entry(f"weights/{KEY}.safetensors"), bytes(10**6)))
    data = path.read_bytes()
    assert data.count(struct.pack("<L", 10**6)) == 2
    path.write_bytes(data.replace(struct.pack("<L", 10**6), struct.pack("<L", declared)))
    refuse_everywhere(path, "unpacks to more than it declares|not a readable zip archive|has no submission", bbn, tree)


def test_no_more_is_unpacked_than_was_declared() -> None:
    info, out = entry("submission.json"), io.BytesIO()
    info.file_size = 1000
    with pytest.raises(SubmissionError, match=r"'submission\.json' unpacks to more than it declares"):
        rules._copy(io.BytesIO(bytes(10**7)), out, info)
    assert out.tell() <= 1000


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "no archive": lambda data: b"I am no archive",
    "empty": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "another stream": lambda data: data[:45] + b"\xff" * 30 + data[75:],
    "encrypted": lambda data: data.replace(
        b"PK\x01\x02\x14\x03\x14\x00\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01\x00"
    ),
    "unknown method": lambda data: data.replace(b"\x00\x00\x08\x00", b"\x00\x00\x63\x00"),
}


@pytest.mark.parametrize("way", DAMAGE)
def test_damaged_archives(way: str, bbn: Bbn, tree: Tree) -> None:
    path = archive((entry("submission.json"), os.urandom(4000)))
    data = DAMAGE[way](path.read_bytes())
    assert data != path.read_bytes()
    path.write_bytes(data)
    refuse_everywhere(path, "is not a readable zip archive", bbn, tree)


# folders


def link_records(forged: Any) -> None:
    (forged.folder / "records").rename(forged.folder.parent / "elsewhere")
    (forged.folder / "records").symlink_to(forged.folder.parent / "elsewhere")


def link_weights(forged: Any) -> None:
    path = forged.weights_path("badnets/s0")
    path.rename(forged.folder.parent / "elsewhere")
    path.symlink_to(forged.folder.parent / "elsewhere")


def link_manifest(forged: Any) -> None:
    path = forged.folder / "submission.json"
    path.rename(forged.folder.parent / "elsewhere")
    path.symlink_to(forged.folder.parent / "elsewhere")


def add(name: str, listed: bool = False) -> Callable[[Any], None]:
    def change(forged: Any) -> None:
        path = forged.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\x80\x04cos\nsystem\n.")
        if listed:
            list_file(name)(forged)

    return change


def list_file(name: str) -> Callable[[Any], None]:
    def change(forged: Any) -> None:
        manifest = json.loads((forged.folder / "submission.json").read_text())
        manifest["files"][name] = "0" * 64
        (forged.folder / "submission.json").write_text(json.dumps(manifest))

    return change


def add_pipe(forged: Any) -> None:
    os.mkfifo(forged.folder / "records" / f"{KEY}.json")
    list_file(f"records/{KEY}.json")(forged)


FOLDERS: dict[str, tuple[Callable[[Any], None], str]] = {
    "records elsewhere": (link_records, "'records' is not listed"),
    "weights elsewhere": (link_weights, "'weights/[0-9a-f]{16}.safetensors' does not belong"),
    "manifest elsewhere": (link_manifest, "is not a submission"),
    "a verdict of its own": (add("verification.json"), "'verification.json' is not listed"),
    "a pickle": (add("evil.pt"), "'evil.pt' is not listed"),
    "a pickle among weights": (add(f"weights/{KEY}.pkl"), f"'weights/{KEY}.pkl' is not listed"),
    "code": (add("bbnfile.py"), "'bbnfile.py' is not listed"),
    "a pickle that is listed": (add("evil.pt", listed=True), "'evil.pt' does not belong"),
    "a path out of it": (list_file("../../etc/passwd"), "'../../etc/passwd' is missing beside"),
    "an absolute path": (list_file("/etc/passwd"), "'/etc/passwd' is missing beside"),
    "a file that is not there": (list_file(f"records/{KEY}.json"), f"'records/{KEY}.json' is missing beside"),
    "a pipe": (add_pipe, f"'records/{KEY}.json' is missing beside"),
    "a hash": (lambda f: f.write_record("badnets/s0", {}), "does not have the hash in submission.json"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders(name: str, forge: Forge, bbn: Bbn, tree: Tree) -> None:
    forged = forge()
    FOLDERS[name][0](forged)
    refuse_everywhere(forged.folder, FOLDERS[name][1], bbn, tree)


def test_a_verification_is_not_written_through_a_link(arena: Any, bbn: Bbn, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("years of work")
    target = arena.submissions / "no_defense"
    path = Path("verifications") / f"{hash_file(target / 'submission.json')}.json"
    path.parent.mkdir()
    path.symlink_to(tmp_path / "precious")
    assert bbn("leaderboard", "verify", target, "--cells", 0).code == 0
    assert (tmp_path / "precious").read_text() == "years of work"
    assert json.loads(path.read_text())["verdict"] == "reevaluated"


@pytest.mark.parametrize("path", ["nowhere", "empty", "text"])
def test_what_is_no_submission(path: str, bbn: Bbn) -> None:
    Path("empty").mkdir()
    Path("text").write_text("hello")
    said = bbn("leaderboard", "verify", path)
    assert (said.code, said.out) == (2, "")
    assert re.match("error: .*(no submission|not a submission|not a readable zip)", said.err)


# JSON

JSON: dict[str, tuple[bytes, str]] = {
    "a key twice": (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' occurs twice"),
    "NaN": (b'{"a": NaN}', "NaN is no number"),
    "infinity": (b'{"a": -Infinity}', "-Infinity is no number"),
    "1e999": (b'{"a": 1e999}', "1e999 is too large"),
    "an integer of 21 digits": (b'{"a": 1' + b"0" * 20 + b"}", "21 digits"),
    "an integer of 10^5 digits": (b'{"a": 1' + b"0" * 10**5 + b"}", "100001 digits"),
    "nesting": (b"[" * 33 + b"]" * 33, "nested deeper than 32"),
    "deep nesting": (b"[" * 10**6 + b"]" * 10**6, "recursion|nested deeper"),
    "deep objects": (b'{"a":' * 1000 + b"1" + b"}" * 1000, "recursion|nested deeper"),
    "not UTF-8": (b'{"a": "\xff"}', "utf-8"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "utf-8"),
    "half a character": (b'{"a": "\\ud800"}', "surrogates"),
    "half a key": (b'{"\\udfff": 1}', "surrogates"),
    "a byte order mark": (b"\xef\xbb\xbf{}", "BOM"),
    "no JSON": (b"{'a': 1}", "."),
    "a comment": (b"{} // {}", "Extra data"),
    "nothing": (b"", "."),
}


@pytest.mark.parametrize("name", JSON)
def test_json(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(JSON[name][0])
    with pytest.raises(SubmissionError, match=rf"'x.json' is not valid JSON: .*(?i:{JSON[name][1]})"):
        read(path)


def test_large_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"a": "' + "x" * 100 + '"}')
    assert read(path) == {"a": "x" * 100}
    monkeypatch.setattr(rules, "LARGEST_JSON", 100)
    with pytest.raises(SubmissionError, match="larger than 100 bytes"):
        read(path)


@pytest.mark.parametrize("name", ["a key twice", "NaN", "deep nesting", "not UTF-8", "half a character"])
@pytest.mark.parametrize("where", ["manifest", "record"])
def test_json_in_a_submission(where: str, name: str, forge: Forge, bbn: Bbn, tree: Tree) -> None:
    forged = forge()
    if where == "record":
        forged.record_path("badnets/s0").write_bytes(JSON[name][0])
        forged.seal()
    else:
        (forged.folder / "submission.json").write_bytes(JSON[name][0])
    refuse_everywhere(forged.folder, "is not valid JSON", bbn, tree)


# values


def put(part: dict[str, Any], path: tuple[str, ...], value: object) -> None:
    for name in path[:-1]:
        part = part[name]
    part[path[-1]] = value


RECORDS: dict[str, tuple[tuple[str, ...], object, str]] = {
    "schema 2": (("schema",), 2, "schema"),
    "an unknown field": (("shell",), "rm -rf", "shell"),
    "a control character in a field's name": (("\x1b[2J",), "x", "\ufffd"),
    "hits above the total": (("counts", "benign_accuracy", "hits"), 501, "501 hits of 500"),
    "negative hits": (("counts", "benign_accuracy", "hits"), -1, "greater than or equal to 0"),
    "a share": (("counts", "benign_accuracy", "hits"), 0.99, "integer"),
    "of nothing": (("counts", "benign_accuracy", "total"), 0, "greater than 0"),
    "huge counts": (("counts", "benign_accuracy"), {"hits": 2**50, "total": 2**51}, "less than or equal"),
    "huge seconds": (("costs", "defense", "seconds"), 1e300, "costs.defense"),
    "negative seconds": (("costs", "defense", "seconds"), -1, "costs.defense"),
    "huge memory": (("costs", "defense", "peak_memory"), 10**19, "costs.defense"),
    "huge AUROC": (("detection",), {"true_positive": 1, "false_positive": 1, "true_negative": 1, "false_negative": 1,
                                    "auroc": 1e200}, "auroc"),
    "clean data": (("clean_fraction",), -1e300, "clean_fraction"),
    "a missing axis": (("axes",), {}, "axes"),
    "a surplus axis": (("axes", "key"), {"name": "a", "label": "a", "revision": 1, "params": {}}, "axes"),
    "an empty label": (("axes", "attack", "label"), "", "axes.attack"),
    "a long label": (("axes", "attack", "label"), "A" * 201, "axes.attack"),
    "a label that turns the text around": (("axes", "attack", "label"), "\u202etxt", "axes.attack"),
    "a label for the terminal": (("axes", "attack", "name"), "\x1b[2J", "axes.attack"),
}  # fmt: skip
MANIFESTS: dict[str, tuple[tuple[str, ...], object, str]] = {
    "schema 2": (("schema",), 2, "schema 2, this version reads 1"),
    "schema of text": (("schema",), "1", "schema"),
    "an unknown field": (("hooks",), [], "hooks"),
    "a path as track": (("track",), "../../etc/passwd", "track"),
    "a formula as package": (("source", "distribution"), "=cmd()", "source.distribution"),
    "a path as version": (("source", "version"), "1/../../x", "source.version"),
    "a long name": (("defense", "name"), "n" * 201, "defense"),
    "a label for the terminal": (("defense", "label"), "\x1b]0;owned\x07", "defense"),
    "an author with lines": (("authors",), "me\nFAILED", "authors"),
    "a long author": (("authors",), "A" * 501, "authors"),
    "a claim above 1": (("claims",), {"asr": 2}, "claims.asr"),
    "an unknown claim": (("claims",), {"<b>": 0.5}, "claims"),
    "a negative share": (("clean_fraction",), -0.1, "clean_fraction"),
    "another stage": (("stage",), "after_the_fact", "stage"),
    "no object": ((), [], "."),
}


@pytest.mark.parametrize("name", RECORDS)
def test_values_of_records(name: str, forge: Forge, bbn: Bbn, tree: Tree) -> None:
    forged, (path, value, message) = forge(), RECORDS[name]
    record = forged.record("clean/s0")
    put(record, path, value)
    forged.write_record("clean/s0", record)
    refuse_everywhere(forged.seal(), f"records/{forged.keys['clean/s0']}.json: .*{message}", bbn, tree)


@pytest.mark.parametrize("name", MANIFESTS)
def test_values_of_manifests(name: str, forge: Forge, bbn: Bbn, tree: Tree) -> None:
    forged, (path, value, message) = forge(), MANIFESTS[name]
    manifest = json.loads((forged.folder / "submission.json").read_text())
    put(manifest, path, value) if path else None
    (forged.folder / "submission.json").write_text(json.dumps(manifest if path else value))
    refuse_everywhere(forged.folder, f"submission.json.*{message}", bbn, tree)


def test_texts_for_a_terminal() -> None:
    assert as_plain("a\x1b[31mb\u202ec\nd") == "a\ufffd[31mb\ufffdc\ufffdd"
    assert as_plain("Ä 木马 ≈") == "Ä 木马 ≈"
    assert len(as_plain("x" * 10**6)) < 600
    assert SubmissionError("\x1b[2J").message == "\ufffd[2J"


def test_a_strange_key_of_a_record_is_refused(forge: Forge, bbn: Bbn) -> None:
    forged = forge()
    record = forged.record("clean/s0")
    record["key"] = "\x1b[2J" + "x" * 10**4
    forged.write_record("clean/s0", record)
    said = bbn("leaderboard", "verify", forged.seal(), "--cells", 0)
    assert said.code == 2
    assert "key: String should match pattern" in said.err
    assert "\x1b[2J" not in said.out + said.err
