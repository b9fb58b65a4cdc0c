"""`bbn check`, `bbn new`, and the verbs that plugins bring."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from backdoor_bench_none.registry.plugins import PluginWarning

COMPONENTS = '''
from typing import ClassVar
from pydantic import Field
from backdoor_bench_none.api import Activation, Defense, DefenseResult, Metric, Stage, hookimpl
from torch import nn

class Good(Activation):
    """Is the identity, almost."""

    def build(self):
        return nn.LeakyReLU(0.9)

class Shared(Activation):
    """Builds one module for all."""

    module: ClassVar[nn.Module] = nn.ReLU()

    def build(self):
        return self.module

class Needy(Activation):
    """Needs to be told its slope."""

    slope: float = Field(description="slope")

    def build(self):
        return nn.LeakyReLU(self.slope)

class Invalid(Good):
    """Has a default that its own bounds forbid."""

    slope: float = Field(2.0, le=1, description="slope")

class NoComponent:
    pass

@hookimpl
def bbn_activations():
    return {"good": Good, "shared": Shared, "needy": Needy, "invalid": Invalid, "no_component": NoComponent}
'''
Bbn = Callable[..., Any]
Install = Callable[..., None]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder; modules of installed plugins are forgotten."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Installs the distribution dist-<name> 1.2 with the plugin <name>, and further modules by name."""

    def do(name: str, source: str, **modules: str) -> None:
        folder = tmp_path / f"installed-{name}"
        dist_info = folder / f"dist_{name}-1.2.dist-info"
        dist_info.mkdir(parents=True)
        header = "from backdoor_bench_none import hookimpl\n"
        for module, text in {f"plugin_{name}": header + dedent(source), **modules}.items():
            (folder / f"{module}.py").write_text(dedent(text))
        (dist_info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: dist-{name}\nVersion: 1.2\n")
        (dist_info / "entry_points.txt").write_text(f"[backdoor_bench_none]\n{name} = plugin_{name}\n")
        monkeypatch.syspath_prepend(str(folder))

    return do


def fault(said: Any, message: str, hint: str = "") -> None:
    """`said` tells of a user's fault: on stderr, with a hint, without a traceback."""
    assert said.code == 2
    assert said.out == ""
    assert "Traceback" not in said.err
    assert re.search(f"^error: .*{message}", said.err, re.MULTILINE), said.err
    assert not hint or re.search(f"^hint: .*{hint}", said.err, re.MULTILINE), said.err


# bbn check


@pytest.mark.parametrize("name", ["mine", "dist-mine"])
def test_check_goes_through_all_components_of_a_plugin(name: str, install: Install, bbn: Bbn) -> None:
    install("mine", COMPONENTS)
    said = bbn("check", name)
    assert said.code == 1
    lines = said.out.splitlines()
    assert lines[0] == "passed  activation good: 7 of 7 checks"
    assert lines[1] == "FAILED  activation shared: activation: build returns one module twice"
    assert lines[2] == "FAILED  activation shared: 6 of 7 checks"
    assert lines[3].startswith("skipped activation needy: it needs slope; check it in your own test")
    assert lines[4].startswith("FAILED  activation invalid: activation 'invalid': slope: Input should be less than")
    assert re.fullmatch(r"FAILED  activation no_component: .* of plugin 'mine' \(dist-mine 1.2\) is not .*", lines[5])
    assert lines[6:] == [f"5 components of {name}, 3 checks failed"]


def test_check_of_chosen_components(install: Install, bbn: Bbn) -> None:
    install("mine", COMPONENTS)
    said = bbn("check", "mine", "good", "needy")
    assert said.code == 0
    assert [line.split()[:3] for line in said.out.splitlines()] == [
        ["passed", "activation", "good:"], ["skipped", "activation", "needy:"], ["all", "checks", "passed"],
    ]  # fmt: skip


def test_check_verbose_names_every_check(install: Install, bbn: Bbn) -> None:
    install("mine", COMPONENTS)
    lines = bbn("check", "mine", "good", "--verbose").out.splitlines()
    assert {"passed  activation good: documented", "passed  activation good: pickles"} <= set(lines)
    assert len(lines) == 7 + 2


def test_check_of_the_bbnfile(here: Path, bbn: Bbn) -> None:
    (here / "bbnfile.py").write_text(COMPONENTS)
    said = bbn("check", "bbnfile", "good", "shared")
    assert said.code == 1
    assert said.out.splitlines()[-1] == "2 components of bbnfile, 1 check failed"


def test_check_of_an_unknown_plugin_suggests_one(install: Install, bbn: Bbn) -> None:
    install("mine", COMPONENTS)
    fault(bbn("check", "mien"), "there is no plugin 'mien'", "did you mean 'mine'")
    fault(bbn("check", "mine", "goood"), "plugin 'mine' has no component 'goood'", "did you mean 'good'")


@pytest.mark.parametrize("name", ["bad", "dist-bad"])
def test_check_of_a_broken_plugin_says_why(name: str, install: Install, bbn: Bbn) -> None:
    install("bad", "import nothing_of_that_name")
    with pytest.warns(PluginWarning, match="bad"):
        said = bbn("check", name)
    fault(said, r"plugin 'bad' \(dist-bad 1.2\) is not in use: ModuleNotFoundError: .*nothing_of_that_name")


def test_check_on_a_device_that_is_not_there(bbn: Bbn) -> None:
    fault(bbn("check", "bbn_attacks", "--device", "tpu"), "unknown device 'tpu'", "cpu")


# bbn new


@pytest.mark.parametrize("kind", ["attack", "defense", "architecture"])
def test_new_writes_a_package_and_says_what_to_do_next(kind: str, here: Path, bbn: Bbn) -> None:
    said = bbn("new", kind, "my_own")
    assert said.code == 0
    files = {str(path.relative_to(here)) for path in here.rglob("*") if path.is_file()}
    assert files == {
        "bbn-my-own/pyproject.toml", "bbn-my-own/README.md", "bbn-my-own/src/bbn_my_own/__init__.py",
        "bbn-my-own/src/bbn_my_own/my_own.py", "bbn-my-own/tests/test_contract.py",
    }  # fmt: skip
    *wrote, following = said.out.splitlines()
    assert set(wrote) == {f"wrote {file}" for file in files}
    assert following == "next: pip install --editable 'bbn-my-own[test]' && bbn check bbn-my-own"
    assert not [file for file in files if "$" in (here / file).read_text()]


def test_new_elsewhere(here: Path, bbn: Bbn) -> None:
    said = bbn("new", "attack", "mine", "--output", "deep/down")
    assert said.code == 0
    assert (here / "deep/down/src/bbn_mine/mine.py").exists()
    assert "'deep/down[test]'" in said.out


@pytest.mark.parametrize(
    "name", ["My_own", "my-own", "1st", "_mine", "mine_", "my__own", "a/b", "über", "class", "import"]
)
def test_new_refuses_a_name_that_is_none(name: str, here: Path, bbn: Bbn) -> None:
    fault(bbn("new", "attack", name), f"'{name}' is not a name for a component", "lower-case words joined by _")
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "name"),
    [("attack", "attacks"), ("defense", "defenses"), ("attack", "trigger_attack"), ("defense", "stage"),
     ("architecture", "model_spec"), ("attack", "field")],
)  # fmt: skip
def test_new_refuses_a_name_that_hides_something(kind: str, name: str, here: Path, bbn: Bbn) -> None:
    """`bbn_attacks` is a package of ours; a class Trigger would hide the Trigger that its module imports."""
    fault(bbn("new", kind, name), f"'{name}' is the name of something else", "choose another")
    assert list(here.iterdir()) == []


def test_new_does_not_overwrite(here: Path, bbn: Bbn) -> None:
    (here / "bbn-mine").mkdir()
    (here / "file").write_text("mine")
    fault(bbn("new", "attack", "mine"), "'bbn-mine' already exists", "--output")
    fault(bbn("new", "attack", "mine", "--output", "file"), "'file' already exists", "--output")
    fault(bbn("new", "attack", "mine", "--output", "file/below"), "'file/below.*' cannot be written")
    assert list((here / "bbn-mine").iterdir()) == []
    assert (here / "file").read_text() == "mine"


def test_new_of_an_unknown_kind(here: Path, bbn: Bbn) -> None:
    fault(bbn("new", "dataset", "mine"), "'dataset' is not one of 'attack', 'defense', 'architecture'", "bbn new -h")


# verbs of plugins

GREET = """
import click

@click.command("greet")
@click.argument("name")
def greet_command(name):
    \"\"\"Says hello.\"\"\"
    click.echo(f"hello {name}")
    return 7

nothing = "no command"
"""


def verbs(**targets: str) -> str:
    return f"@hookimpl\ndef bbn_commands():\n    return {targets}\n"


def test_a_verb_of_a_plugin_is_listed_and_runs(install: Install, bbn: Bbn) -> None:
    install("mine", verbs(greet="greeting:greet_command"), greeting=GREET)
    assert re.search(r"^  greet +Says hello\.$", bbn("--help").out, re.MULTILINE)
    said = bbn("greet", "you")
    assert (said.code, said.out, said.err) == (7, "hello you\n", "")
    assert "Says hello." in bbn("greet", "--help").out
    fault(bbn("greet"), "Missing argument 'NAME'", "bbn greet -h")


def test_a_misspelt_verb_of_a_plugin_is_suggested(install: Install, bbn: Bbn) -> None:
    install("mine", verbs(greet="greeting:greet_command"), greeting=GREET)
    fault(bbn("gret"), "unknown command 'gret'", "did you mean 'greet'")


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("greeting:nothing", "is not a click command"),
        ("greeting:absent", "cannot be imported: AttributeError"),
        ("not_there:command", "cannot be imported: ModuleNotFoundError: No module named 'not_there'"),
        ("exits:command", "cannot be imported: SystemExit: 3"),
    ],
)
def test_a_verb_that_is_broken_names_its_plugin(target: str, reason: str, install: Install, bbn: Bbn) -> None:
    install("mine", verbs(greet=target), greeting=GREET, exits="raise SystemExit(3)")
    fault(bbn("greet", "you"), rf"command 'greet' of plugin 'mine' \(dist-mine 1.2\) {reason}")


def test_a_verb_that_is_broken_does_not_stand_in_the_way_of_the_others(install: Install, bbn: Bbn) -> None:
    install("mine", verbs(greet="not_there:command", good="greeting:greet_command"), greeting=GREET)
    said = bbn("--help")
    assert said.code == 0, said.err
    for verb in ("run", "good", "greet"):
        assert re.search(f"^  {verb} ", said.out, re.MULTILINE)
    assert bbn("good", "you").out == "hello you\n"


def test_a_built_in_verb_is_not_replaced(install: Install, bbn: Bbn) -> None:
    install("mine", verbs(list="greeting:greet_command"), greeting=GREET)
    said = bbn("list", "attacks")
    assert said.code == 0
    assert "badnets" in said.out
    assert len(re.findall("^  list ", bbn("--help").out, re.MULTILINE)) == 1


def test_two_plugins_with_one_verb_are_both_named(install: Install, bbn: Bbn) -> None:
    install("one", verbs(greet="greeting:greet_command"), greeting=GREET)
    install("two", verbs(greet="greeting:greet_command"))
    with pytest.warns(PluginWarning, match="command 'greet' is provided by"):
        said = bbn("greet", "you")
    fault(said, r"'one' \(dist-one 1.2\) and 'two' \(dist-two 1.2\)", "BBN_DISABLE_PLUGINS=two")


@pytest.mark.parametrize("target", ["3", "print"])
def test_a_verb_that_is_no_string_breaks_its_plugin(target: str, install: Install, bbn: Bbn) -> None:
    install("mine", f"@hookimpl\ndef bbn_commands():\n    return {{'greet': {target}}}\n")
    with pytest.warns(PluginWarning, match=r"'mine' \(dist-mine 1.2\) is not loaded.*'greet' is"):
        fault(bbn("greet"), "unknown command 'greet'")


def test_verbs_are_no_components(install: Install, bbn: Bbn) -> None:
    install("mine", verbs(greet="greeting:greet_command"), greeting=GREET)
    assert "greet" not in bbn("list").out
    fault(bbn("show", "greet"), "unknown component 'greet'")
    assert bbn("check", "mine").out == "all checks passed\n"
