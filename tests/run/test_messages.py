"""Exceptions of third-party code, whatever their type and text, fail their own cells and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backdoor_bench_none.words import LONGEST_LINE, LONGEST_TEXT, describe_error, shorten, text_of, visible

BBNFILE = '''\
from typing import ClassVar
from backdoor_bench_none.api import Defense, DefenseResult, Metric, Stage, hookimpl

class Mute(Exception):
    def __str__(self): raise RuntimeError("no text")

class Raises(Defense):
    """Raises something."""
    stage: ClassVar[Stage] = Stage.POST_TRAINING
    starts_from_victim: ClassVar[bool] = True
    error: ClassVar[object]
    def run(self, task, context): raise self.error

class Odd(Defense):
    """Reports a text that no file can hold."""
    stage: ClassVar[Stage] = Stage.POST_TRAINING
    starts_from_victim: ClassVar[bool] = True
    def run(self, task, context): return DefenseResult(task.victim(), extras={"odd": "\\ud800"})

ERRORS = {
    "surrogate": ValueError("half a character: \\ud800"),
    "long": ValueError("x" * 20_000_000),
    "escape": ValueError("\\x1b[2J\\x1b]0;title\\x07 \\x9b31m\\u202e"),
    "mute": Mute(),
    "leaves": SystemExit(0),
    "interrupts": KeyboardInterrupt(),
    "generator": GeneratorExit("closed"),
    "group": ExceptionGroup("two", [ValueError("one"), TypeError("other")]),
    "lines": ValueError("first\\nsecond\\r\\nthird"),
    "empty": RuntimeError(""),
}

@hookimpl
def bbn_defenses():
    made = {name: type(name.title(), (Raises,), {"__module__": __name__, "__doc__": "Raises.", "error": error})
            for name, error in ERRORS.items()}
    return {**made, "odd": Odd}

@hookimpl
def bbn_cell_finished(cell, record):
    if cell.defense.name in ("no_defense", "mute"):
        raise ERRORS["mute"] if cell.defense.name == "mute" else ERRORS["escape"]
'''
NAMES = ["surrogate", "long", "escape", "mute", "leaves", "interrupts", "generator", "group", "lines", "empty", "odd"]
REASONS = {
    "surrogate": r"ValueError: half a character: \ud800",
    "escape": r"ValueError: \x1b[2J\x1b]0;title\x07 \x9b31m\u202e",
    "mute": "Mute: its message cannot be read, which raises RuntimeError",
    "leaves": "SystemExit: 0",
    "interrupts": "KeyboardInterrupt: without a message",
    "generator": "GeneratorExit: closed",
    "group": "ExceptionGroup: two (2 sub-exceptions)",
    "lines": "ValueError: first",
    "empty": "RuntimeError: without a message",
    "odd": "TypeError: extras hold a value that JSON cannot hold",
}  # fmt: skip


@pytest.mark.slow
def test_any_exception_fails_its_own_cell(write_benchmark: Callable[..., Path], bbn: Any, tmp_path: Path) -> None:
    (tmp_path / "bbnfile.py").write_text(BBNFILE)
    write_benchmark(defense=f"no_defense, {', '.join(NAMES)}")
    with pytest.warns(UserWarning, match="bbn_cell_finished raised"):
        said = bbn("run")
    assert said.code == 1
    assert not set("\x1b\x07\x9b\u202e") & set(said.out + said.err)
    assert max(map(len, (said.out + said.err).splitlines())) < LONGEST_LINE + 500
    records = [json.loads(path.read_bytes()) for path in (tmp_path / "results" / "records").glob("*/*.json")]
    ended = {record["axes"]["defense"]["name"]: record for record in records}
    assert ended.pop("no_defense")["status"] == "done"
    assert {record["status"] for record in ended.values()} == {"failed"}
    for name, reason in REASONS.items():
        assert ended[name]["reason"].startswith(reason), name
    assert 60_000 < len(ended["long"]["failure"]["message"]) <= LONGEST_TEXT
    assert len(ended["long"]["reason"]) < LONGEST_LINE + 500
    for verb in (["table"], ["status"], ["report", "--output", "r.html"], ["table", "--format", "csv"]):
        shown = bbn(*verb)
        assert shown.code == 0
        assert not set("\x1b\x07\x9b\u202e") & set(shown.out + shown.err)
    assert not set("\x1b\x07\x9b\u202e") & set((tmp_path / "r.html").read_text())


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain\n\ttext", "plain\n\ttext"), ("\x1b[31m", "\\x1b[31m"), ("\x00\x7f\x9b", "\\x00\\x7f\\x9b"),
        ("a\u202eb", "a\\u202eb"), ("\ud83d", "\\ud83d"), ("é 漢 😀", "é 漢 😀"), ("\r", "\\r"), ("\u2028", "\\u2028"),
    ],
)  # fmt: skip
def test_control_characters_become_visible(text: str, shown: str) -> None:
    assert visible(text) == shown


@pytest.mark.parametrize("length", [10, 99, 100, 101, 1000, 10**6])
def test_long_texts_keep_their_ends(length: int) -> None:
    text = "a" * (length // 2) + "z" * (length - length // 2)
    short = shorten(text, 100)
    assert len(short) <= 100
    assert (short[0], short[-1]) == ("a", "z")
    assert (short == text) == (length <= 100)


def test_an_error_without_a_text_has_its_type() -> None:
    class MuteError(Exception):
        def __str__(self) -> str:
            raise ZeroDivisionError

    assert text_of(MuteError()) == "its message cannot be read, which raises ZeroDivisionError"
    assert describe_error(ValueError("a\n  b")) == "ValueError: a b"
    assert len(describe_error(ValueError("x" * 10**6))) <= LONGEST_LINE
