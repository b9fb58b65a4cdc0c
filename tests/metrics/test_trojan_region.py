"""How complete and accurate a Trojan is, on planted Trojans whose shares are known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bbn_attacks.badnets import BadNets
from bbn_attacks.clean import Clean
from bbn_attacks.hidden_trigger import HiddenTrigger
from bbn_attacks.sig import SIG
from bbn_attacks.trojannet import TrojanNet
from bbn_attacks.wanet import WaNet
from torch import Tensor, nn

from backdoor_bench_none.api import Attack, Context, DatasetInfo, Evaluation, ImageSet, Trigger
from backdoor_bench_none.metrics.trojan_region import TrojanRegion, change_pattern, draw_trigger, shift
from backdoor_bench_none.results.store import Store

CPU = Context(torch.device("cpu"), 0)
SIDE = 6
INFO = DatasetInfo("black", (1, SIDE, SIDE), 3, 30, (0.0,), (1.0,), paper_target=0, paper_trigger="pixel")


class Corner(BadNets):
    """One pixel of half brightness, top left."""

    def trigger(self, info: DatasetInfo) -> Trigger:
        mask, pattern = torch.zeros(1, SIDE, SIDE), torch.zeros(1, SIDE, SIDE)
        mask[0, 0, 0], pattern[0, 0, 0] = 1, 128 / 255
        return Trigger(mask, pattern)


class Planted(nn.Module):
    """Class 0 where the corner is within `width` levels of the trigger's, else class 1."""

    def __init__(self, width: float) -> None:
        super().__init__()
        self.width = width / 255

    def forward(self, x: Tensor) -> Tensor:
        hit = (x[:, 0, 0, 0] - 128 / 255).abs() <= self.width + 1e-6
        return torch.stack([hit, ~hit, torch.zeros_like(hit)], 1).float()


class Always(nn.Module):
    """Class 0 for every image but black ones."""

    def forward(self, x: Tensor) -> Tensor:
        bright = x.flatten(1).any(1)
        return torch.stack([bright, ~bright, torch.zeros_like(bright)], 1).float()


def measure(model: nn.Module, attack: Attack, **params: Any) -> dict[str, float]:
    test = ImageSet(torch.zeros(30, 1, SIDE, SIDE, dtype=torch.uint8), torch.arange(30) % 3)
    predicted = torch.ones(30, dtype=torch.long)
    evaluation = Evaluation(
        model,
        predicted,
        test.labels,
        predicted,
        predicted,
        predicted,
        test=test,
        info=INFO,
        attack=attack.resolve(INFO),
    )
    return dict(TrojanRegion(**params).compute(evaluation, CPU))


def test_a_complete_and_accurate_trojan() -> None:
    """Proposition 3.5: the region is a hyperplane; of 33 whole levels within 16 one is on it, of all 256 one."""
    values = measure(Planted(0.4), Corner(), draws=400)
    assert values["complete"] == 1
    assert values["shifted"] == 0
    assert values["near"] == pytest.approx(1 / 32, abs=0.03)
    assert values["random"] < 0.01


def test_near_triggers_work_as_often_as_the_region_is_wide() -> None:
    """Levels change by up to 16 uniformly, and half of that is within the region."""
    values = measure(Planted(8), Corner(), draws=400)
    assert values["complete"] == 1
    assert values["near"] == pytest.approx(0.5, abs=0.08)


def test_a_trojan_that_any_trigger_fires_is_not_accurate() -> None:
    values = measure(Always(), Corner(), draws=50)
    assert (values["complete"], values["near"], values["shifted"]) == (1, 1, 1)
    assert values["random"] > 0.95


def test_a_network_without_the_trojan() -> None:
    assert set(measure(Planted(-1), Corner()).values()) == {0.0}


def test_images_that_have_the_label_anyway_do_not_count() -> None:
    """All predictions are 1, which all-to-all wants for class 0: the other twenty images remain."""
    values = measure(Planted(0.4), Corner(label_mode="all_to_all"), draws=1)
    assert values["complete"] == pytest.approx(10 / 20)  # 0 is wanted of class 2, and 2 of class 1


def test_attacks_without_a_fixed_trigger_have_no_values() -> None:
    assert measure(Planted(8), Clean()) == {}
    assert TrojanRegion().absent_for(Corner().resolve(INFO), INFO) == ""


@pytest.mark.parametrize(
    "attack",
    [
        Clean(),
        WaNet(),
        SIG(),
        BadNets(trigger_kind="dynamic", size=2),
        HiddenTrigger(source=1, target=0, size=2),
        TrojanNet(label_mode="all_to_all"),
    ],
    ids=lambda attack: type(attack).__name__,
)
def test_a_trigger_that_differs_between_images_is_not_measured(attack: Attack) -> None:
    info = replace(INFO, shape=(1, 8, 8))
    resolved = attack.resolve(info)
    message = f"the attack {type(attack).__name__} has no trigger that is the same for all images"
    assert TrojanRegion().absent_for(resolved, info) == message


@pytest.mark.parametrize("metric", ["trojan_region", "linearity"])
def test_a_matrix_with_attacks_of_all_kinds_is_planned(
    metric: str, write_benchmark: Callable[..., Path], bbn: Callable[..., Any]
) -> None:
    write_benchmark(defense="no_defense", attack="wanet, sig, badnets, clean", rest=f"metrics: [{metric}]\n")
    said = bbn("plan")
    assert said.code == 0, said.err


def test_cells_that_are_excluded_do_not_count(write_benchmark: Callable[..., Path], bbn: Callable[..., Any]) -> None:
    rest = "metrics: [trojan_region]\nexclude: [{attack: badnets, because: slow}]\n"
    write_benchmark(defense="no_defense", attack="clean, badnets", rest=rest)
    said = bbn("plan")
    assert said.code == 2
    assert "metric 'trojan_region' has no value in any cell" in said.err


def test_a_network_that_answers_with_the_target_anyway_is_told() -> None:
    every = torch.zeros(30, dtype=torch.long)
    test = ImageSet(torch.zeros(30, 1, SIDE, SIDE, dtype=torch.uint8), torch.arange(30) % 3)
    evaluation = Evaluation(
        Always(), every, test.labels, every, every, every, test=test, info=INFO, attack=Corner().resolve(INFO)
    )
    with pytest.warns(UserWarning, match="all of 30 test images the attacker's label without a trigger"):
        assert TrojanRegion().compute(evaluation, CPU) == {}


@pytest.mark.parametrize("metric", ["trojan_region", "linearity"])
def test_the_trojan_of_clean_networks_is_refused_in_the_plan(
    metric: str, write_benchmark: Callable[..., Path], bbn: Callable[..., Any]
) -> None:
    write_benchmark(defense="no_defense", attack="clean", rest=f"metrics: [curvature, {metric}]\n")
    said = bbn("plan")
    assert said.code == 2
    assert f"metric '{metric}' has no value in any cell: the attack Clean has no trigger that is" in said.err
    assert "metrics.1" in said.err


def test_triggers_are_moved_and_drawn() -> None:
    trigger, generator = Corner().trigger(INFO), torch.Generator().manual_seed(0)
    assert torch.nonzero(shift(trigger, 1, 2).mask[0]).tolist() == [[1, 2]]
    assert torch.equal(change_pattern(trigger, 0, generator).pattern, trigger.pattern)
    assert (change_pattern(trigger, 16, generator).pattern - trigger.pattern).abs().max() <= 16 / 255 + 1e-6
    places = {tuple(torch.nonzero(draw_trigger(trigger, generator).mask[0])[0].tolist()) for _ in range(300)}
    assert len(places) == SIDE * SIDE


def test_values_are_in_the_record(
    write_benchmark: Callable[..., Path], bbn: Callable[..., Any], tmp_path: Path
) -> None:
    write_benchmark(
        defense="no_defense", attack="clean, badnets", rest="metrics: [curvature, linearity, trojan_region]\n"
    )
    said = bbn("run", "-q")
    assert said.code == 0, said.out
    metrics_of = {record.axes["attack"].name: record.metrics for record in Store(tmp_path / "results").records()}
    curvature = {f"curvature.lambda_{place}" for place in (1, 2, 3)}
    assert set(metrics_of["clean"]) == curvature
    region = {f"trojan_region.{name}" for name in ("complete", "near", "shifted", "random")}
    linearity = {f"linearity.{name}" for name in ("r2", "r2_last", "positive_benign", "positive_triggered")}
    assert set(metrics_of["badnets"]) == curvature | region | linearity
