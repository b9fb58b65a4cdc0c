"""The imports of the project, read from its sources: one way, no circle, and only the API in plugins."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = "backdoor_bench_none"
#: the rooms of the core, a line a floor: a room may import from its own floor's room and from those above it here
FLOORS = (
    {"errors", "lazy", "seeds", "system", "words"},
    {"maths"},
    {"contracts"},
    {"inspection"},
    {"data", "models", "trainers", "loggers", "metrics"},
    {"registry"},
    {"planning"},
    {"results"},
    {"run"},
    {"executors", "paper", "scaffold"},
    {"report"},
    {"testing", "leaderboard"},
    {"cli"},
    {"exports"},
    {"api"},
)
#: what plugins may import of the core: in their sources, and in their tests
PLUGIN_SOURCES = ("attacks", "defenses", "plugins/*/src", "tests/packages/*/src")
PLUGIN_TESTS = ("plugins/*/tests",)


def modules(folder: Path, package: str) -> dict[str, Path]:
    """All modules of a package by dotted name."""
    return {
        ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted((folder / package).rglob("*.py"))
    }


def imports(path: Path, known: Mapping[str, Path]) -> set[str]:
    """The modules among `known` that a file imports, anywhere in it: in functions and for types too."""
    return {module for module in imported_names(path) for module in [closest(module, known)] if module is not None}


def imported_names(path: Path) -> Iterator[str]:
    """Dotted names of modules, and of what is imported from them."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, f"{path}: relative imports are not read here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def closest(name: str, known: Mapping[str, Path]) -> str | None:
    """The module that a dotted name is, or is an attribute of."""
    while name not in known and "." in name:
        name = name.rpartition(".")[0]
    return name if name in known else None


def graph_of(folder: Path, package: str) -> dict[str, set[str]]:
    known = modules(folder, package)
    return {name: imports(path, known) - {name} for name, path in known.items()}


def find_circle(graph: Mapping[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def room(module: str) -> str:
    return module.split(".")[1]


def floor(module: str) -> int:
    """The floor of a module's room."""
    (number,) = [number for number, rooms in enumerate(FLOORS) if room(module) in rooms]
    return number


def runs_back_up(source: str, target: str) -> bool:
    return room(source) != room(target) and floor(source) <= floor(target)


def test_every_room_has_its_floor() -> None:
    rooms = {room(module) for module in modules(ROOT, CORE) if module != CORE}
    assert rooms == set().union(*FLOORS)


def test_there_is_no_circle() -> None:
    assert find_circle(graph_of(ROOT, CORE)) == []


def test_arrows_run_one_way() -> None:
    graph = graph_of(ROOT, CORE)
    del graph[CORE]  # the package itself only forwards to the API, when it is asked
    back_up = [(one, other) for one, others in graph.items() for other in others if runs_back_up(one, other)]
    assert [(one, other) for one, other in back_up if other != CORE] == []


def test_the_core_does_not_import_its_own_api() -> None:
    graph = graph_of(ROOT, CORE)
    doors = {f"{CORE}.api", f"{CORE}.exports"}
    assert [module for module, others in graph.items() if others & doors] == [CORE, f"{CORE}.api"]


def test_the_core_knows_no_single_attack_or_defense() -> None:
    known = {**modules(ROOT, CORE), "bbn_attacks": ROOT, "bbn_defenses": ROOT}
    wrong = {name: imports(path, known) & {"bbn_attacks", "bbn_defenses"} for name, path in modules(ROOT, CORE).items()}
    assert {name for name, others in wrong.items() if others} == set()


def beyond(allowed: tuple[str, ...], *patterns: str) -> list[str]:
    """What the Python files below folders import of the core, other than `allowed`."""
    files = [path for pattern in patterns for folder in ROOT.glob(pattern) for path in folder.rglob("*.py")]
    assert files
    return [
        f"{path.relative_to(ROOT)}: {name}"
        for path in sorted(files)
        for name in imported_names(path)
        if name.startswith(CORE) and not name.startswith(tuple(f"{module}." for module in allowed))
    ]


def test_plugins_import_the_api_only() -> None:
    assert beyond((f"{CORE}.api",), *PLUGIN_SOURCES) == []


def test_tests_of_plugins_import_the_api_and_the_contract_kit_only() -> None:
    assert beyond((f"{CORE}.api", f"{CORE}.testing"), *PLUGIN_TESTS) == []


# These tests can fail.


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package whose modules `low` and `high` are on different floors."""
    for name in ("__init__", "maths/__init__", "cli/__init__"):
        path = tmp_path / CORE / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    return tmp_path


def test_a_circle_through_type_checking_is_found(package: Path) -> None:
    (package / CORE / "maths/low.py").write_text(
        f"from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from {CORE}.cli.high import x\n"
    )
    (package / CORE / "cli/high.py").write_text(f"def f():\n    import {CORE}.maths.low\n")
    graph = graph_of(package, CORE)
    assert set(find_circle(graph)) == {f"{CORE}.maths.low", f"{CORE}.cli.high"}
    assert runs_back_up(f"{CORE}.maths.low", f"{CORE}.cli.high")
    assert not runs_back_up(f"{CORE}.cli.high", f"{CORE}.maths.low")


def test_a_module_imported_from_its_package_is_found(package: Path) -> None:
    (package / CORE / "maths/low.py").write_text("")
    (package / CORE / "cli/high.py").write_text(f"from {CORE}.maths import low\nfrom {CORE} import maths\n")
    assert graph_of(package, CORE)[f"{CORE}.cli.high"] == {f"{CORE}.maths.low", f"{CORE}.maths"}
