"""benchmark.yaml: every fault at its line and column, all of them at once."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backdoor_bench_none.contracts.config import Config
from backdoor_bench_none.errors import ConfigError
from backdoor_bench_none.planning import source
from backdoor_bench_none.planning.reading import parse_config, read_config
from backdoor_bench_none.planning.source import Source

MINIMAL = """\
version: 1
name: test
matrix:
  attack: [clean]
  defense: [none]
  architecture: [mlp]
"""


def parse(text: str) -> Config:
    return parse_config(text, "b.yaml")[0]


def faults(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    return caught.value.message.splitlines()


# what is right


def test_defaults() -> None:
    config = parse(MINIMAL)
    assert config.seeds == [0]
    assert config.results == Path("results")
    assert [entry.name for entry in config.matrix.dataset] == ["digits"]
    assert [entry.name for entry in config.matrix.activation] == ["relu"]
    assert [entry.name for entry in config.matrix.trainer] == ["centralized"]
    assert config.executor.name == "local"
    assert config.budget.cell_timeout is None


def test_the_benchmark_of_this_repository() -> None:
    config, _ = read_config(Path(__file__).parents[1] / "benchmark.yaml")
    assert "no_defense" in [entry.name for entry in config.matrix.defense]


@pytest.mark.parametrize("attack", ["badnets", "[badnets]", "{name: badnets}", "[{name: badnets}]"])
def test_a_name_a_mapping_or_a_list(attack: str) -> None:
    config = parse(MINIMAL.replace("[clean]", attack))
    assert [(entry.name, entry.params, entry.label) for entry in config.matrix.attack] == [("badnets", {}, None)]


def test_all_keys_of_an_entry() -> None:
    entry = parse(
        MINIMAL.replace("[clean]", "[{name: x, as: y, params: {a: 1}, sweep: {b: [1, 2]}, recipe: paper}]")
    ).matrix.attack[0]
    assert (entry.name, entry.label, entry.params, entry.sweep, entry.recipe) == (
        "x", "y", {"a": 1}, {"b": [1, 2]}, "paper",
    )  # fmt: skip


def test_single_values_where_lists_may_stand() -> None:
    config = parse(MINIMAL + "seeds: 3\nexclude: [{attack: clean, seed: 3}]\n")
    assert config.seeds == [3]
    assert config.exclude[0].attack == ["clean"]
    assert config.exclude[0].seed == [3]


@pytest.mark.parametrize("slots", ["{name: local, slots: 2}", "{name: local, params: {slots: 2}}"])
def test_executor_with_and_without_params(slots: str) -> None:
    executor = parse(f"{MINIMAL}executor: {slots}\n").executor
    assert (executor.name, executor.params) == ("local", {"slots": 2})


@pytest.mark.parametrize(
    ("written", "seconds"),
    [("90s", 90), ("30m", 1800), ("2h", 7200), ("1d", 86_400), ("1.5h", 5400), ("2 h", 7200), ("'  5m '", 300),
     ("12", 12), ("0.5", 0.5), ("null", None)],
)  # fmt: skip
def test_durations(written: str, seconds: float | None) -> None:
    assert parse(f"{MINIMAL}budget: {{cell_timeout: {written}}}\n").budget.cell_timeout == seconds


@pytest.mark.parametrize("written", ["2x", "h", "''", "2h30m", "-5m", "0s", "0", "-1", "[1h]", "ten minutes"])
def test_bad_durations(written: str) -> None:
    (fault,) = faults(f"{MINIMAL}budget: {{cell_timeout: {written}}}\n")
    assert fault.startswith("b.yaml:7:24: budget.cell_timeout: ")


def test_bad_duration_says_what_one_looks_like() -> None:
    (fault,) = faults(f"{MINIMAL}budget: {{cell_timeout: soon}}\n")
    assert "'soon' is not a duration such as 90s, 30m or 2h" in fault


def test_merge_keys_and_anchors() -> None:
    attacks = "[&a {name: badnets, params: {size: 3}}, {<<: *a, as: large, params: {size: 5}}]"
    config = parse(MINIMAL.replace("[clean]", attacks))
    assert [(e.name, e.label, e.params) for e in config.matrix.attack] == [
        ("badnets", None, {"size": 3}),
        ("badnets", "large", {"size": 5}),
    ]


# what is wrong


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("name: [1, 2", "b.yaml:2:1: "),
        ("version: 1\nname: test\n\tmatrix: 3", "b.yaml:3:1: "),
        ("version: 1\nname: a: b\n", "b.yaml:2:8: "),
        ("name: x\n---\nname: y\n", "b.yaml:2:1: "),
        ("name: *nowhere\n", "b.yaml:1:7: "),
        ("name: !tag x\n", "b.yaml:1:7: "),
        ("name: !!python/object/apply:os.getcwd []\n", "b.yaml:1:7: "),
    ],
)
def test_not_yaml(text: str, place: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert caught.value.message.startswith(place)
    assert caught.value.hint == "it is not YAML"


@pytest.mark.parametrize(
    "text", ["name: \x00\n", "name: !!timestamp 2024-13-45\n", "seeds: !!int many\n", "name: &a [*a]\n"]
)
def test_what_yaml_chokes_on_is_a_config_error_too(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^b\.yaml"):
        parse(MINIMAL.replace("name: test\n", "") + text)


@pytest.mark.parametrize("text", ["", "# nothing\n", "null\n", "- a\n- b\n", "version\n", "3\n"])
def test_no_mapping(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^b\.yaml:1:1: the file holds no mapping") as caught:
        parse(text)
    assert "bbn init" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("name: test", "nmae: test\nname: test", "b.yaml:2:7: nmae: unknown key, did you mean 'name'?"),
        ("  defense: [none]", "  defence: none\n  defense: [none]",
         "b.yaml:5:12: matrix.defence: unknown key, did you mean 'defense'?"),
        ("[clean]", "\n    - clean\n    - {name: x, parms: {}}",
         "b.yaml:6:24: matrix.attack.1.parms: unknown key, did you mean 'params'?"),
        ("[clean]", "{name: x, parms: {}}",
         "b.yaml:4:28: matrix.attack.0.parms: unknown key, did you mean 'params'?"),
        ("name: test", "name: test\nbudget: {timeout: 3}",
         "b.yaml:3:19: budget.timeout: unknown key, did you mean 'cell_timeout'?"),
        ("name: test", "name: test\nexclude: [{attak: x}]",
         "b.yaml:3:19: exclude.0.attak: unknown key, did you mean 'attack'?"),
        ("name: test", "name: test\nexclude: [{sede: 1}]",
         "b.yaml:3:18: exclude.0.sede: unknown key, did you mean 'seed'?"),
        ("name: test", "name: test\ninclude: [{attack: [{name: x, swep: {}}], defense: x, architecture: x}]",
         "b.yaml:3:37: include.0.attack.0.swep: unknown key, did you mean 'sweep'?"),
        ("name: test", "name: test\nmetrics: [{name: x, parms: {}}]",
         "b.yaml:3:28: metrics.0.parms: unknown key, did you mean 'params'?"),
    ],
)  # fmt: skip
def test_unknown_key(old: str, new: str, fault: str) -> None:
    (line,) = faults(MINIMAL.replace(old, new))
    assert line.startswith(fault)


def test_unknown_key_above_a_block_is_found_where_the_key_is_or_where_its_value_begins() -> None:
    (fault,) = faults(MINIMAL + "includes:\n  - attack: clean\n")
    assert fault.startswith(("b.yaml:7:1: includes: ", "b.yaml:8:3: includes: "))
    assert fault.endswith("did you mean 'include'?")


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("version: 1", "version: 2", "b.yaml:1:10: version: "),
        ("version: 1", "version: one", "b.yaml:1:10: version: "),
        ("name: test", "name: 3", "b.yaml:2:7: name: "),
        ("name: test", "name: ''", "b.yaml:2:7: name: "),
        ("name: test", "name: test\nseeds: [0, x]", "b.yaml:3:12: seeds.1: "),
        ("name: test", "name: test\nseeds: [0.5]", "b.yaml:3:9: seeds.0: "),
        ("name: test", "name: test\nseeds: []", "b.yaml:3:8: seeds: "),
        ("[clean]", "[]", "b.yaml:4:11: matrix.attack: "),
        ("[clean]", "[clean, 3]", "b.yaml:4:19: matrix.attack.1: "),
        ("[clean]", "[[clean]]", "b.yaml:4:12: matrix.attack.0: "),
        ("[clean]", "[{as: x}]", "b.yaml:4:12: matrix.attack.0.name: it is missing"),
        ("[clean]", "[{name: x, params: 3}]", "b.yaml:4:30: matrix.attack.0.params: "),
        ("[clean]", "[{name: x, sweep: {size: 3}}]", "b.yaml:4:36: matrix.attack.0.sweep.size: "),
        ("[clean]", "[{name: x, sweep: {size: []}}]", "b.yaml:4:36: matrix.attack.0.sweep.size: "),
        ("  defense: [none]\n", "", "b.yaml:4:3: matrix.defense: it is missing"),
        ("name: test\n", "", "b.yaml:1:1: name: it is missing"),
        ("name: test", "name: test\nmetrics: 3", "b.yaml:3:10: metrics: "),
        ("name: test", "name: test\ndefaults: {attack: [x]}", "b.yaml:3:20: defaults.attack: "),
        ("name: test", "name: test\nexecutor: [local]", "b.yaml:3:11: executor: "),
        ("name: test", "name: test\nbudget: 10m", "b.yaml:3:9: budget: "),
    ],
)  # fmt: skip
def test_wrong_value(old: str, new: str, fault: str) -> None:
    (line,) = faults(MINIMAL.replace(old, new))
    assert line.startswith(fault)
    assert len(line) > len(fault) - 10


def test_wrong_recipe_is_one_fault() -> None:
    (line,) = faults(MINIMAL.replace("[clean]", "[{name: x, recipe: 3}]"))
    assert line.startswith("b.yaml:4:30: matrix.attack.0.recipe: ")


def test_all_faults_at_once() -> None:
    text = """\
version: 1
name: 3
seeds: [a, 1, b]
matrx: 1
matrix:
  attack:
    - {name: badnets, parms: {}}
  defense: []
  architecture: mlp
budget:
  cell_timeout: soon
"""
    places = {fault.split(": ")[0]: fault.split(": ")[1] for fault in faults(text)}
    assert places == {
        "b.yaml:2:7": "name",
        "b.yaml:3:9": "seeds.0",
        "b.yaml:3:15": "seeds.2",
        "b.yaml:4:8": "matrx",
        "b.yaml:7:30": "matrix.attack.0.parms",
        "b.yaml:8:12": "matrix.defense",
        "b.yaml:11:17": "budget.cell_timeout",
    }


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (MINIMAL + "name: again\n", "b.yaml:7:1: name"),
        (MINIMAL + "  attack: [badnets]\n", "b.yaml:7:3: matrix.attack"),
        (MINIMAL.replace("[clean]", "[{name: x, name: y}]"), "b.yaml:4:22: matrix.attack.0.name"),
    ],
)
def test_repeated_key(text: str, place: str) -> None:
    assert faults(text) == [f"{place}: the key is given twice"]


def test_repeated_keys_stand_beside_other_faults() -> None:
    lines = faults(MINIMAL + "name: again\nseeds: x\n")
    assert [fault.split(": ")[1] for fault in lines] == ["name", "seeds.0"]
    assert lines[1].startswith("b.yaml:8:8: ")


# files


def test_read_config_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("version: 1\nname: é\n" + MINIMAL.partition("test\n")[2], encoding="utf-8")
    config, source = read_config(path)
    assert config.name == "é"
    assert source.place(("matrix", "defense", 0)) == f"{path}:5:13"
    path.write_text("version: 1\n")
    with pytest.raises(ConfigError) as caught:
        read_config(path)
    assert caught.value.message.startswith(f"{path}:1:1: ")


def test_file_that_is_not_there_or_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no file") as caught:
        read_config(tmp_path / "none.yaml")
    assert "bbn init" in str(caught.value.hint)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9\n")
    with pytest.raises(ConfigError, match=r"latin\.yaml:1:7: the byte 0xe9 is not UTF-8"):
        read_config(tmp_path / "latin.yaml")


# hostile and everyday input

ENTRIES = """\
version: 1
name: {name}
seeds: {seeds}
matrix:
  dataset: [{{name: digits, params: {{image_size: 8}}, recipe: {recipe}}}]
  attack: {attack}
  defense: no_defense
  architecture: mlp
{rest}
"""


def write(folder: Path, **values: str) -> Path:
    defaults = {"name": "test", "seeds": "0", "recipe": "{epochs: 1}", "attack": "badnets", "rest": ""}
    path = folder / "b.yaml"
    path.write_text(ENTRIES.format(**{**defaults, **values}), encoding="utf-8")
    return path


REFUSED = {
    "a tag": ({"rest": "metrics: !!bool maybe"}, "9:10: it is not true or false"),
    "an empty number": ({"seeds": "!!int ''"}, "3:8: it is not a whole number"),
    "a set": ({"rest": "metrics: !!set {a}"}, "9:10: the tag '!!set' is not allowed"),
    "bytes": ({"name": "!!binary aGk="}, "2:7: the tag '!!binary' is not allowed"),
    "a number as a key": ({"rest": "1: 2"}, "9:1: the file: the key 1 is no text"),
    "nothing as a key": ({"rest": "~: 2"}, "9:1: the file: the key ~ is no text"),
    "a truth value as a key": ({"rest": "true: 2"}, "9:1: the file: the key true is no text"),
    "a list as a key": ({"rest": "[a, b]: 2"}, "9:1: the file: the key a list or mapping is no text"),
    "a number as a parameter": ({"attack": "{name: badnets, params: {1: 2}}"}, "6:36: matrix.attack.params: the key 1"),
    "infinity": ({"recipe": "{lr: .inf}"}, "5:66: matrix.dataset.0.recipe.lr: recipe: lr: inf is not a finite number"),
    "too large a number": ({"recipe": "{lr: 1e400}"}, "inf is not a finite number"),
    "no number": ({"recipe": "{weight_decay: .nan}"}, "nan is not a finite number"),
    "a number as a recipe": ({"recipe": "3"}, "5:61: matrix.dataset.0.recipe: a recipe is a name or a mapping"),
    "a list as a recipe": (
        {"rest": "defaults: {architecture: {mlp: {recipe: [1]}}}"}, "defaults.architecture.mlp: a recipe is a name"
    ),
    "a long path": ({"rest": f"results: {'ä' * 128}"}, "9:10: results: a part of the path has 256 bytes"),
    "half a character": ({"name": '"\\ud800"'}, ":2:"),
    "an escape": ({"name": '"a\\x1b[31mb"'}, r"2:7: name: 'a\x1b[31mb' has a control character"),
    "an escape in a label": ({"attack": '{name: badnets, as: "a\\u202eb"}'}, r"'a\u202eb' has a control character"),
    "an escape in a key": ({"rest": '"a\\x9bb": 1'}, r"9:1: the file: the key 'a\x9bb' has a control character"),
    "two lines in a label": ({"attack": '{name: badnets, as: "a\\nb"}'}, "a name is one line"),
    "yes as a rate": ({"attack": "{name: badnets, params: {poison_rate: yes}}"}, "poison_rate: 'yes' is not a number"),
    "true as a rate": ({"attack": "{name: badnets, params: {poison_rate: true}}"}, "true is a truth value"),
    "true in a sweep": ({"attack": "{name: badnets, sweep: {poison_rate: [true]}}"}, "sweep.poison_rate.0: attack"),
    "true as a recipe's number": ({"recipe": "{epochs: true}"}, "5:70: matrix.dataset.0.recipe.epochs"),
    "true as a seed": ({"seeds": "[true, 1]"}, "3:8: seeds: true is a truth value"),
    "true as a version": ({"rest": "budget: {cell_timeout: true}"}, "budget.cell_timeout: true is a truth value"),
    "a range of seeds": ({"seeds": "0-4"}, "3:8: seeds.0: '0-4' is no seed; several stand in a list"),
    "minutes and seconds": ({"rest": "budget: {cell_timeout: 1:30}"}, "'1:30' is not a duration"),
    "too little memory": ({"rest": "budget: {memory: 16}"}, "9:18: budget.memory: 16 bytes are less than a process"),
    "infinite time": ({"rest": "budget: {cell_timeout: .inf}"}, "inf is not a finite number"),
    "an anchor in itself": ({"rest": "metrics: &m [*m]"}, "an alias stands inside its own anchor"),
    "deep lists": ({"rest": f"metrics: {'[' * 200}{']' * 200}"}, "in each other more than 100 deep"),
    "a whole number too long": ({"seeds": "9" * 5000}, "3:8: "),
    "a slot": ({"rest": "executor: {name: local, slots: yes}"}, "executor.slots: executor 'local': slots: Input"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_it_is_refused_with_its_place(what: str, tmp_path: Path, bbn: Any) -> None:
    values, fault = REFUSED[what]
    said = bbn("plan", write(tmp_path, **values))
    assert said.code == 2
    assert re.match(r"error: \S+b\.yaml:\d+:\d+: ", said.err)
    assert fault in said.err
    assert "\x1b" not in said.err


READ: dict[str, tuple[dict[str, str], Callable[[Config], object], object]] = {
    "1e-3": ({"recipe": "{lr: 1e-3}"}, lambda c: c.matrix.dataset[0].recipe["lr"], 0.001),  # type: ignore[index]
    "no": ({"name": "no"}, lambda c: c.name, "no"),
    "on": ({"attack": "{name: badnets, as: on}"}, lambda c: c.matrix.attack[0].label, "on"),
    "a date": ({"name": "2001-01-01"}, lambda c: c.name, "2001-01-01"),
    "a time": ({"name": "1:30"}, lambda c: c.name, "1:30"),
    "octal": ({"seeds": "[0o17, 0x1F, 010]"}, lambda c: c.seeds, [15, 31, 10]),
    "grouped digits": ({"seeds": "1_000"}, lambda c: c.seeds, [1000]),
    "memory": ({"rest": "budget: {memory: 16G}"}, lambda c: c.budget.memory, 16 * 2**30),
}  # fmt: skip


@pytest.mark.parametrize("what", READ)
def test_it_is_read_as_it_is_meant(what: str, tmp_path: Path) -> None:
    values, find, expected = READ[what]
    assert find(read_config(write(tmp_path, **values))[0]) == expected


def test_aliases_do_not_explode() -> None:
    lines = ["a: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"b{n}: &a{n + 1} [{', '.join([f'*a{n}'] * 10)}]" for n in range(8)]
    with pytest.raises(ConfigError, match="aliases make it more than 1,000,000 values"):
        parse("\n".join(lines))


@pytest.mark.parametrize(("content", "place"), [(b"name: caf\xe9\n", "1:10"), (b"a: 1\nb: \xc3\xa9\xff", "2:5")])
def test_bytes_that_are_no_utf8_have_a_place(content: bytes, place: str, tmp_path: Path) -> None:
    path = tmp_path / "b.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"b\.yaml:{place}: the byte 0x\w\w is not UTF-8"):
        read_config(path)


def test_a_path_that_cannot_be_is_no_bug(bbn: Any) -> None:
    said = bbn("plan", "a" * 300)
    assert said.code == 2
    assert "File name too long" in said.err
    assert "Traceback" not in said.err


def test_both_parsers_read_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where libyaml is absent, PyYAML's own parser reads the same values."""
    expected = Source(MINIMAL, "b.yaml").value
    monkeypatch.setitem(sys.modules, "yaml.cyaml", None)
    try:
        slow = importlib.reload(source)
        assert slow.Source(MINIMAL, "b.yaml").value == expected
        assert slow.read_value("[1e-3, no, 010]") == [0.001, "no", 10]
    finally:
        monkeypatch.undo()
        importlib.reload(source)
