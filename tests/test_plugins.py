"""Plugins: what they provide, that a broken one harms nobody else, and the hooks of a run."""

from __future__ import annotations

import inspect
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

import pytest
import torch

from backdoor_bench_none.api import Context
from backdoor_bench_none.contracts.kinds import BASES
from backdoor_bench_none.errors import ConfigError, PluginError
from backdoor_bench_none.planning.plan import Plan, make_plan
from backdoor_bench_none.planning.stage_table import record_key
from backdoor_bench_none.registry import hookspecs
from backdoor_bench_none.registry.components import Registry
from backdoor_bench_none.registry.plugins import API_VERSION, Plugins, PluginWarning
from backdoor_bench_none.run.provenance import describe

HOOKS = {name: hook for name, hook in vars(hookspecs).items() if name.startswith("bbn_")}
HEADER = "from backdoor_bench_none import hookimpl\n"
BENCHMARK = """\
version: 1
name: test
matrix: {attack: [clean, badnets], defense: [no_defense, none], architecture: [mlp]}
"""
Install = Callable[..., None]
#: sets BBN_DISABLE_PLUGINS, and returns what is hidden besides
Disable = Callable[[str], list[str]]


def providing(*names: str, hook: str = "bbn_attacks") -> str:
    """The source of a plugin with lazy targets that are never imported."""
    return f"@hookimpl\ndef {hook}():\n    return {dict.fromkeys(names, 'nowhere:Nothing')}\n"


@pytest.fixture(autouse=True)
def clean_modules(tmp_path: Path) -> Iterator[None]:
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Installs a distribution with one module, `plugin_<name>`, as the plugin `name` or as `points` say."""

    def do(name: str, source: str = "", *, points: str | None = None, version: str = "1.2") -> None:
        folder = tmp_path / name
        dist_info = folder / f"dist_{name}-{version}.dist-info"
        dist_info.mkdir(parents=True)
        (folder / f"plugin_{name}.py").write_text(HEADER + dedent(source))
        (dist_info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: dist-{name}\nVersion: {version}\n")
        listed = points or f"{name} = plugin_{name}"
        (dist_info / "entry_points.txt").write_text(f"[backdoor_bench_none]\n{listed}\n")
        monkeypatch.syspath_prepend(str(folder))

    return do


def loaded(plugins: Plugins) -> list[str]:
    return [provider.plugin for provider in plugins.providers if not provider.builtin]


def run(plugins: Plugins, folder: Path) -> Plan:
    """Plan, and say of every cell that it ended."""
    made = plan(plugins, folder)
    for cell in made.cells:
        plugins.cell_finished(cell, object())  # type: ignore[arg-type]
    return made


def plan(plugins: Plugins, folder: Path) -> Plan:
    (folder / "benchmark.yaml").write_text(BENCHMARK)
    return make_plan(folder / "benchmark.yaml", Registry(plugins))


def assert_works(plugins: Plugins, *, external: list[str]) -> None:
    """The built-ins and the plugins in `external` are in use."""
    registry = Registry(plugins)
    assert {"clean", "badnets", *external} <= set(registry.names("attack"))
    assert {"no_defense", "none"} <= set(registry.names("defense"))
    assert loaded(plugins) == external


# what a plugin provides


def test_installed_plugin(install: Install) -> None:
    install("mine", providing("mine") + providing("shield", hook="bbn_defenses"))
    plugins = Plugins()
    assert_works(plugins, external=["mine"])
    registry = Registry(plugins)
    for kind, name in (("attack", "mine"), ("defense", "shield")):
        provider = registry.entry(kind, name).provider
        assert (provider.plugin, provider.distribution, provider.version) == ("mine", "dist-mine", "1.2")
        assert not provider.builtin
        assert str(provider) == "'mine' (dist-mine 1.2)"
    assert plugins.broken == []


def test_class_and_lazy_target_are_the_same_to_the_user(install: Install) -> None:
    source = """
    from bbn_attacks.clean import Clean

    class Mine(Clean):
        pass

    @hookimpl
    def bbn_attacks():
        return {"eager": Mine, "lazy": "plugin_mine:Mine"}
    """
    install("mine", source)
    registry = Registry(Plugins())
    assert registry.load("attack", "eager") is registry.load("attack", "lazy")
    assert registry.load("attack", "eager").__name__ == "Mine"


def test_several_plugins_of_one_distribution(install: Install) -> None:
    install("one", providing("one"))
    install("two", providing("two"), points="two = plugin_two\nthree = plugin_one")
    with pytest.warns(PluginWarning, match="already registered"):  # two names for one module
        plugins = Plugins()
    assert sorted(loaded(plugins)) in (["one", "two"], ["three", "two"])
    assert {"one", "two"} <= set(Registry(plugins).names("attack"))


def test_installed_plugins_can_be_left_out(install: Install) -> None:
    install("mine", providing("mine"))
    assert_works(Plugins(external=False), external=[])


def test_built_ins_are_there() -> None:
    plugins = Plugins(external=False)
    assert plugins.broken == []
    assert all(provider.builtin for provider in plugins.providers)
    assert {entry.provider.distribution for entry in plugins.entries} == {"backdoor-bench-none"}
    assert all(isinstance(entry.target, str) for entry in plugins.entries)


# broken plugins

BROKEN = {
    "import error": ("import nothing_of_that_name", "ModuleNotFoundError.*nothing_of_that_name"),
    "syntax error": ("def", "SyntaxError"),
    "exit": ("raise SystemExit('bye')", "SystemExit: bye"),
    "sys.exit": ("import sys; sys.exit(3)", "SystemExit: 3"),
    "unknown hook": ("@hookimpl\ndef bbn_atacks(): return {}", "unknown hook 'bbn_atacks'"),
    "wrong argument": ("@hookimpl\ndef bbn_cell_skip(cell, color): pass", "color"),
    "argument of a hook that has none": ("@hookimpl\ndef bbn_attacks(cell): return {}", "cell"),
    "raises": ("@hookimpl\ndef bbn_attacks(): return 1 / 0", "ZeroDivisionError"),
    "exits in a hook": ("@hookimpl\ndef bbn_attacks(): raise SystemExit(4)", "SystemExit: 4"),
    "no mapping": ("@hookimpl\ndef bbn_attacks(): return ['mine']", "bbn_attacks returned list, not a mapping"),
    "nothing": ("@hookimpl\ndef bbn_attacks(): pass", "bbn_attacks returned NoneType"),
    "neither class nor string": ("@hookimpl\ndef bbn_attacks(): return {'mine': 3}", "'mine' is neither a class nor"),
    "an instance": ("@hookimpl\ndef bbn_attacks(): return {'mine': object()}", "'mine' is neither a class nor"),
    "name that is no string": ("@hookimpl\ndef bbn_attacks(): return {3: 'a:B'}", "3"),
    "newer": (f"bbn_api_version = {API_VERSION + 1}", f"plugin API {API_VERSION + 1}, this is {API_VERSION}"),
    "older": (
        "bbn_api_version = 1",
        rf"plugin API 1, this is {API_VERSION}: every method that does work now takes \(task, context\).* docs/api.md",
    ),
    "module that has moved since": (
        "from backdoor_bench_none.hookspecs import hookspec",
        "ModuleNotFoundError: .*'backdoor_bench_none.hookspecs': .* an older version of the API: .* docs/api.md",
    ),
    "odd version": ("bbn_api_version = 'one'", "TypeError"),
    "second hook": (
        providing("mine") + "@hookimpl\ndef bbn_defenses(): return 3",
        "bbn_defenses returned int, not a mapping",
    ),
}


@pytest.mark.parametrize("way", BROKEN)
def test_broken_plugin_is_left_out_and_named(way: str, install: Install, tmp_path: Path) -> None:
    source, reason = BROKEN[way]
    install("aaa", providing("aaa"))
    install("bad", source)
    install("zzz", providing("zzz"))
    with pytest.warns(PluginWarning, match=rf"(?s)'bad' \(dist-bad 1.2\).*{reason}") as caught:
        plugins = Plugins()
    assert len(caught) == 1
    assert_works(plugins, external=["aaa", "zzz"])
    assert [(broken.provider.plugin, broken.provider.version) for broken in plugins.broken] == [("bad", "1.2")]
    assert not [entry for entry in plugins.entries if entry.provider.plugin == "bad"]
    assert len(plan(plugins, tmp_path).cells) == 4


def test_hooks_of_a_broken_plugin_are_not_called(install: Install, tmp_path: Path) -> None:
    install("bad", "@hookimpl\ndef bbn_modify_plan(cells): cells.clear()\n@hookimpl\ndef bbn_attacks(): return 3")
    with pytest.warns(PluginWarning, match="bad"):
        plugins = Plugins()
    assert len(plan(plugins, tmp_path).cells) == 4


def test_plugin_of_this_api_is_accepted(install: Install) -> None:
    install("mine", f"bbn_api_version = {API_VERSION}\n" + providing("mine"))
    assert_works(Plugins(), external=["mine"])


def test_missing_module_of_an_entry_point(install: Install) -> None:
    install("mine", points="mine = not_there")
    with pytest.warns(PluginWarning, match="'mine'.*ModuleNotFoundError.*not_there"):
        assert_works(Plugins(), external=[])


def test_two_plugins_of_one_name(install: Install, tmp_path: Path) -> None:
    """The first stays in full use, its hooks too; the second is left out."""
    keep_one = "@hookimpl\ndef bbn_modify_plan(cells): del cells[1:]\n"
    install("bbb", keep_one + providing("bbb"), points="same = plugin_bbb")
    install("aaa", keep_one + providing("aaa"), points="same = plugin_aaa")
    with pytest.warns(PluginWarning, match="'same'"):
        plugins = Plugins()
    assert loaded(plugins) == ["same"]
    assert len({"aaa", "bbb"} & set(Registry(plugins).names("attack"))) == 1
    assert len(plan(plugins, tmp_path).cells) == 1


def test_missing_module_of_another_distribution_with_a_similar_name(install: Install) -> None:
    install("mine", "import backdoor_bench_none_extras")
    with pytest.warns(PluginWarning, match="backdoor_bench_none_extras") as caught:
        Plugins()
    assert "older version" not in str(caught[0].message)


# equal names


def test_built_in_wins_over_a_plugin(install: Install) -> None:
    install("mine", providing("badnets", "other"))
    with pytest.warns(PluginWarning, match=r"attack 'badnets'.*BBN_DISABLE_PLUGINS=mine") as caught:
        plugins = Plugins()
    message = str(caught[0].message)
    assert "'mine' (dist-mine 1.2)" in message
    assert "'bbn_attacks' (backdoor-bench-none" in message
    registry = Registry(plugins)
    assert registry.entry("attack", "badnets").provider.builtin
    assert registry.load("attack", "badnets").__module__ == "bbn_attacks.badnets"
    assert registry.entry("attack", "other").provider.plugin == "mine"
    assert registry.names("attack").count("badnets") == 1


def test_two_strangers_with_the_same_name(install: Install) -> None:
    install("one", providing("same", "one"))
    install("two", providing("same", "two"))
    with pytest.warns(PluginWarning, match="attack 'same'"):
        registry = Registry(Plugins())
    with pytest.raises(PluginError) as caught:
        registry.load("attack", "same")
    for part in ("'one' (dist-one 1.2)", "'two' (dist-two 1.2)", "BBN_DISABLE_PLUGINS="):
        assert part in str(caught.value)
    assert registry.entry("attack", "one").provider.plugin == "one"
    assert registry.entry("attack", "two").provider.plugin == "two"


def test_equal_names_of_different_kinds_are_no_clash(install: Install) -> None:
    install("mine", providing("mine") + providing("badnets", hook="bbn_defenses"))
    assert_works(Plugins(), external=["mine"])


@pytest.mark.parametrize("left_out", ["one", "two"])
def test_disabling_one_resolves_the_clash(left_out: str, install: Install, disable_plugins: Disable) -> None:
    install("one", providing("same"))
    install("two", providing("same"))
    disable_plugins(left_out)
    entry = Registry(Plugins()).entry("attack", "same")
    assert {entry.provider.plugin, left_out} == {"one", "two"}


@pytest.mark.parametrize("value", ["bad", "dist-bad", "other, dist-bad", "bad,", " bad "])
def test_disabled_plugin_is_not_imported(value: str, install: Install, disable_plugins: Disable) -> None:
    install("bad", "import nothing_of_that_name")
    install("mine", providing("mine"))
    disable_plugins(value)
    plugins = Plugins()
    assert_works(plugins, external=["mine"])
    assert plugins.broken == []
    assert "plugin_bad" not in sys.modules


def test_built_ins_cannot_be_disabled(disable_plugins: Disable) -> None:
    disable_plugins("bbn_attacks,backdoor-bench-none")
    assert_works(Plugins(), external=[])


def test_disabled_as_an_argument(install: Install, disable_plugins: Disable) -> None:
    install("one", providing("one"))
    install("two", providing("two"))
    hidden = disable_plugins("two")
    assert_works(Plugins(disabled=["one", *hidden]), external=["two"])


# bbnfile.py


def test_bbnfile_beside_the_benchmark_is_a_plugin(tmp_path: Path) -> None:
    source = """
    from pydantic import Field
    from bbn_attacks.badnets import BadNets

    class Mine(BadNets):
        strength: int = Field(3, ge=1, description="how strong")

    @hookimpl
    def bbn_attacks():
        return {"mine": Mine}
    """
    (tmp_path / "bbnfile.py").write_text(HEADER + dedent(source))
    registry = Registry.default(tmp_path)
    entry = registry.entry("attack", "mine")
    assert entry.provider.plugin == "bbnfile"
    assert str(tmp_path / "bbnfile.py") in str(entry.provider)
    assert registry.plugins.bbnfile == tmp_path / "bbnfile.py"
    assert registry.create("attack", "mine", {"strength": 5, "target": 2}).model_dump()["strength"] == 5


def test_broken_bbnfile(tmp_path: Path) -> None:
    (tmp_path / "bbnfile.py").write_text("import nothing_of_that_name")
    with pytest.warns(PluginWarning, match=r"bbnfile\.py.*nothing_of_that_name"):
        registry = Registry.default(tmp_path)
    assert_works(registry.plugins, external=[])


def test_bbnfile_of_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disable_plugins: Disable
) -> None:
    (tmp_path / "bbnfile.py").write_text(HEADER + providing("mine"))
    monkeypatch.chdir(tmp_path)
    assert "mine" in Registry.default().names("attack")
    disable_plugins("bbnfile")
    assert "mine" not in Registry.default().names("attack")


def test_folder_without_bbnfile(tmp_path: Path) -> None:
    assert Registry.default(tmp_path).plugins.bbnfile is None


# the hooks of a run


def test_modify_plan_reorders_drops_and_adds(install: Install, tmp_path: Path) -> None:
    source = """
    from dataclasses import replace

    @hookimpl
    def bbn_modify_plan(config, cells):
        assert config.name == "test"
        cells.reverse()
        del cells[0]
        cells.append(replace(cells[0], seed=7))
    """
    titles = [cell.title for cell in plan(Plugins(external=False), tmp_path).cells]
    install("mine", source)
    changed = [cell.title for cell in plan(Plugins(), tmp_path).cells]
    assert changed == [*reversed(titles[:-1]), titles[2].replace("s0", "s7")]


def test_a_hook_may_take_fewer_arguments(install: Install, tmp_path: Path) -> None:
    install("mine", "@hookimpl\ndef bbn_modify_plan(cells): del cells[2:]\n@hookimpl\ndef bbn_cell_skip(): return 'no'")
    made = plan(Plugins(), tmp_path)
    assert len(made.cells) == 2
    assert set(made.skipped.values()) == {"no"}


def test_the_first_reason_to_skip_counts(install: Install, tmp_path: Path) -> None:
    install("one", "@hookimpl(trylast=True)\ndef bbn_cell_skip(cell): return 'last'")
    install("two", "@hookimpl\ndef bbn_cell_skip(cell): return None")
    install("three", "@hookimpl\ndef bbn_cell_skip(cell): return 'middle' if cell.defense.name == 'none' else None")
    first = "@hookimpl(tryfirst=True)\ndef bbn_cell_skip(cell): return"
    install("four", f"{first} '' if (cell.attack.name, cell.defense.name) == ('clean', 'none') else None")
    made = plan(Plugins(), tmp_path)
    reasons = {(cell.attack.name, cell.defense.name): made.skipped[record_key(cell)] for cell in made.cells}
    assert reasons == {
        ("clean", "no_defense"): "last",
        ("clean", "none"): "",
        ("badnets", "no_defense"): "last",
        ("badnets", "none"): "middle",
    }


def test_wrapper_around_a_hook_is_no_reason_to_skip(install: Install, tmp_path: Path) -> None:
    """It works as pluggy documents it, or is left out with a warning."""
    install("mine", "@hookimpl(wrapper=True)\ndef bbn_cell_skip(cell): return (yield)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PluginWarning)
        assert plan(Plugins(), tmp_path).skipped == {}


def test_every_plugin_is_told_of_a_finished_cell(install: Install, tmp_path: Path) -> None:
    source = "told = []\n@hookimpl\ndef bbn_cell_finished(cell, record): told.append((cell.title, record))"
    install("one", source)
    install("two", source)
    plugins = Plugins()
    cell = plan(plugins, tmp_path).cells[0]
    record = object()
    plugins.cell_finished(cell, record)  # type: ignore[arg-type]
    for name in ("plugin_one", "plugin_two"):
        assert sys.modules[name].told == [(cell.title, record)]


LIFECYCLE = {
    "bbn_modify_plan": "cells.pop()",
    "bbn_cell_skip": "return 'told so' if cell.attack.name == 'clean' else None",
    "bbn_cell_finished": "told.append(cell.title)",
}


@pytest.mark.parametrize("hook", LIFECYCLE)
@pytest.mark.parametrize("order", ["", "tryfirst=True", "trylast=True"])
def test_exception_in_a_hook_is_a_warning_and_the_next_plugin_has_its_turn(
    hook: str, order: str, install: Install, tmp_path: Path
) -> None:
    argument = "cells" if hook == "bbn_modify_plan" else "cell"
    install("bad", f"@hookimpl({order})\ndef {hook}({argument}): raise ValueError('no luck')")
    install("good", f"told = []\n@hookimpl\ndef {hook}({argument}): {LIFECYCLE[hook]}")
    plugins = Plugins()
    with pytest.warns(PluginWarning, match=f"'bad': {hook} raised ValueError: no luck"):
        made = run(plugins, tmp_path)
    assert len(made.cells) == (3 if hook == "bbn_modify_plan" else 4)
    assert set(made.skipped.values()) == ({"told so"} if hook == "bbn_cell_skip" else set())
    assert len(sys.modules["plugin_good"].told) == (4 if hook == "bbn_cell_finished" else 0)


def test_plugin_attack_in_a_plan_and_its_provenance(install: Install, tmp_path: Path) -> None:
    source = "from bbn_attacks.clean import Clean\n@hookimpl\ndef bbn_attacks(): return {'mine': Clean}"
    install("mine", source, version="3.4")
    registry = Registry(Plugins())
    path = tmp_path / "benchmark.yaml"
    path.write_text(BENCHMARK.replace("badnets", "mine"))
    cell = make_plan(path, registry).cells[2]
    assert cell.title == "digits/mine/no_defense/mlp/relu/s0"
    providers = describe(cell, Context(torch.device("cpu"), 0), registry)["providers"]
    assert providers["attack"] == "dist-mine 3.4"
    assert providers["defense"].startswith("backdoor-bench-none ")


# the interface


@pytest.mark.parametrize("name", HOOKS)
def test_hook_is_documented(name: str) -> None:
    text = inspect.getdoc(HOOKS[name]) or ""
    assert text.splitlines()[0].endswith((".", ";"))
    for argument in inspect.signature(HOOKS[name]).parameters:
        assert f":param {argument}: " in text


def test_every_kind_of_component_has_a_hook_and_a_base() -> None:
    without_arguments = {name for name, hook in HOOKS.items() if not inspect.signature(hook).parameters}
    assert set(hookspecs.NAMING_HOOKS) == without_arguments
    assert set(hookspecs.COMPONENT_HOOKS.values()) == set(BASES)


@pytest.mark.parametrize(
    "arguments", [["list"], ["list", "attacks"], ["list", "plugins"], ["--help"], ["list", "--help"]]
)
def test_listing_and_help_do_not_import_torch(arguments: list[str], tmp_path: Path) -> None:
    code = """
    import sys
    from backdoor_bench_none.cli.main import run_cli
    status = run_cli(sys.argv[1:])
    slow = {"torch", "torchvision", "cv2", "sklearn", "scipy", "matplotlib"} & set(sys.modules)
    sys.exit(f"imported {slow}" if slow else status)
    """
    command = [sys.executable, "-c", dedent(code), *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert ("badnets" in done.stdout) == (arguments in (["list"], ["list", "attacks"]))


def test_unknown_component_is_a_config_error(install: Install) -> None:
    install("mine", providing("sparkling"))
    with pytest.raises(ConfigError, match="did you mean 'sparkling'"):
        Registry(Plugins()).load("attack", "sparkly")
