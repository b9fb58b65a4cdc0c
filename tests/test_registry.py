"""From a name to a component: suggestions, lazy targets, and classes that are no components."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from backdoor_bench_none.contracts.kinds import BASES
from backdoor_bench_none.errors import BenchError, ConfigError, PluginError
from backdoor_bench_none.registry.components import Registry
from backdoor_bench_none.registry.plugins import Plugins

BUILT_INS = [(entry.kind, entry.name) for entry in Plugins(external=False).entries]
SOURCE = """
from bbn_attacks.clean import Clean
from backdoor_bench_none import hookimpl

TARGETS = {
    "gone": "module_that_is_gone:Attack",
    "no_attribute": "bbnfile:Missing",
    "no_colon": "bbnfile",
    "raises": "raises_on_import:Attack",
    "exits": "exits_on_import:Attack",
    "not_a_class": "bbnfile:TARGETS",
    "of_another_kind": "bbn_defenses.no_defense:NoDefense",
    "class_of_another_kind": dict,
    "works": "bbnfile:Clean",
}

@hookimpl
def bbn_attacks():
    return TARGETS
"""


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    (tmp_path / "bbnfile.py").write_text(SOURCE)
    (tmp_path / "raises_on_import.py").write_text("1 / 0")
    (tmp_path / "exits_on_import.py").write_text("import sys\nsys.exit(3)")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield Registry(Plugins(external=False, bbnfile=tmp_path / "bbnfile.py"))
    for name in ("bbnfile", "raises_on_import", "exits_on_import"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def built_in() -> Registry:
    return Registry(Plugins(external=False))


# names


@pytest.mark.parametrize(("kind", "name"), BUILT_INS)
def test_every_built_in_can_be_loaded(kind: str, name: str, built_in: Registry) -> None:
    component = built_in.load(kind, name)
    assert issubclass(component, BASES[kind])
    assert component.__doc__
    assert all(field.description for field in component.model_fields.values())


def test_names_by_kind(built_in: Registry) -> None:
    assert built_in.names("attack")[:2] == ["clean", "badnets"]
    assert {"resnet18", "vgg16", "nin"} <= set(built_in.names("architecture"))
    assert built_in.names("flavour") == []


@pytest.mark.parametrize(
    ("kind", "name", "hint"),
    [
        ("attack", "badnet", "did you mean 'badnets'?"),
        ("architecture", "resnet8", "did you mean 'resnet18'?"),
        ("defense", "quux", "known: "),
        ("defense", "badnets", "known: "),
        ("flavour", "vanilla", "known: nothing"),
    ],
)
def test_unknown_name(kind: str, name: str, hint: str, built_in: Registry) -> None:
    with pytest.raises(ConfigError) as caught:
        built_in.load(kind, name)
    assert caught.value.message == f"unknown {kind} '{name}'"
    assert caught.value.hint is not None
    assert caught.value.hint.startswith(hint)


def test_find_by_name_alone(built_in: Registry) -> None:
    assert [entry.kind for entry in built_in.find("badnets")] == ["attack"]
    with pytest.raises(ConfigError, match="did you mean 'badnets'"):
        built_in.find("badnest")


# what stands behind a name


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gone", "cannot be imported: ModuleNotFoundError"),
        ("no_attribute", "cannot be imported: AttributeError"),
        ("no_colon", "cannot be imported: "),
        ("raises", "cannot be imported: ZeroDivisionError"),
        ("exits", "cannot be imported: SystemExit"),
        ("not_a_class", "is not a subclass of Attack"),
        ("of_another_kind", "is not a subclass of Attack"),
        ("class_of_another_kind", "is not a subclass of Attack"),
    ],
)
def test_broken_target_is_an_error_on_use_that_names_the_plugin(name: str, reason: str, registry: Registry) -> None:
    assert name in registry.names("attack")
    for use in (registry.load, registry.create):
        with pytest.raises(PluginError) as caught:
            use("attack", name)
        assert f"attack '{name}' of plugin 'bbnfile' (" in caught.value.message
        assert reason in caught.value.message
        assert "BBN_DISABLE_PLUGINS=bbnfile" in str(caught.value.hint)


def test_its_other_components_work(registry: Registry) -> None:
    assert registry.load("attack", "works").__name__ == "Clean"
    assert registry.load("attack", "badnets").__name__ == "BadNets"


# parameters


def test_create_with_parameters(built_in: Registry) -> None:
    assert built_in.create("attack", "badnets", {"size": 5}).model_dump()["size"] == 5
    assert built_in.create("attack", "badnets").model_dump()["size"] == 3


def test_all_faults_of_parameters_at_once(built_in: Registry) -> None:
    with pytest.raises(ConfigError) as caught:
        built_in.create("attack", "badnets", {"sise": 3, "poison_rate": 2, "target": [], "color": [0, 0, 256]})
    message = caught.value.message
    assert message.startswith("attack 'badnets': ")
    for part in ("sise: unknown key, did you mean 'size'?", "poison_rate: ", "target: ", "color.2: "):
        assert part in message
    assert "poison_rate" in str(caught.value.hint)


def test_component_without_parameters(built_in: Registry) -> None:
    with pytest.raises(BenchError, match="strength: unknown key") as caught:
        built_in.create("attack", "clean", {"strength": 1})
    assert caught.value.hint == "parameters: none"
