"""Imports that wait: what stands for a library, and the commands that need none."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from backdoor_bench_none.cli.main import COMPUTING, LARGE_LIBRARIES, VERBS
from backdoor_bench_none.lazy import ASKED_OF_ALL, Unloaded, import_when_used

REPOSITORY = Path(__file__).parents[1]
#: what a command that prints text has no use for
HEAVY = ("torch", "torchvision", "numpy", "cv2", "sklearn", "scipy", "matplotlib", "pandas")
#: the commands, one after the other in one process
LIGHT = (
    "list", "list attacks", "show none", "show cifar10", "plan FILE -v", "status FILE", "table FILE",
    "table FILE --format json", "results check", "init --from table1 t.yaml", "--help",
)  # fmt: skip
#: runs each of its arguments as `bbn` does, and prints the exit codes and which of `HEAVY` are really there
PROGRAM = f"""
import sys
from backdoor_bench_none.cli import main
from backdoor_bench_none.lazy import Unloaded
lines = sys.argv[1:]
for line in lines:
    sys.argv[1:] = line.split()
    try:
        main.main()
    except SystemExit as error:
        heavy = [name for name in {HEAVY!r} if not isinstance(sys.modules.get(name), Unloaded | None)]
        print("heavy:", line, error.code, heavy)
"""


def test_answers_without_pixels_import_no_large_library(tmp_path: Path) -> None:
    shutil.copy(REPOSITORY / "benchmark.yaml", tmp_path)
    (tmp_path / "results").mkdir()
    lines = [line.replace("FILE", "benchmark.yaml") for line in LIGHT]
    command = [sys.executable, "-c", PROGRAM, *lines]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    seen = [line for line in done.stdout.splitlines() if line.startswith("heavy:")]
    assert seen == [f"heavy: {line} 0 []" for line in lines], done.stderr


def test_every_verb_that_computes_is_one() -> None:
    assert set(COMPUTING) < set(VERBS)


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package with two parts, of which none has been imported; importing it prints."""
    package = tmp_path / "large_library"
    (package / "part").mkdir(parents=True)
    (package / "__init__.py").write_text(
        "from large_library import part\n__version__ = '1'\nvalue = 1\nprint('imported')\n"
    )
    (package / "part" / "__init__.py").write_text("from large_library.part import deep\nclass Thing: ...\n")
    (package / "part" / "deep.py").write_text("answer = 42\n")
    (package / "other.py").write_text("import large_library\nvalue = large_library.part.deep.answer\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "large_library"
    for name in [name for name in sys.modules if name.partition(".")[0] == "large_library"]:
        del sys.modules[name]


PARTS = ("large_library", "large_library.part", "large_library.part.deep")


def real(name: str) -> bool:
    return not isinstance(sys.modules.get(name), Unloaded | None)


def test_an_import_alone_loads_nothing(library: str, capsys: pytest.CaptureFixture[str]) -> None:
    import_when_used(*PARTS)
    module = importlib.import_module(library)
    namespace: dict[str, ModuleType] = {}
    exec("import large_library\nimport large_library.part as p\nimport large_library.part.deep as d", namespace)
    assert namespace["large_library"] is module
    assert not any(map(real, PARTS))
    assert not any(hasattr(module, name) for name in ASKED_OF_ALL)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("use", ["a.value", "p.Thing", "d.answer", "a.part.Thing"])
def test_the_first_use_loads_it_once_and_all_parts_are_the_real_ones(
    use: str, library: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import_when_used(*PARTS)
    a, p, d = (importlib.import_module(name) for name in PARTS)
    eval(use, {"a": a, "p": p, "d": d})
    assert all(map(real, PARTS))
    assert (a.value, d.answer) == (1, 42)
    assert p.Thing is sys.modules["large_library.part"].Thing  # one class, whichever way it is reached
    assert a.part.Thing is p.Thing
    assert capsys.readouterr().out == "imported\n"


@pytest.mark.parametrize(
    "statement",
    [
        "from large_library import value",
        "from large_library import __version__",
        "import large_library.other",
        "from large_library.part import Thing",
    ],
)
def test_other_forms_of_import_load_it(statement: str, library: str, capsys: pytest.CaptureFixture[str]) -> None:
    import_when_used(*PARTS)
    exec(statement, {})
    assert real("large_library")
    assert capsys.readouterr().out == "imported\n"


def test_a_change_of_the_real_module_is_seen(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import_when_used(*PARTS)
    stand_in = importlib.import_module(library)
    assert stand_in.value == 1
    monkeypatch.setattr(sys.modules[library], "value", 2)
    assert stand_in.value == 2


def test_a_library_that_is_there_stays(library: str) -> None:
    module = importlib.import_module(library)
    import_when_used(*PARTS)
    assert sys.modules[library] is module
    assert all(map(real, PARTS))


def test_an_absent_attribute_is_named(library: str) -> None:
    import_when_used(*PARTS)
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        getattr(importlib.import_module(library), "absent")  # noqa: B009


def test_parts_stand_after_their_library() -> None:
    assert all(
        name.rpartition(".")[0] in LARGE_LIBRARIES[:index]
        for index, name in enumerate(LARGE_LIBRARIES) if "." in name
    )  # fmt: skip
