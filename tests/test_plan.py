"""From the benchmark file to its cells: faults at their place, labels, recipes, what is left out, and content keys."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from bbn_attacks.badnets import BadNets
from bbn_defenses.none import NONE
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from backdoor_bench_none.api import Attack, Choice, Combination, Component, Metric, Recipe, hookimpl
from backdoor_bench_none.contracts.cell import Cell
from backdoor_bench_none.contracts.recipe import NAMED_RECIPES, PAPER
from backdoor_bench_none.errors import ConfigError, DatasetError
from backdoor_bench_none.planning import stage_table
from backdoor_bench_none.planning.choices import cell_from_spec
from backdoor_bench_none.planning.plan import Plan, make_plan, plan_config
from backdoor_bench_none.planning.reading import parse_config
from backdoor_bench_none.planning.stage_table import (
    data_key,
    defense_key,
    initial_key,
    poison_key,
    record_key,
    victim_key,
)
from backdoor_bench_none.registry.components import Registry
from backdoor_bench_none.registry.plugins import Plugins

MATRIX = {"dataset": "digits", "attack": "badnets", "defense": "no_defense", "architecture": "mlp"}


@pytest.fixture(scope="module")
def registry() -> Registry:
    return Registry(Plugins(external=False))


def write(rest: str = "", **axes: str) -> str:
    lines = "".join(f"  {axis}: [{value}]\n" for axis, value in {**MATRIX, **axes}.items())
    return f"version: 1\nname: test\nmatrix:\n{lines}{rest}"


def make(registry: Registry, text: str) -> Plan:
    return plan_config(*parse_config(text, "b.yaml"), registry)


def faults(registry: Registry, text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        make(registry, text)
    return caught.value.message.splitlines()


def fault(registry: Registry, text: str) -> str:
    (line,) = faults(registry, text)
    return line


def labels(plan: Plan, axis: str) -> list[str]:
    return list(dict.fromkeys(cell.choices[axis].label for cell in plan.cells))


def only(registry: Registry, rest: str = "", **axes: str) -> Cell:
    (cell,) = make(registry, write(rest, **axes)).cells
    return cell


# faults; a § in a text marks where the fault is to be found


def unmark(text: str) -> tuple[str, str]:
    """The text without its mark, and file:line:column of the mark."""
    before, _, after = text.partition("§")
    return before + after, f"b.yaml:{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}"


def assert_fault(registry: Registry, marked: str, message: str) -> None:
    text, place = unmark(marked)
    line = fault(registry, text)
    assert line.startswith(f"{place}: ")
    assert message in line


@pytest.mark.parametrize(
    ("axis", "value", "message"),
    [
        ("attack", "clean, §badnet", "unknown attack 'badnet'; did you mean 'badnets'?"),
        ("attack", "{name: §badnet}", "unknown attack 'badnet'; did you mean 'badnets'?"),
        ("defense", "{name: §non}", "unknown defense 'non'; did you mean 'none'?"),
        ("architecture", "§resnet8", "unknown architecture 'resnet8'; did you mean 'resnet18'?"),
        ("dataset", "§digit", "unknown dataset 'digit'; did you mean 'digits'?"),
    ],
)
def test_unknown_component(axis: str, value: str, message: str, registry: Registry) -> None:
    assert_fault(registry, write(**{axis: value}), message)


@pytest.mark.parametrize(
    ("axis", "value", "message"),
    [
        ("attack", "{name: badnets, params: {sise: §5}}", "sise: unknown key, did you mean 'size'?"),
        ("attack", "{name: badnets, params: {size: 5, poison_rate: §1.5}}", "poison_rate: "),
        ("attack", "{name: badnets, params: {color: §[0, 300, 0]}}", "color.1: "),
        ("attack", "{name: badnets, params: {trigger_kind: §round}}", "trigger_kind: "),
        ("defense", "{name: none, params: {r1: §0}}", "r1: "),
        ("architecture", "{name: mlp, params: {hidden: §many}}", "hidden: "),
        ("dataset", "{name: digits, params: {image_size: §7}}", "image_size: "),
        ("attack", "{name: clean, params: {size: §1}}", "size: unknown key"),
        ("attack", "\n    {name: badnets,\n     params: {target: 3,\n       size: §0}}", "size: "),
    ],
)
def test_fault_of_a_parameter_is_placed_at_the_parameter(
    axis: str, value: str, message: str, registry: Registry
) -> None:
    assert_fault(registry, write(**{axis: value}), message)


def test_fault_of_a_swept_value_is_placed_in_the_sweep(registry: Registry) -> None:
    line = fault(registry, write(attack="\n    {name: badnets,\n     sweep: {size: [3,\n       0]}}"))
    assert line.split(":")[:2] in (["b.yaml", "7"], ["b.yaml", "8"])


def test_fault_of_the_executor_is_placed_there(registry: Registry) -> None:
    assert_fault(registry, write("executor: {name: §lokal}\n"), "unknown executor 'lokal'; did you mean 'local'?")
    assert_fault(registry, write("executor: {name: local, params: {slot: §2}}\n"), "did you mean 'slots'?")
    assert_fault(registry, write("executor: {name: local, slot: §2}\n"), "did you mean 'slots'?")


def test_fault_in_defaults_is_placed_there(registry: Registry) -> None:
    rest = "defaults:\n  attack:\n    badnets: {size: 5,\n      poison_rate: §-1}\n"
    assert_fault(registry, write(rest), "defaults.attack.badnets.poison_rate: attack 'badnets': ")


def test_fault_of_an_entry_is_placed_there_though_defaults_have_the_parameter_too(registry: Registry) -> None:
    rest = "defaults: {attack: {badnets: {size: 5}}}\n"
    assert_fault(registry, write(rest, attack="{name: badnets, params: {size: §0}}"), "size: ")


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ("defaults: {attak: §{badnets: {}}}\n", "defaults.attak: unknown axis, did you mean 'attack'?"),
        ("defaults: {attack: {badnet: §{}}}\n", "defaults.attack.badnet: unknown attack, did you mean 'badnets'?"),
        ("metrics: [§magic]\n", "unknown metric 'magic'"),
        ("include: [{attack: [clean, §cleen], defense: none, architecture: mlp}]\n",
         "include.0.attack.1.name: unknown attack 'cleen'; did you mean 'clean'?"),
    ],
)  # fmt: skip
def test_unknown_name_elsewhere(rest: str, message: str, registry: Registry) -> None:
    assert_fault(registry, write(rest), message)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ("{size: 17}", "trigger of 17 pixels"),
        ("{size: 17, trigger_kind: dynamic}", "trigger of 17 pixels"),
        ("{target: 10}", "target 10 is not a class of digits; its classes are 0 to 9"),
        ("{poison_rate: 0.0003}", "selects none of the 1297"),
    ],
)
def test_attack_that_does_not_suit_the_data_set(params: str, message: str, registry: Registry) -> None:
    assert_fault(registry, write(attack=f"clean, §{{name: badnets, params: {params}}}"), message)


def test_size_of_the_data_set_counts(registry: Registry) -> None:
    attack = "{name: badnets, params: {size: 17}}"
    assert make(registry, write(attack=attack, dataset="{name: digits, params: {image_size: 17}}")).cells


def test_all_faults_at_once(registry: Registry) -> None:
    axes = {"attack": "badnet, {name: badnets, params: {size: 0}}", "defense": "non", "architecture": "mpl"}
    lines = faults(registry, write(**axes))
    assert [line.split(": ")[1] for line in lines] == [
        "matrix.attack.0.name", "matrix.attack.1.params.size", "matrix.defense.0.name", "matrix.architecture.0.name",
    ]  # fmt: skip


@pytest.mark.parametrize("rest", ["exclude: [{defense: no_defense}]\n", "exclude: [{seed: 0}]\n"])
def test_empty_matrix(rest: str, registry: Registry) -> None:
    assert fault(registry, write(rest)) == "b.yaml: the matrix is empty: 'exclude' leaves no cell"


def test_file_as_a_whole(tmp_path: Path, registry: Registry) -> None:
    path = tmp_path / "b.yaml"
    path.write_text(write(defense="no_defense, none"))
    assert len(make_plan(path, registry).cells) == 2
    shipped = make_plan(Path(__file__).parents[1] / "benchmark.yaml", registry)
    assert shipped.skipped == {}
    assert len(shipped.cells) > 10


# axes and labels


def test_the_matrix_is_crossed_once(registry: Registry) -> None:
    text = write("seeds: [0, 1, 2]\n", attack="clean, badnets", defense="no_defense, none", activation="relu, elu")
    plan = make(registry, text)
    assert (
        len(plan.cells)
        == len({record_key(cell) for cell in plan.cells})
        == len({cell.title for cell in plan.cells})
        == 24
    )
    assert plan.excluded == 0
    assert plan.absent == ()
    assert [cell.seed for cell in plan.cells[:4]] == [0, 1, 2, 0]
    assert plan.cells[0].title == "digits/clean/no_defense/mlp/relu/s0"
    assert plan.cells[-1].title == "digits/badnets/none/mlp/elu/s2"


def test_sweep(registry: Registry) -> None:
    sweep = "{name: badnets, params: {target: 2}, sweep: {size: [3, 5], poison_rate: [0.01, 0.1, 0.2]}}"
    plan = make(registry, write(attack=f"clean, {sweep}"))
    assert labels(plan, "attack") == [
        "clean",
        *(f"badnets[size={size},poison_rate={rate}]" for size in (3, 5) for rate in (0.01, 0.1, 0.2)),
    ]
    swept = [cell.attack.component.model_dump() for cell in plan.cells[1:]]
    assert [(p["size"], p["poison_rate"], p["target"]) for p in swept] == [
        (size, rate, 2) for size in (3, 5) for rate in (0.01, 0.1, 0.2)
    ]


def test_sweep_wins_over_params_and_has_its_own_label(registry: Registry) -> None:
    entry = "{name: badnets, as: mine, params: {size: 7}, sweep: {size: [5]}}"
    cell = only(registry, attack=entry)
    assert cell.attack.label == "mine[size=5]"
    assert cell.attack.component.model_dump()["size"] == 5


@pytest.mark.parametrize(
    "attack",
    ["badnets, badnets", "badnets, {name: badnets, params: {size: 5}}", "{name: clean, as: x}, {name: badnets, as: x}",
     "{name: badnets, sweep: {size: [5, 5]}}"],
)  # fmt: skip
def test_two_entries_with_one_label(attack: str, registry: Registry) -> None:
    line = fault(registry, write(attack=attack))
    assert line.startswith("b.yaml:5:")  # the line of the attacks
    assert "there are two entries '" in line
    assert "'as'" in line


@pytest.mark.parametrize(
    "entries",
    ["attack: {name: badnets, params: {size: 5}}, defense: no_defense, architecture: mlp",
     "attack: badnets, defense: no_defense, architecture: {name: mlp, recipe: {epochs: 2}}"],
)  # fmt: skip
def test_no_two_cells_have_one_title(entries: str, registry: Registry) -> None:
    """A table could not tell them apart: it would average them as seeds of one row."""
    with pytest.raises(ConfigError, match="two entries"):
        make(registry, write(f"include: [{{{entries}}}]\n"))


def test_equal_entries_of_two_blocks_keep_their_own_recipes(registry: Registry) -> None:
    entry = "{name: mlp, recipe: {epochs: EPOCHS}}"
    block = "{attack: clean, defense: ac, architecture: [" + entry.replace("EPOCHS", "3") + "]}"
    plan = make(registry, write(f"include: [{block}]\n", architecture=entry.replace("EPOCHS", "2")))
    assert [cell.recipe.epochs for cell in plan.cells if cell.defense.name == "ac"] == [3]
    assert {cell.recipe.epochs for cell in plan.cells if cell.defense.name != "ac"} == {2}


def test_include_adds_cells_and_repeats_none(registry: Registry) -> None:
    block = "{attack: [clean, badnets], defense: no_defense, architecture: mlp}"
    plan = make(registry, write(f"include: [{block}]\n"))
    assert [cell.attack.name for cell in plan.cells] == ["badnets", "clean"]


@pytest.mark.parametrize(
    ("rule", "left"),
    [
        ("{attack: badnets}", ["clean/none/0", "clean/none/1", "clean/no_defense/0", "clean/no_defense/1"]),
        ("{attack: large}", ["clean/none/0", "clean/none/1", "clean/no_defense/0", "clean/no_defense/1"]),
        ("{attack: large, defense: none}",
         ["clean/none/0", "clean/none/1", "clean/no_defense/0", "clean/no_defense/1",
          "large/no_defense/0", "large/no_defense/1"]),
        ("{seed: 1}", ["clean/none/0", "clean/no_defense/0", "large/none/0", "large/no_defense/0"]),
        ("{attack: [clean], defense: [none, no_defense], seed: [0]}",
         ["clean/none/1", "clean/no_defense/1", "large/none/0", "large/none/1", "large/no_defense/0",
          "large/no_defense/1"]),
        ("{attack: clean}, {defense: none}", ["large/no_defense/0", "large/no_defense/1"]),
        ("{because: nothing is named}",
         ["clean/none/0", "clean/none/1", "clean/no_defense/0", "clean/no_defense/1", "large/none/0", "large/none/1",
          "large/no_defense/0", "large/no_defense/1"]),
    ],
)  # fmt: skip
def test_exclude(rule: str, left: list[str], registry: Registry) -> None:
    attack = "clean, {name: badnets, as: large, params: {size: 5}}"
    plan = make(registry, write(f"seeds: [0, 1]\nexclude: [{rule}]\n", attack=attack, defense="none, no_defense"))
    assert [f"{cell.attack.label}/{cell.defense.label}/{cell.seed}" for cell in plan.cells] == left
    assert plan.excluded == 8 - len(left)


def test_exclude_of_a_name_that_is_nowhere_is_a_fault(registry: Registry) -> None:
    """A misspelt rule would leave nothing out and say nothing."""
    assert_fault(registry, write("exclude: [{attack: §badnet}]\n"), "did you mean 'badnets'?")


class Skipper:
    @hookimpl
    def bbn_cell_skip(self, cell: Cell) -> str | None:
        return "not wanted" if cell.attack.name == "clean" else None


def test_reasons_to_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    def skip(self: Component, cell: Combination) -> str | None:
        return "too slow" if cell.seed else None

    plugins = Plugins(external=False)
    monkeypatch.setattr(plugins, "cell_skip", Skipper().bbn_cell_skip)
    monkeypatch.setattr(NONE, "skip", skip)
    text = write("seeds: [0, 1]\n", attack="clean, badnets", defense="no_defense, none")
    plan = make(Registry(plugins), text)
    reasons = {(c.attack.name, c.defense.name, c.seed): plan.skipped.get(record_key(c)) for c in plan.cells}
    assert reasons == {
        ("clean", "no_defense", 0): "not wanted",
        ("clean", "no_defense", 1): "not wanted",
        ("clean", "none", 0): "not wanted",
        ("clean", "none", 1): "too slow",
        ("badnets", "no_defense", 0): None,
        ("badnets", "no_defense", 1): None,
        ("badnets", "none", 0): None,
        ("badnets", "none", 1): "too slow",
    }


def test_select(registry: Registry) -> None:
    plan = make(registry, write(attack="clean, badnets"))
    chosen = plan.select(lambda cell: cell.attack.name == "clean")
    assert [cell.attack.name for cell in chosen.cells] == ["clean"]
    assert len(plan.cells) == 2


# parameters of the data set and of `defaults`


def test_attack_is_resolved_for_each_data_set(registry: Registry) -> None:
    sizes = "{name: digits, as: small}, {name: digits, as: large, params: {image_size: 32}}"
    cells = make(registry, write(dataset=sizes)).cells
    assert [cell.info.shape for cell in cells] == [(1, 16, 16), (1, 32, 32)]
    assert {cell.attack.component.model_dump()["trigger_kind"] for cell in cells} == {"label_consistent"}
    assert len({poison_key(cell) for cell in cells}) == 2


def test_defaults_stand_below_the_entry(registry: Registry) -> None:
    rest = "defaults: {attack: {badnets: {size: 5, target: 4}}}\n"
    for given_params, size in (("{}", 5), ("{size: 7}", 7)):
        attack = only(registry, rest, attack=f"{{name: badnets, params: {given_params}}}").attack.component.model_dump()
        assert (attack["size"], attack["target"]) == (size, 4)


def test_absent_data_set_is_planned_without_a_fingerprint(registry: Registry, tmp_path: Path) -> None:
    text = write(dataset=f"{{name: mnist, params: {{root: {tmp_path}, download: false}}}}", architecture="resnet18")
    plan = make(registry, text)
    assert plan.absent == ("mnist",)
    assert plan.cells[0].fingerprint is None
    assert plan.cells[0].info.train_size == 60_000
    with pytest.raises((ConfigError, DatasetError), match=r"(?i)mnist"):
        plan_config(*parse_config(text), registry, need_data=True)


# recipes

PARTS = {"dataset": "digits", "architecture": "mlp"}


def recipe(registry: Registry, defaults: Mapping[str, Any] | None = None, **entries: Any) -> Recipe:
    """The recipe of a plan with these recipes in `defaults` and in the entries of data set and architecture."""
    matrix = {
        axis: [{"name": name, **({"recipe": entries[axis]} if axis in entries else {})}] for axis, name in PARTS.items()
    }
    below = {axis: {PARTS[axis]: {"recipe": given}} for axis, given in (defaults or {}).items()}
    text = yaml.safe_dump(
        {"version": 1, "name": "t", "defaults": below, "matrix": {"attack": "clean", "defense": "none", **matrix}}
    )
    return make(registry, text).cells[0].recipe


def test_recipe_of_data_set_then_architecture(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    digits, mlp = registry.load("dataset", "digits"), registry.load("architecture", "mlp")
    monkeypatch.setattr(digits, "recipe", lambda self: {"epochs": 3, "lr": 0.3})
    monkeypatch.setattr(mlp, "recipe", lambda self, dataset: {"lr": 0.4, "momentum": 0.5})
    made = recipe(registry)
    assert (made.epochs, made.lr, made.momentum, made.batch_size) == (3, 0.4, 0.5, Recipe().batch_size)


@pytest.mark.parametrize("axis", PARTS)
def test_components_below_defaults_below_entries(axis: str, registry: Registry) -> None:
    assert recipe(registry).clip_norm == 1  # the multilayer perceptron's own
    assert recipe(registry, defaults={axis: {"clip_norm": 2}}).clip_norm == 2
    made = recipe(registry, defaults={axis: {"clip_norm": 2, "epochs": 5}}, **{axis: {"clip_norm": 3}})
    assert (made.clip_norm, made.epochs) == (3, 5)


@pytest.mark.parametrize(("entry", "below"), [("dataset", "architecture"), ("architecture", "dataset")])
def test_entry_wins_over_defaults_of_the_other_axis(entry: str, below: str, registry: Registry) -> None:
    assert recipe(registry, defaults={below: {"epochs": 7}}, **{entry: {"epochs": 3}}).epochs == 3


def test_architecture_wins_over_data_set_on_the_same_level(registry: Registry) -> None:
    assert recipe(registry, dataset={"epochs": 7}, architecture={"epochs": 3}).epochs == 3
    assert recipe(registry, {"dataset": {"epochs": 7}, "architecture": {"epochs": 3}}).epochs == 3


@pytest.mark.parametrize("given_recipe", ["paper", {"base": "paper"}, {"base": "paper", "epochs": 20}])
@pytest.mark.parametrize("axis", PARTS)
def test_the_papers_recipe(axis: str, given_recipe: Any, registry: Registry) -> None:
    made = recipe(registry, **{axis: given_recipe})
    expected = {**PAPER, "epochs": 20 if "epochs" in given_recipe else 200}
    assert {name: getattr(made, name) for name in expected} == expected
    assert (made.bias_lr_factor, made.head_lr_factor) == (1, 1)


def test_the_papers_recipe_for_nin(registry: Registry) -> None:
    made = only(registry, architecture="{name: nin, recipe: paper}").recipe
    assert (made.momentum, made.bias_lr_factor, made.head_lr_factor) == (0.95, 2, 0.1)
    assert (made.weight_decay, made.epochs, made.milestones) == (1e-4, 200, (80, 160))


@pytest.mark.parametrize(
    ("architecture", "activation", "init", "clip"),
    [("nin", "relu", "released", None), ("nin", "elu", "released", None), ("nin", "softplus", "calibrated", 1.0),
     ("vgg11", "relu", "released", 1.0), ("vgg16", "leaky_relu", "released", 1.0),
     ("vgg16", "softplus", "calibrated", 1.0)],
)  # fmt: skip
def test_the_papers_recipe_brings_initial_weights(
    architecture: str, activation: str, init: str, clip: float | None, registry: Registry
) -> None:
    cell = only(registry, architecture=f"{{name: {architecture}, recipe: paper}}", activation=activation)
    assert cell.architecture.component.model_dump()["init"] == init
    assert cell.recipe.clip_norm == clip
    assert bool(cell.recipe_deviation) == (clip is not None)
    without = only(registry, architecture=architecture, activation=activation)
    assert without.architecture.component.model_dump()["init"] == "calibrated"
    assert without.recipe_deviation == ""


def test_initial_weights_in_the_file_stand(registry: Registry) -> None:
    written = "{name: nin, params: {init: calibrated}, recipe: {base: paper, clip_norm: 1}}"
    assert only(registry, architecture=written).architecture.component.model_dump()["init"] == "calibrated"
    defaults = "defaults: {architecture: {vgg11: {init: calibrated, recipe: paper}}}\n"
    assert (
        only(registry, architecture="vgg11", rest=defaults).architecture.component.model_dump()["init"] == "calibrated"
    )


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"architecture": "§{name: nin, params: {init: calibrated}, recipe: paper}"}, "diverge within ten steps"),
        ({"architecture": "§{name: vgg16, recipe: paper}", "activation": "tanhshrink"}, "not seen to train"),
        ({"architecture": "§{name: vgg11, params: {init: calibrated}, recipe: {base: paper, clip_norm: null}}"},
         "set `clip_norm: 1`"),
    ],
)  # fmt: skip
def test_what_does_not_train_with_the_papers_recipe_is_refused(
    axes: dict[str, str], message: str, registry: Registry
) -> None:
    assert_fault(registry, write(**axes), message)


@pytest.mark.parametrize(
    ("axes", "rest", "message"),
    [
        ({"dataset": "{name: digits, recipe: §papr}"}, "", "unknown recipe 'papr', did you mean 'paper'?"),
        ({"dataset": "{name: digits, recipe: §{base: papr}}"}, "", "unknown recipe 'papr'"),
        ({"architecture": "{name: mlp, recipe: {lr: §0}}"}, "", "greater than 0"),
        ({"architecture": "{name: mlp, recipe: {lrr: §0}}"}, "", "unknown key, did you mean 'lr'?"),
        ({"dataset": "{name: digits, recipe: {lr: §0}}"}, "", "greater than 0"),
        ({}, "defaults: {architecture: {mlp: {recipe: {lr: §0}}}}\n", "greater than 0"),
        ({}, "defaults: {dataset: {digits: {recipe: §papr}}}\n", "unknown recipe 'papr'"),
    ],
)
def test_fault_of_a_recipe_is_placed_where_it_stands(
    axes: dict[str, str], rest: str, message: str, registry: Registry
) -> None:
    assert_fault(registry, write(rest, **axes), message)


@pytest.mark.parametrize("axis", ["attack", "defense"])
def test_recipe_where_none_is_used_is_a_fault(axis: str, registry: Registry) -> None:
    """It would be ignored without a word."""
    assert_fault(registry, write(**{axis: f"{{name: {MATRIX[axis]}, recipe: §{{epochs: 1}}}}"}), "recipe")


# content keys

BASE = {
    "attack": "{name: badnets, params: {target: 3}}",
    "defense": "{name: none, params: {epochs: 2}}",
    "architecture": "{name: mlp, params: {hidden: 16}}",
}
CHANGES: dict[str, tuple[str, dict[str, str]]] = {
    "seed": ("seeds: 1\n", {}),
    "parameter of the data set": ("", {"dataset": "{name: digits, params: {image_size: 17}}"}),
    "parameter of the attack": ("", {"attack": "{name: badnets, params: {target: 4}}"}),
    "parameter of the defense": ("", {"defense": "{name: none, params: {epochs: 3}}"}),
    "parameter of the architecture": ("", {"architecture": "{name: mlp, params: {hidden: 17}}"}),
    "parameter of the activation": ("", {"activation": "leaky_relu"}),
    "attack": ("", {"attack": "clean"}),
    "defense": ("", {"defense": "no_defense"}),
    "recipe": ("", {"architecture": "{name: mlp, params: {hidden: 16}, recipe: {epochs: 3}}"}),
    "recipe in defaults": ("defaults: {dataset: {digits: {recipe: {lr: 0.01}}}}\n", {}),
    "parameter in defaults": ("defaults: {attack: {badnets: {size: 4}}}\n", {}),
}


@pytest.fixture(scope="module")
def base(registry: Registry) -> Cell:
    return only(registry, **BASE)


@pytest.mark.parametrize("change", CHANGES)
def test_key_changes_with(change: str, base: Cell, registry: Registry) -> None:
    rest, axes = CHANGES[change]
    changed = only(registry, rest, **{**BASE, **axes})
    assert record_key(changed) != record_key(base)
    early = change.endswith(("attack", "data set", "seed"))
    assert (poison_key(changed) != poison_key(base)) == (early or change == "parameter in defaults")
    assert (victim_key(changed) != victim_key(base)) == (not change.endswith("defense"))


@pytest.mark.parametrize("axis", ["dataset", "attack", "defense", "architecture", "activation", "trainer"])
def test_key_changes_with_the_revision(
    axis: str, base: Cell, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    component = type(getattr(base, axis).component)
    monkeypatch.setattr(component, "revision", component.revision + 1)
    assert record_key(only(registry, **BASE)) != record_key(base)


def test_key_changes_with_fingerprint_and_evaluation(
    base: Cell, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = replace(base, fingerprint="0" * 64)
    assert record_key(other) != record_key(base)
    assert data_key(other) != data_key(base)
    monkeypatch.setattr(stage_table, "EVALUATION_REVISION", stage_table.EVALUATION_REVISION + 1)
    again = only(registry, **BASE)
    assert record_key(again) != record_key(base)
    assert defense_key(again) == defense_key(base)


class Threshold(Metric):
    at: float = 0.5


def test_the_record_key_alone_changes_with_the_metrics(base: Cell) -> None:
    """Every metric counts, with its parameters; the trained networks are the same for all."""
    half, third = (Choice("metric", "threshold", f"at_{at}", Threshold(at=at)) for at in (0.5, 0.3))
    cells = [replace(base, metrics=metrics) for metrics in ((), (half,), (third,), (half, third))]
    assert len({record_key(cell) for cell in cells}) == 4
    assert {defense_key(cell) for cell in cells} == {defense_key(base)}


SAME: dict[str, tuple[str, dict[str, str]]] = {
    "again": ("", {}),
    "labels": ("", {"attack": "{name: badnets, as: mine, params: {target: 3}}", "defense":
                    "{name: none, as: x, params: {epochs: 2}}"}),
    "a default written out": ("", {"attack": "{name: badnets, params: {target: 3, size: 3, trigger_kind: null}}"}),
    "the default of the data set": ("", {"attack": "{name: badnets, params: {target: 3, "
                                                   "trigger_kind: label_consistent}}"}),
    "a default in defaults": ("defaults: {attack: {badnets: {size: 3}}, architecture: {mlp: {hidden: 5}}}\n", {}),
    "an integer that is a float": ("", {"attack": "{name: badnets, params: {target: 3, opacity: 1}}"}),
    "results": ("results: elsewhere\n", {}),
    "budget": ("budget: {cell_timeout: 3h}\n", {}),
    "executor": ("executor: {name: local, slots: 2}\n", {}),
    "order of keys": ("", {"architecture": "{params: {hidden: 16}, name: mlp}"}),
    "a recipe that changes nothing": ("", {"dataset": "{name: digits, recipe: default}"}),
}  # fmt: skip


@pytest.mark.parametrize("way", SAME)
def test_key_stays_with(way: str, base: Cell, registry: Registry) -> None:
    rest, axes = SAME[way]
    assert record_key(only(registry, rest, **{**BASE, **axes})) == record_key(base)


def test_key_does_not_depend_on_where_the_data_lie(registry: Registry, tmp_path: Path) -> None:
    places = [
        f"{{name: mnist, params: {{root: {tmp_path / name}, download: {download}}}}}"
        for name, download in (("a", "true"), ("b", "true"), ("a", "false"))
    ]
    assert len({record_key(only(registry, dataset=place)) for place in places}) == 1


def test_what_the_defenses_of_a_seed_share(registry: Registry) -> None:
    defenses = "no_defense, none, {name: none, as: other, params: {r1: 0.5}}"
    cells = make(registry, write("seeds: [0, 1]\n", defense=defenses)).cells
    assert len({record_key(cell) for cell in cells}) == len({defense_key(cell) for cell in cells}) == 6
    for shared in (poison_key, victim_key, initial_key):
        assert len({(cell.seed, shared(cell)) for cell in cells}) == 2
        assert len({shared(cell) for cell in cells}) == 2
    assert len({data_key(cell) for cell in cells}) == 1


def test_what_attacks_and_architectures_share(registry: Registry) -> None:
    cells = make(registry, write(attack="clean, badnets", architecture="mlp, resnet18")).cells
    assert len({initial_key(cell) for cell in cells}) == 2
    assert len({poison_key(cell) for cell in cells}) == 2
    assert len({victim_key(cell) for cell in cells}) == 4


@pytest.mark.parametrize(
    "axes",
    [
        {},
        BASE,
        {"attack": "{name: badnets, params: {label_mode: all_to_all, color: [1, 2, 3]}}"},
        {"architecture": "{name: nin, recipe: paper}", "activation": "{name: leaky_relu, as: x}"},
        {"defense": '{name: none, params: {layers: ["a.*", b]}}'},
    ],
)
def test_cell_goes_through_json(axes: dict[str, str], registry: Registry) -> None:
    cell = only(registry, **axes)
    spec = cell.spec()
    again = cell_from_spec(json.loads(json.dumps(spec, allow_nan=False)), registry)
    assert again == cell
    assert (record_key(again), again.title) == (record_key(cell), cell.title)
    assert again.spec() == spec


def test_keys_are_short_and_hexadecimal(base: Cell) -> None:
    for key in (record_key, data_key, poison_key, initial_key, victim_key, defense_key):
        assert len(key(base)) == 16
        int(key(base), 16)


def test_the_attack_of_a_plan_is_the_resolved_one(base: Cell) -> None:
    assert isinstance(base.attack.component, Attack)
    assert base.attack.component == BadNets(target=3).resolve(base.info)


# the learning rate


@st.composite
def recipes(draw: st.DrawFn, schedule: str) -> tuple[Recipe, int]:
    values = {
        "epochs": draw(st.integers(1, 30)), "lr": draw(st.floats(1e-4, 10)), "warmup": draw(st.floats(0, 0.99)),
        "milestones": tuple(draw(st.lists(st.integers(1, 30), max_size=4))), "gamma": draw(st.floats(0.01, 1)),
    }  # fmt: skip
    return Recipe(schedule=schedule, **values), draw(st.integers(1, 20))


@settings(deadline=None, max_examples=60)
@given(recipes("one_cycle"))
def test_one_cycle_rises_to_the_highest_rate_and_falls_and_is_never_zero(case: tuple[Recipe, int]) -> None:
    recipe, steps = case
    rates = [recipe.lr_at(step, steps) for step in range(recipe.epochs * steps)]
    assert all(0 < rate <= recipe.lr * (1 + 1e-12) for rate in rates)
    assert math.isclose(max(rates), recipe.lr)
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert abs(top + 1 - recipe.warmup * len(rates)) <= 1


@settings(deadline=None, max_examples=60)
@given(recipes("step"))
def test_step_only_falls_and_only_at_milestones(case: tuple[Recipe, int]) -> None:
    recipe, steps = case
    rates = [recipe.lr_at(step, steps) for step in range(recipe.epochs * steps)]
    assert rates == sorted(rates, reverse=True)
    for step in range(1, len(rates)):
        if rates[step] != rates[step - 1]:
            assert step % steps == 0
            assert step // steps + 1 in recipe.milestones


@settings(deadline=None, max_examples=20)
@given(recipes("constant"))
def test_constant(case: tuple[Recipe, int]) -> None:
    recipe, steps = case
    assert {recipe.lr_at(step, steps) for step in range(recipe.epochs * steps)} == {recipe.lr}


@pytest.mark.parametrize(("epoch", "rate"), [(1, 0.1), (79, 0.1), (80, 0.01), (159, 0.01), (160, 0.001), (200, 0.001)])
def test_the_papers_learning_rate(epoch: int, rate: float) -> None:
    paper = Recipe(**PAPER)
    for step in ((epoch - 1) * 391, epoch * 391 - 1):
        assert math.isclose(paper.lr_at(step, 391), rate)


def test_one_cycle_by_hand() -> None:
    recipe = Recipe(epochs=2, lr=1, warmup=0.4)
    assert [recipe.lr_at(step, 5) for step in range(10)] == pytest.approx(
        [0.25, 0.5, 0.75, 1, *(left / 7 for left in (6, 5, 4, 3, 2, 1))]
    )


@pytest.mark.parametrize(
    "fields",
    [{"epochs": 0}, {"batch_size": 0}, {"lr": 0}, {"momentum": 1}, {"weight_decay": -1}, {"schedule": "cosine"},
     {"warmup": 1}, {"gamma": 0}, {"clip_norm": 0}, {"speed": 1}, {"bias_lr_factor": 0}],
)  # fmt: skip
def test_recipe_is_checked(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Recipe(**fields)


def test_named_recipes() -> None:
    assert set(NAMED_RECIPES) == {"default", "paper"}
