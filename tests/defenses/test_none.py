"""NONE against a planted neuron, literal loops over the released procedure, and a real backdoor in digits."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
from bbn_defenses.compromised_neurons import accumulate_as_released, confidence_gaps, count_share, rank_neurons
from bbn_defenses.none import NONE
from pydantic import ValidationError
from torch import Tensor, nn

from backdoor_bench_none.api import Architecture, Context, ImageSet, ModelSpec
from backdoor_bench_none.inspection.neurons import collect_activations, find_layers
from backdoor_bench_none.models.resnet import ResNet18
from backdoor_bench_none.planning.plan import make_plan
from backdoor_bench_none.registry.components import Registry
from backdoor_bench_none.registry.plugins import Plugins
from backdoor_bench_none.results.store import Store
from backdoor_bench_none.run.stages import Stages

CPU = Context(torch.device("cpu"), 0)
PLANTED = 3

Make = Callable[..., Any]
Stripes = Callable[..., tuple[ImageSet, Tensor]]


class Planted(nn.Module):
    """Channels 0..2 see the three kinds of stripe, channel 3 the trigger's pattern, which no benign image shows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.flatten = nn.Conv2d(1, 4, 8, bias=False), nn.ReLU(), nn.Flatten()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.flatten(self.act(self.conv(x))))


class PlantedArchitecture(Architecture):
    def build(self, spec: ModelSpec) -> nn.Module:
        return Planted()


def plant() -> dict[str, Tensor]:
    """The weights of the infected network."""
    conv = torch.zeros(4, 1, 8, 8)
    for label in range(3):
        conv[label, 0, 2 * label : 2 * label + 2, :4] = 1.0
    conv[PLANTED, 0, -3:, -3:] = 10 * torch.tensor([[1.0, -1, 1], [-1, 1, -1], [1, -1, 1]])
    head = torch.tensor([[3.0, -3, -3, 1], [-3, 3, -3, -1], [-3, -3, 3, -1]])
    return {"conv.weight": conv, "head.weight": head, "head.bias": torch.zeros(3)}


@pytest.fixture
def planted(make_task: Make, stripes: Stripes) -> Make:
    """Builds a task whose victim is the planted network and whose trainer only records."""

    def make(**options: Any) -> Any:
        train, truth = stripes(150, 15)
        options = {"train": train, "poisoned": truth, "trains": False} | options
        return make_task(architecture=PlantedArchitecture(), weights=plant(), **options)

    return make


# The planted neuron.


@pytest.mark.parametrize("quirks", [False, True])
def test_the_planted_neuron_ranks_first(planted: Make, quirks: bool) -> None:
    tiny = planted()
    data = tiny.task.training_data(None, CPU)
    victim = tiny.task.victim()
    layers = find_layers(victim, data.pixels.normalize(data.images.images[:1]))
    values, likely = collect_activations(victim, layers, "pre_activation", data.images.images, data.pixels, CPU)
    gaps = confidence_gaps(values["conv"], likely, 0.1, 0.9, quirks)
    assert rank_neurons(gaps, quirks)[0] == PLANTED


def test_exactly_the_poisoned_samples_are_flagged(planted: Make) -> None:
    tiny = planted()
    result = NONE().run(tiny.task, CPU)
    assert torch.equal(result.flagged, tiny.poisoned)
    assert result.scores[tiny.poisoned].min() > result.scores[~tiny.poisoned].max()
    assert result.extras["rounds"][-1]["samples_flagged"] == 15


def test_the_released_quirk_flags_the_break_itself_too(planted: Make) -> None:
    tiny = planted()
    result = NONE(released_quirks=True).run(tiny.task, CPU)
    at_break = result.scores == result.scores[~tiny.poisoned].max()
    assert at_break.any()
    assert torch.equal(result.flagged, tiny.poisoned | at_break)


def test_the_planted_neuron_and_no_other_is_reset(planted: Make) -> None:
    tiny = planted()
    before = plant()
    result = NONE(r1=0.25).run(tiny.task, CPU)
    before["conv.weight"][PLANTED] = 0
    before["head.weight"][:, PLANTED] = 0
    assert all(torch.equal(before[name], tensor) for name, tensor in result.model.state_dict().items())
    assert result.extras["rounds"][-1]["neurons_reset"] == 1


def test_resetting_the_planted_neuron_disarms_the_trigger(planted: Make) -> None:
    tiny = planted()
    images = tiny.task.train.take(torch.nonzero(tiny.poisoned).flatten())
    assert (tiny.task.predict(tiny.task.victim(), CPU, images).argmax(1) == 0).all()
    model = NONE(r1=0.25).run(tiny.task, CPU).model
    seen = images.images[:, 0, :6, :4].reshape(len(images), 3, -1).float().mean(2).argmax(1)
    assert set(seen.tolist()) == {0, 1, 2}
    assert torch.equal(tiny.task.predict(model, CPU, images).argmax(1), seen)


def test_reinitialising_gives_the_neuron_the_weights_of_a_new_network(planted: Make) -> None:
    tiny = planted()
    expected = plant()
    result = NONE(r1=0.25, reset="reinitialize").run(tiny.task, CPU)
    expected["conv.weight"][PLANTED] = tiny.task.new_model(1).conv.weight[PLANTED].detach()
    assert all(torch.equal(expected[name], tensor) for name, tensor in result.model.state_dict().items())


@pytest.mark.parametrize("quirks", [False, True])
def test_flags_follow_the_samples(planted: Make, quirks: bool) -> None:
    tiny, order = planted(), torch.randperm(150)
    shuffled = planted(train=tiny.task.train.take(order), poisoned=tiny.poisoned[order])
    defense = NONE(released_quirks=quirks)
    expected = defense.run(tiny.task, CPU)
    result = defense.run(shuffled.task, CPU)
    assert torch.equal(result.flagged, expected.flagged[order])
    torch.testing.assert_close(result.scores, expected.scores[order])


# Fine-tuning.


def test_fine_tuning_keeps_what_was_not_flagged(planted: Make) -> None:
    tiny = planted(lr=0.3, epochs=50, weight_decay=0.25)
    model = NONE(lr=2e-3, epochs=4).run(tiny.task, CPU).model
    (call,) = tiny.calls
    assert torch.equal(call.keep, torch.nonzero(~tiny.poisoned).flatten())
    assert call.freeze_batchnorm
    assert (call.recipe.lr, call.recipe.epochs, call.recipe.schedule) == (2e-3, 4, "constant")
    assert call.recipe.weight_decay == 0.25
    assert torch.equal(call.data.images.images, tiny.task.train.images)
    assert call.model is model


def test_dropping_no_samples_keeps_every_one(planted: Make) -> None:
    tiny = planted()
    result = NONE(drop_samples=False).run(tiny.task, CPU)
    (call,) = tiny.calls
    assert call.keep is None or len(call.keep) == 150
    assert torch.equal(result.flagged, tiny.poisoned)


def test_without_epochs_nothing_is_trained(planted: Make) -> None:
    tiny = planted()
    NONE(epochs=0).run(tiny.task, CPU)
    assert tiny.calls == []


def test_every_round_looks_at_the_whole_set(planted: Make) -> None:
    tiny = planted()
    result = NONE(rounds=3).run(tiny.task, CPU)
    assert [len(call.data.images) for call in tiny.calls] == [150, 150, 150]
    assert result.scores.shape == result.flagged.shape == (150,)


def test_frozen_batch_norm_keeps_its_statistics_while_its_scale_learns(make_task: Make) -> None:
    tiny = make_task()
    before = tiny.task.victim().state_dict()
    after = NONE(lr=0.01, epochs=2).run(tiny.task, CPU).model.state_dict()
    statistics = [name for name in before if "running_" in name or "num_batches" in name]
    assert len(statistics) == 3 * 20
    assert all(torch.equal(before[name], after[name]) for name in statistics)
    scales = [name for name in before if "bn" in name and name.endswith(("weight", "bias"))]
    kept = [(before[name] != after[name]) & (after[name] != 0) for name in scales]
    assert all(changed.any() for changed in kept)


def test_the_same_seed_gives_the_same_result(make_task: Make) -> None:
    results = [NONE().run(make_task().task, CPU) for _ in range(2)]
    first, second = (torch.cat([t.flatten().double() for t in r.model.state_dict().values()]) for r in results)
    assert torch.equal(first, second)
    assert torch.equal(results[0].scores, results[1].scores)


@pytest.mark.parametrize("quirks", [False, True])
def test_constant_scores_flag_nothing(planted: Make, quirks: bool) -> None:
    train = ImageSet(torch.full((20, 1, 8, 8), 7, dtype=torch.uint8), torch.zeros(20, dtype=torch.int64))
    tiny = planted(train=train, poisoned=torch.zeros(20, dtype=torch.bool))
    assert not NONE(released_quirks=quirks).run(tiny.task, CPU).flagged.any()
    assert len(tiny.calls[0].keep) == 20


# Layers and counts.


def run_on_full_resnet(make_task: Make, defense: NONE) -> tuple[dict[str, int], dict[str, Any]]:
    """Rows that are zero, by convolution, and the report; the network is untrained, but sure of what it says."""
    train = ImageSet(torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8), torch.zeros(40, dtype=torch.int64))
    model = ResNet18().build(ModelSpec(3, 1, 8, nn.ReLU)).eval()
    with torch.no_grad():
        model.fc.weight *= 1000
        model.fc.bias -= model(train.images / 255).mean(0)
    tiny = make_task(train, torch.zeros(40, dtype=torch.bool), ResNet18(), model.state_dict())
    result = defense.run(tiny.task, CPU)
    layers = {name: module for name, module in result.model.named_modules() if isinstance(module, nn.Conv2d)}
    lost = {name: int((~conv.weight.flatten(1).any(1)).sum()) for name, conv in layers.items()}
    return lost, result.extras["rounds"][0]


RELEASED = {"tap": "convolution", "layers": ["layer2.*", "layer3.*", "layer4.*"], "epochs": 0, "r1": 0.03}


def test_a_full_resnet_loses_140_rows_with_the_released_settings(make_task: Make) -> None:
    lost, extras = run_on_full_resnet(make_task, NONE(**RELEASED))
    expected = {"layer2": 4, "layer3": 8, "layer4": 16}
    assert lost == {name: expected.get(name.split(".")[0], 0) for name in lost}
    assert sum(lost.values()) == extras["neurons_reset"] == 140
    assert extras["layers_inspected"] == 15


def test_the_released_accumulation_resets_more_in_layer4(make_task: Make) -> None:
    lost, extras = run_on_full_resnet(make_task, NONE(released_quirks=True, **RELEASED))
    assert 16 < lost["layer4.0.conv1"] <= 24
    assert lost["layer4.0.downsample.0"] == 16
    assert 16 < lost["layer4.0.conv2"] <= 32
    assert 32 < lost["layer4.1.conv1"] <= 48
    assert lost["layer4.1.conv1"] < lost["layer4.1.conv2"] <= 64
    assert extras["neurons_reset"] == sum(lost.values()) == 60 + sum(lost[x] for x in lost if x.startswith("layer4"))


def released_resets(start: int = 0) -> dict[str, Tensor]:
    """Lists of neurons as for r1 = 0.03, disjoint between layers."""
    names = {2: 4, 3: 8, 4: 16}
    resets = {}
    for stage, count in names.items():
        for part in ("0.downsample.0", "0.conv1", "0.conv2", "1.conv1", "1.conv2"):
            resets[f"layer{stage}.{part}"] = torch.arange(start, start + count)
            start += count
    return resets


def test_accumulation_by_hand() -> None:
    resets = released_resets()
    accumulated = accumulate_as_released(resets)
    counts = [
        len(accumulated[f"layer4.{part}"]) for part in ("0.conv1", "0.downsample.0", "0.conv2", "1.conv1", "1.conv2")
    ]
    assert counts == [24, 16, 32, 48, 64]
    assert all(torch.equal(accumulated[name], resets[name]) for name in resets if not name.startswith("layer4"))

    def joined(*names: str) -> set[int]:
        return {neuron for name in names for neuron in resets[name].tolist()}

    last = ("layer4.0.downsample.0", "layer4.0.conv2", "layer4.1.conv1", "layer4.1.conv2")
    assert set(accumulated["layer4.0.conv1"].tolist()) == joined("layer3.1.conv2", "layer4.0.conv1")
    for count in (2, 3, 4):
        assert set(accumulated[last[count - 1]].tolist()) == joined(*last[:count])


def test_accumulation_counts_a_neuron_once() -> None:
    resets = {name: torch.arange(16) for name in released_resets()}
    assert all(neurons.tolist() == list(range(16)) for neurons in accumulate_as_released(resets).values())


def test_other_networks_do_not_accumulate() -> None:
    resets = {"features.0": torch.tensor([1, 2]), "features.3": torch.tensor([3])}
    assert accumulate_as_released(resets) == resets


def test_patterns_choose_layers(planted: Make) -> None:
    assert NONE(layers=["con*"]).run(planted().task, CPU).extras["rounds"][0]["layers_inspected"] == 1
    with pytest.raises(ValueError, match="there are: conv"):
        NONE(layers=["layer9.*"]).run(planted().task, CPU)


@pytest.mark.parametrize(
    ("share", "total", "expected"),
    [(0.07, 100, 7), (0.03, 64, 2), (0.03, 128, 4), (0.03, 192, 6), (0.03, 256, 8), (0.03, 512, 16), (0.1, 10, 1),
     (0.0, 50, 1), (1.0, 9, 9), (0.3, 10, 3), (0.29, 100, 29), (1e-4, 10, 1), (0.5, 3, 2)],
)  # fmt: skip
def test_shares_are_rounded_up_without_floating_point_noise(share: float, total: int, expected: int) -> None:
    assert count_share(share, total) == expected


@pytest.mark.parametrize("wrong", [{"r1": 0}, {"r1": 1.1}, {"r2": -0.1}, {"rounds": 0}, {"lr": 0}, {"tap": "output"}])
def test_parameters_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        NONE(**wrong)


# The confidence gap.


def loop_gaps(values: np.ndarray, likely: np.ndarray, low: float, high: float, released: bool) -> np.ndarray:
    """Neurons, classes and samples one by one, as the released code; without its
    quirks, classes that lack either kind of sample are left out.
    """
    gaps = np.zeros((len(values), likely.shape[1]))
    for neuron in range(values.shape[0]):
        for k in range(likely.shape[1]):
            sure = [values[neuron, i] for i in range(values.shape[1]) if likely[i, k] > high]
            unsure = [values[neuron, i] for i in range(values.shape[1]) if likely[i, k] < low]
            if not sure:
                gaps[neuron, k] = 0.0 if released else -math.inf
            elif not unsure:
                gaps[neuron, k] = math.nan if released else -math.inf
            else:
                mean = sum(unsure) / len(unsure)
                deviation = math.sqrt(sum((x - mean) ** 2 for x in unsure) / len(unsure))
                gaps[neuron, k] = max(sure) - (mean + 3 * deviation)
    return gaps.max(1)


def draw_gap_data(seed: int, count: int = 60, absent: int | None = None) -> tuple[Tensor, Tensor]:
    """Activations (7, N) on several scales and sharp probabilities (N, 4); no sample is sure of class `absent`."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(7, count, generator=generator) * torch.tensor([0.01, 0.1, 1, 1, 5, 100, 1])[:, None] - 2
    logits = 8 * torch.randn(count, 4, generator=generator)
    if absent is not None:
        logits[:, absent] = logits.amin(1) - 1
    return values, logits.softmax(1)


@pytest.mark.parametrize("absent", [None, 2])
@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_gaps_equal_a_literal_loop(seed: int, released: bool, absent: int | None) -> None:
    values, likely = draw_gap_data(seed, absent=absent)
    gaps = confidence_gaps(values, likely, 0.1, 0.9, released)
    expected = loop_gaps(values.double().numpy(), likely.numpy(), 0.1, 0.9, released)
    np.testing.assert_allclose(gaps.numpy(), expected, rtol=1e-9, atol=1e-9)


def test_gaps_far_from_zero_equal_a_literal_loop() -> None:
    values, likely = draw_gap_data(0)
    values = values.double() + 1e4
    gaps = confidence_gaps(values, likely, 0.1, 0.9)
    np.testing.assert_allclose(gaps.numpy(), loop_gaps(values.numpy(), likely.numpy(), 0.1, 0.9, False), atol=1e-4)


def test_gap_by_hand() -> None:
    likely = torch.tensor([[0.95, 0.05], [0.92, 0.08], [0.05, 0.95], [0.08, 0.92], [0.5, 0.5]])
    values = torch.tensor([[10.0, 4, 1, 3, 99], [0.0, 0, 5, 7, 99]])
    # class 0: 10 - (2 + 3 * 1), class 1: 3 - (7 + 3 * 3); class 0: 0 - (6 + 3 * 1), class 1: 7 - 0
    assert confidence_gaps(values, likely, 0.1, 0.9).tolist() == pytest.approx([5.0, 7.0])


def test_an_absent_class_floors_the_released_gap_at_zero() -> None:
    likely = torch.tensor([[0.95, 0.04, 0.01], [0.04, 0.95, 0.01], [0.95, 0.04, 0.01], [0.04, 0.95, 0.01]])
    values = torch.tensor([[1.0, 1, -1, -1], [3.0, 0, 3, 0]])
    strict = confidence_gaps(values, likely, 0.1, 0.9)
    assert strict[0] < 0
    assert confidence_gaps(values, likely, 0.1, 0.9, released_quirks=True).tolist() == [0.0, strict[1].item()]


def test_without_sure_samples_all_neurons_are_alike() -> None:
    values, likely = torch.rand(5, 20), torch.full((20, 4), 0.25)
    assert rank_neurons(confidence_gaps(values, likely, 0.1, 0.9)).tolist() == [0, 1, 2, 3, 4]


def test_a_class_without_an_unsure_sample_is_ignored_but_nan_and_first_in_the_released_code() -> None:
    likely = torch.tensor([[0.95, 0.05], [0.97, 0.03], [0.93, 0.07]])  # nobody is unsure of class 0, nor sure of 1
    values = torch.rand(4, 3)
    assert confidence_gaps(values, likely, 0.1, 0.9).tolist() == [-math.inf] * 4
    assert confidence_gaps(values, likely, 0.1, 0.9, released_quirks=True).isnan().all()


def test_nan_ranks_first_in_the_released_code() -> None:
    gaps = torch.tensor([1.0, math.nan, 5.0, 0.0, math.nan])
    assert rank_neurons(gaps, released_quirks=True).tolist() == [1, 4, 2, 0, 3]
    assert sorted(np.argsort(gaps.numpy())[::-1][:2].tolist()) == [1, 4]  # as the released code sorts


def test_equal_gaps_rank_in_order() -> None:
    assert rank_neurons(torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0])).tolist() == [1, 3, 0, 2, 4]


# The whole way.

BENCHMARK = """
version: 1
name: whole way
seeds: [1, 2, 3, 4, 5]
matrix:
  dataset: [digits]
  attack: [{name: badnets, params: {poison_rate: 0.1}}]
  defense: [no_defense, none]
  architecture: [{name: resnet18, params: {width: 0.25}, recipe: {epochs: 8}}]
"""


@pytest.mark.slow
def test_none_removes_a_real_backdoor(tmp_path: Path) -> None:
    (tmp_path / "benchmark.yaml").write_text(BENCHMARK)
    store = Store(tmp_path / "results")
    store.create()
    plan = make_plan(tmp_path / "benchmark.yaml", Registry(Plugins(external=False)))
    records = {(cell.defense.name, cell.seed): Stages(cell, store, CPU).evaluate() for cell in plan.cells}
    rates: dict[str, list[float]] = {}
    for seed in range(1, 6):
        before, after = (records[name, seed].counts for name in ("no_defense", "none"))
        detection = records["none", seed].detection
        assert before is not None
        assert after is not None
        assert detection is not None
        assert before.attack_success_rate is not None
        assert after.attack_success_rate is not None
        assert after.robust_accuracy is not None
        assert detection.tpr is not None
        assert detection.fpr is not None
        assert detection.true_positive + detection.false_negative == 130
        measured = {
            "tpr": detection.tpr,
            "fpr": detection.fpr,
            "won ASR": before.attack_success_rate.rate - after.attack_success_rate.rate,
            "lost BA": before.benign_accuracy.rate - after.benign_accuracy.rate,
            "RA": after.robust_accuracy.rate,
        }
        for name, rate in measured.items():
            rates.setdefault(name, []).append(rate)
    # measured for every seed: TPR 1, FPR 0; ASR falls from 1 to at most 0.018, BA by at most 0.006; RA 0.95 to 0.98
    medians = {name: median(values) for name, values in rates.items()}
    assert medians["tpr"] >= 0.9
    assert medians["fpr"] <= 0.05
    assert medians["won ASR"] >= 0.8
    assert medians["lost BA"] <= 0.05
    assert medians["RA"] >= 0.8
