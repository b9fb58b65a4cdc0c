"""The documentation says what is there: hooks, files, commands, and examples that run."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backdoor_bench_none.cli.main import VERBS
from backdoor_bench_none.contracts.executor import Executor
from backdoor_bench_none.planning.reading import parse_config
from backdoor_bench_none.registry import hookspecs
from backdoor_bench_none.registry.components import Registry
from backdoor_bench_none.results.store import Store
from backdoor_bench_none.testing import run_contract

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "plugins").glob("*/README.md"))]
HOOKS = {name: hook for name, hook in vars(hookspecs).items() if name.startswith("bbn_")}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_is_documented_with_its_arguments(name: str) -> None:
    page = (ROOT / "docs" / "hooks.md").read_text(encoding="utf-8")
    arguments = list(inspect.signature(HOOKS[name]).parameters)
    title = f"### {name}({', '.join(arguments)})\n"
    assert title in page, f"docs/hooks.md has no section '{title.strip()}'"
    section = page.partition(title)[2].partition("\n#")[0]
    assert len(section.split()) >= 5
    assert [argument for argument in arguments if f"`{argument}`" not in section] == []


def test_no_hook_is_documented_that_is_not_there() -> None:
    page = (ROOT / "docs" / "hooks.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^### (\w+)\(", page, re.MULTILINE)) == set(HOOKS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_that_are_there(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_verbs_in_examples_are_there(page: Path) -> None:
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    named = {verb for line in lines for verb in re.findall(r"(?:^|&& )bbn (\w+)", line)}
    assert named <= {*VERBS, "backdoorbench"}


@pytest.mark.slow
def test_the_tutorial_runs(write_benchmark: Callable[..., Path], bbn: Any, tmp_path: Path) -> None:
    page = ROOT / "docs" / "write-a-defense.md"
    code = next(block for block in blocks(page, "python") if "class MyDefense(Defense)" in block)
    hook = (
        "\nfrom backdoor_bench_none import hookimpl\n@hookimpl\ndef bbn_defenses(): return {'my_defense': MyDefense}\n"
    )
    (tmp_path / "bbnfile.py").write_text(code + hook)
    write_benchmark(defense="no_defense, my_defense")
    said = bbn("run")
    assert said.code == 0, said.out
    assert {record.status for record in Store(tmp_path / "results").records()} == {"done"}
    checked = bbn("check", "bbnfile")
    assert checked.code == 0, checked.out
    number = re.search(r"bbn check bbn-my-defense +# (\d+) checks", page.read_text(encoding="utf-8"))
    assert number is not None
    assert f"{number[1]} of {number[1]} checks" in checked.out


def test_the_data_set_and_the_architecture_of_the_docs_run(
    write_benchmark: Callable[..., Path], bbn: Any, tmp_path: Path
) -> None:
    code = blocks(ROOT / "docs" / "data-and-architectures.md", "python")
    (tmp_path / "bbnfile.py").write_text("\n".join(code))
    write_benchmark(dataset="noise", architecture="three_layers", defense="no_defense", epochs=2)
    said = bbn("run")
    assert said.code == 0, said.out
    registry = Registry.default(tmp_path)
    for kind, name in (("dataset", "noise"), ("architecture", "three_layers")):
        failed = [verdict for verdict in run_contract(registry.create(kind, name)) if verdict.reason]
        assert failed == []


EXECUTORS = [block for page in PAGES for block in blocks(page, "yaml") if re.search("^executor:", block, re.MULTILINE)]


@pytest.mark.parametrize("block", EXECUTORS, ids=lambda block: block[:40].splitlines()[0])
def test_executors_in_examples_are_there_with_their_parameters(block: str) -> None:
    rest = "" if "version:" in block else "version: 1\nname: x\nmatrix: {attack: x, defense: x, architecture: x}\n"
    config, _ = parse_config(rest + block)
    assert isinstance(Registry.default().create_as(Executor, config.executor.name, config.executor.params), Executor)
