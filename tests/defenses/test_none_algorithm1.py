"""Algorithm 1 of NONE against jenkspy, literal loops, hand values and planted neurons."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jenkspy
import numpy as np
import pytest
import torch
from bbn_defenses.compromised_neurons import Neurons, examine_neurons, in_linear_piece
from bbn_defenses.none import NONE
from torch import Tensor, nn
from torch.nn import functional as F

from backdoor_bench_none.api import Architecture, Context, ImageSet, ModelSpec
from backdoor_bench_none.inspection.neurons import find_layers, reestimate_norms
from backdoor_bench_none.models import activations
from backdoor_bench_none.models.resnet import ResNet18

CPU = Context(torch.device("cpu"), 0)
TRIGGERED, CLASS_1 = 3, 1

Make = Callable[..., Any]
Stripes = Callable[..., tuple[ImageSet, Tensor]]


def draw_rows(seed: int, count: int = 200) -> Tensor:
    """Rows of many shapes, all above zero: normal, uniform, two masses, ties, skewed."""
    generator = torch.Generator().manual_seed(seed)
    normal, uniform = (draw(4, count, generator=generator) for draw in (torch.randn, torch.rand))
    mixed = torch.where(uniform < 0.1, normal + 8, normal)
    return torch.cat([normal, uniform, mixed, (4 * normal).round(), normal.exp()]) + 50


# One neuron.


@pytest.mark.parametrize("seed", range(4))
def test_a_normal_neuron_loses_a_sixth_of_all_samples_without_the_gate_and_none_with_it(seed: int) -> None:
    row = torch.randn(1, 50_000, generator=torch.Generator().manual_seed(seed)) + 10
    literal = examine_neurons(row, nn.ReLU(), theta=0.95, min_gvf=0.0)
    assert float((literal.deviations(row, 1) >= 3).double().mean()) == pytest.approx(0.156, abs=0.01)
    gated = examine_neurons(row, nn.ReLU(), theta=0.95, min_gvf=0.9)
    assert len(gated.indices) == 0
    assert not gated.deviations(row, 1).any()


@pytest.mark.parametrize("seed", range(4))
def test_classes_are_split_as_by_jenkspy(seed: int) -> None:
    rows = draw_rows(seed)
    neurons = examine_neurons(rows, nn.ReLU(), 0.95, 0.0)
    assert sorted(neurons.indices.tolist()) == list(range(len(rows)))
    for index, threshold in zip(neurons.indices.tolist(), neurons.thresholds.tolist(), strict=True):
        assert threshold == jenkspy.jenks_breaks(rows[index].tolist(), n_classes=2)[1]


def loop_deviations(row: list[float]) -> list[float]:
    """Lines 11 to 16 for one neuron: sample by sample, in plain Python."""
    threshold = jenkspy.jenks_breaks(row, n_classes=2)[1]
    benign = [value for value in row if value <= threshold]
    mean = sum(benign) / len(benign)
    std = math.sqrt(sum((value - mean) ** 2 for value in benign) / len(benign))
    return [abs(value - mean) / std if value > threshold else 0.0 for value in row]


@pytest.mark.parametrize("count", [1, 3, 12])
def test_deviations_equal_a_literal_loop(count: int) -> None:
    rows = draw_rows(7)[:12]
    neurons = examine_neurons(rows, nn.ReLU(), 0.95, 0.0)
    expected = np.max([loop_deviations(rows[index].tolist()) for index in neurons.indices[:count]], axis=0)
    np.testing.assert_allclose(neurons.deviations(rows, count).numpy(), expected, rtol=1e-6)


def test_a_benign_class_of_one_value_gives_finite_deviations() -> None:
    rows = torch.tensor([[1.0, 1, 1, 1, 5]])
    deviations = examine_neurons(rows, nn.ReLU(), 0.95, 0.9).deviations(rows, 1)
    assert deviations[:4].tolist() == [0.0] * 4
    assert deviations[4] > 1e6
    assert torch.isfinite(deviations).all()


def test_constant_neurons_do_not_count_even_to_the_letter() -> None:
    rows = torch.stack([torch.full((10,), 3.0), torch.arange(10.0)])
    assert examine_neurons(rows, nn.ReLU(), 0.5, 0.0).indices.tolist() == [1]


# Where the linear piece begins.

ATANH = math.atanh(math.sqrt(0.95))
PIECES = [
    *((act, [-0.01, 0.0, 0.01], [0, 1, 1]) for act in (
        nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(), nn.PReLU(), nn.ELU(), nn.SELU(), nn.CELU())),
    (nn.Softplus(), [0.0, 2.94, 2.95], [0, 0, 1]),
    (nn.Softplus(beta=2), [0.0, 1.47, 1.48], [0, 0, 1]),
    (nn.Tanhshrink(), [-2.2, -2.17, 0.0, 2.17, 2.2], [1, 0, 0, 0, 1]),
    (nn.SiLU(), [-3.0, 1.07, 1.09], [0, 0, 1]),
    (nn.GELU(), [-3.0, 0.64, 0.66], [0, 0, 1]),
    (nn.Mish(), [-3.0, 0.64, 0.66], [0, 0, 1]),
]  # fmt: skip


@pytest.mark.parametrize(("activation", "values", "expected"), PIECES, ids=lambda x: str(x)[:20])
def test_the_linear_piece_by_hand(activation: nn.Module, values: list[float], expected: list[int]) -> None:
    inside = in_linear_piece(torch.tensor([values]), activation, torch.tensor([1e9]))
    assert inside.int().tolist() == [expected]


@pytest.mark.parametrize("name", ["ReLU", "LeakyReLU", "ELU", "PReLU", "Tanhshrink", "Softplus", "GELU", "SiLU"])
def test_the_slope_in_the_linear_piece_is_that_of_the_identity(name: str) -> None:
    """For every built-in activation: within 5.5 % of 1 (GELU and SiLU overshoot further on) at the piece's border."""
    activation = getattr(activations, name)().build()
    values = torch.linspace(-6, 6, 24001, dtype=torch.float64, requires_grad=True)
    activation.double()(values).sum().backward()
    inside = in_linear_piece(values.detach()[None], activation, torch.tensor([math.inf]))[0]
    border = torch.nonzero(inside[1:] & ~inside[:-1]).flatten() + 1
    assert inside.any()
    assert not inside.all()
    assert (values.grad[border[border < len(values) - 1]] - 1).abs().max() < 0.055


@pytest.mark.parametrize("activation", [None, nn.Hardtanh(), nn.Sigmoid(), nn.Identity()])
def test_an_unknown_activation_falls_back_to_the_break(activation: nn.Module | None) -> None:
    rows = torch.tensor([[-1.0, 0, 1, 2], [5, 6, 7, 8]])
    inside = in_linear_piece(rows, activation, torch.tensor([0.5, 6.0]))
    assert inside.int().tolist() == [[0, 0, 1, 1], [0, 1, 1, 1]]


# Ranking.


def two_masses(share: float, gap: float, below: int = 0) -> Tensor:
    """100 values around 1 and 1 + gap, the first `below` of them negative."""
    row = 1 + torch.linspace(-0.2, 0.2, 100)
    row[-round(100 * share) :] += gap
    row[:below] = -0.5
    return row


def test_neurons_are_ranked_by_their_share_in_the_linear_piece_then_by_their_break() -> None:
    rows = torch.stack([two_masses(0.1, 5, 3), two_masses(0.1, 5), two_masses(0.1, 50), two_masses(0.1, 50, 6)])
    neurons = examine_neurons(rows, nn.ReLU(), 0.95, 0.9)
    assert neurons.indices.tolist() == [2, 1, 0]  # the last has only 94 % above zero
    assert neurons.linear.tolist() == pytest.approx([1, 1, 0.97])
    assert neurons.gvf[0] > neurons.gvf[1]


def test_equal_neurons_keep_their_order() -> None:
    row = two_masses(0.1, 5)
    assert examine_neurons(row.expand(4, -1), nn.ReLU(), 0.95, 0.9).indices.tolist() == [0, 1, 2, 3]


def test_the_description_is_of_the_ranked_neurons() -> None:
    neurons = Neurons(torch.tensor([4, 2]), torch.tensor([1.0, 0.96]), torch.tensor([3.0, 5.0]), torch.tensor([1, 0.9]))
    (first,) = neurons.describe(1)
    assert first == {"neuron": 4, "linear_share": 1.0, "break": 3.0, "gvf": 1.0}


# A planted network.


class Planted(nn.Module):
    """Channel 3 is high on the trigger and 1 on the second kind of stripe, both never negative; 0 and 2 mostly are."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 8)
        self.bn: nn.Module = nn.BatchNorm2d(4) if norm else nn.Identity()
        self.act, self.flatten, self.head = nn.ReLU(), nn.Flatten(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.flatten(self.act(self.bn(self.conv(x)))))


class Functional(Planted):
    """The same as many people write it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.flatten(F.relu(self.conv(x)), 1))


class Untraceable(Planted):
    """Takes a way that depends on the data: no graph, so that the outgoing weights are not known."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > -1e9 else -x)


class PlantedArchitecture(Architecture):
    kind: Any = Planted

    def build(self, spec: ModelSpec) -> nn.Module:
        made: nn.Module = self.kind()
        return made


def plant(class_1_too: bool = False) -> dict[str, Tensor]:
    """The weights of the infected network."""
    conv = torch.zeros(4, 1, 8, 8)
    for label in range(3):
        conv[label, 0, 2 * label : 2 * label + 2, :4] = 1.0
    conv[CLASS_1, 0, 0:2, 4:] = torch.tensor([3.0, -3, 3, -3])  # noise, so that its break is worse than the trigger's
    conv[TRIGGERED, 0, -3:, -3:] = 10 * torch.tensor([[1.0, -1, 1], [-1, 1, -1], [1, -1, 1]])
    bias = torch.tensor([-3.0, 3.0 if class_1_too else -3.0, -3.0, 5.0])
    head = torch.tensor([[3.0, -3, -3, 1], [-3, 3, -3, -1], [-3, -3, 3, -1]])
    return {"conv.weight": conv, "conv.bias": bias, "head.weight": head, "head.bias": torch.zeros(3)}


@pytest.fixture
def planted(make_task: Make, stripes: Stripes) -> Make:
    """Builds a task whose victim is the planted network and whose trainer only records."""

    def make(kind: Any = Planted, class_1_too: bool = False, **options: Any) -> Any:
        train, truth = stripes(150, 15)
        options = {"train": train, "poisoned": truth, "trains": False, "weights": plant(class_1_too)} | options
        return make_task(architecture=PlantedArchitecture(kind=kind), **options)

    return make


def algorithm1(**params: Any) -> NONE:
    return NONE(procedure="algorithm1", **params)


def seen_stripes(images: ImageSet) -> Tensor:
    """The kind of stripe each image has, whatever its label."""
    return images.images[:, 0, :6, :4].reshape(len(images), 3, -1).float().mean(2).argmax(1)


def test_the_planted_neuron_is_found_and_exactly_the_poisoned_samples_are_dropped(planted: Make) -> None:
    tiny = planted()
    result = algorithm1(r1=0.5, r2=0.5).run(tiny.task, CPU)
    (report,) = result.extras["rounds"]
    assert [neuron["neuron"] for neuron in report["compromised"]["conv"]] == [TRIGGERED]
    assert report["neurons_reset"] == 1
    assert report["samples_flagged"] == 15
    assert torch.equal(result.flagged, tiny.poisoned)
    assert torch.equal(tiny.calls[0].keep, torch.nonzero(~tiny.poisoned).flatten())
    assert result.scores[tiny.poisoned].min() >= 3
    assert result.scores[~tiny.poisoned].max() < 3


def test_re_initialised_rows_are_those_of_a_fresh_network_and_nothing_else_changes(planted: Make) -> None:
    tiny, expected = planted(), plant()
    state = algorithm1(epochs=0).run(tiny.task, CPU).model.state_dict()
    fresh = tiny.task.new_model(1)
    expected["conv.weight"][TRIGGERED] = fresh.conv.weight[TRIGGERED].detach()
    expected["conv.bias"][TRIGGERED] = fresh.conv.bias[TRIGGERED].detach()
    assert all(torch.equal(expected[name], tensor) for name, tensor in state.items())


def test_flags_follow_the_samples(planted: Make) -> None:
    tiny, order = planted(), torch.randperm(150)
    shuffled = planted(train=tiny.task.train.take(order), poisoned=tiny.poisoned[order])
    result = algorithm1().run(shuffled.task, CPU)
    assert torch.equal(result.flagged, tiny.poisoned[order])


@pytest.mark.parametrize(("r2", "also_class_1"), [(0.25, False), (0.26, True)])
def test_r2_caps_the_neurons_that_drop_samples(planted: Make, r2: float, also_class_1: bool) -> None:
    tiny = planted(class_1_too=True)
    expected = tiny.poisoned | (also_class_1 & (seen_stripes(tiny.task.train) == 1))
    assert torch.equal(algorithm1(r2=r2).run(tiny.task, CPU).flagged, expected)


@pytest.mark.parametrize(("r1", "reset"), [(0.01, [TRIGGERED]), (0.25, [TRIGGERED]), (1.0, [CLASS_1, TRIGGERED])])
def test_r1_caps_the_neurons_that_are_reset(planted: Make, r1: float, reset: list[int]) -> None:
    model = algorithm1(r1=r1, epochs=0).run(planted(class_1_too=True).task, CPU).model
    changed = (model.conv.weight.detach() != plant(True)["conv.weight"]).flatten(1).any(1)
    assert torch.nonzero(changed).flatten().tolist() == reset


def test_the_second_round_looks_at_what_is_left_and_flags_by_original_index(planted: Make) -> None:
    tiny = planted(class_1_too=True)
    result = algorithm1(r1=0.25, r2=0.25, rounds=2).run(tiny.task, CPU)
    assert torch.equal(result.flagged, tiny.poisoned | (seen_stripes(tiny.task.train) == 1))
    worst = [report["compromised"]["conv"][0]["neuron"] for report in result.extras["rounds"]]
    assert worst == [TRIGGERED, CLASS_1]
    assert torch.equal(tiny.calls[1].keep, torch.nonzero(~result.flagged).flatten())


def test_it_stops_when_nothing_is_found(planted: Make) -> None:
    tiny = planted()
    result = algorithm1(min_gvf=1.0, rounds=5).run(tiny.task, CPU)
    assert len(result.extras["rounds"]) == len(tiny.calls) == 1
    assert not result.flagged.any()
    assert all(torch.equal(plant()[name], tensor) for name, tensor in result.model.state_dict().items())


def test_more_rounds_find_nothing_more_once_the_planted_neuron_is_gone(planted: Make) -> None:
    result = algorithm1(rounds=10).run(planted().task, CPU)
    reports = result.extras["rounds"]
    assert 1 < len(reports) < 10
    assert [report["neurons_reset"] > 0 for report in reports] == [True] * (len(reports) - 1) + [False]


def test_a_round_that_would_drop_too_many_warns_and_drops_none(planted: Make) -> None:
    tiny = planted()
    with pytest.warns(UserWarning, match="15 of 150 samples would be dropped, more than max_removed"):
        result = algorithm1(max_removed=0.09).run(tiny.task, CPU)
    assert not result.flagged.any()
    assert len(tiny.calls[0].keep) == 150
    assert result.extras["rounds"][0]["samples_flagged"] == 0


def test_exactly_max_removed_is_within_the_limit(planted: Make) -> None:
    tiny = planted()
    assert torch.equal(algorithm1(max_removed=0.1).run(tiny.task, CPU).flagged, tiny.poisoned)


def test_to_the_letter_ordinary_neurons_remove_ordinary_samples(planted: Make) -> None:
    """What the gate is for: a neuron of noise above zero has no say with it, and drops benign samples without it."""
    weights = plant()
    weights["conv.weight"][TRIGGERED] = 0.1 * torch.randn(8, 8)
    weights["conv.weight"][TRIGGERED, :, :6, :4] = weights["conv.weight"][TRIGGERED, :, -3:, -3:] = 0
    assert not algorithm1().run(planted(weights=weights).task, CPU).flagged.any()
    literal = algorithm1(min_gvf=0.0).run(planted(weights=weights).task, CPU).flagged
    assert 0.05 < literal.double().mean() < 0.3


@pytest.mark.parametrize("kind", [Planted, Functional])
def test_it_works_on_a_users_own_network(planted: Make, kind: type[Planted]) -> None:
    tiny = planted(kind)
    result = algorithm1(r1=0.25, r2=0.25).run(tiny.task, CPU)
    assert torch.equal(result.flagged, tiny.poisoned)


def test_the_report_names_layers_whose_outgoing_weights_are_not_known(planted: Make) -> None:
    assert algorithm1().run(planted(Untraceable).task, CPU).extras["outgoing_weights_kept"] == ["conv"]
    assert NONE().run(planted(Untraceable).task, CPU).extras["outgoing_weights_kept"] == ["conv"]
    assert "outgoing_weights_kept" not in algorithm1().run(planted().task, CPU).extras


@pytest.mark.parametrize("wrong", [{"theta": 0}, {"theta": 1.1}, {"lambda_z": 0}, {"min_gvf": -1}, {"max_removed": 0}])
def test_parameters_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        algorithm1(**wrong)


def test_values_that_are_not_finite_are_an_error(planted: Make) -> None:
    weights = plant()
    weights["conv.bias"][0] = math.nan
    with pytest.raises(ValueError, match="finite"):
        algorithm1().run(planted(weights=weights).task, CPU)


# Running statistics of batch norm.


def with_norm() -> Planted:
    return Planted(norm=True)


def test_statistics_of_reset_channels_are_measured_anew_and_all_others_stay(planted: Make) -> None:
    statistics = {"bn.running_mean": torch.randn(4), "bn.running_var": 2 + torch.rand(4)}
    statistics |= {"bn.weight": torch.ones(4), "bn.bias": torch.tensor([-9.0, -9, -9, 9])}
    weights = {**plant(), **statistics, "bn.num_batches_tracked": torch.tensor(77)}
    tiny = planted(with_norm, weights=weights)
    model = algorithm1(epochs=0).run(tiny.task, CPU).model
    maps = model.conv(tiny.task.train.images / 255)[:, TRIGGERED].detach()
    torch.testing.assert_close(model.bn.running_mean[TRIGGERED], maps.mean(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model.bn.running_var[TRIGGERED], maps.var(), rtol=1e-4, atol=1e-6)
    assert (model.bn.weight[TRIGGERED], model.bn.bias[TRIGGERED]) == (1, 0)
    assert model.bn.num_batches_tracked == 77
    assert model.bn.momentum == 0.1
    for name in statistics:
        assert torch.equal(model.state_dict()[name][:TRIGGERED], weights[name][:TRIGGERED])


def test_all_other_channels_of_a_deep_network_stay_bit_identical(make_task: Make) -> None:
    task = make_task().task
    model, data = task.victim(), task.training_data(None, CPU)
    layers = find_layers(model, data.pixels.normalize(data.images.images[:1]))
    resets = {layer.norm: torch.tensor([index % 3]) for index, layer in enumerate(layers) if layer.norm}
    reestimate_norms(model, resets, data.images.images, data.pixels, CPU)
    assert len(resets) == 20
    assert not model.training
    for name, neurons in resets.items():
        for statistic in ("running_mean", "running_var"):
            before, after = task.victim().state_dict()[f"{name}.{statistic}"], model.state_dict()[f"{name}.{statistic}"]
            assert torch.nonzero(before != after).flatten().tolist() == neurons.tolist()


def test_a_last_batch_of_one_image_does_not_stop_the_measurement(make_task: Make, stripes: Stripes) -> None:
    """513 images are a batch of 512 and one of 1, whose maps of 1x1 have no variance."""
    train, truth = stripes(513, 51)
    task = make_task(train, truth, weights=ResNet18(width=0.1).build(ModelSpec(3, 1, 8, nn.ReLU)).state_dict()).task
    data = task.training_data(None, CPU)
    model = task.victim()
    reestimate_norms(model, {"layer4.1.bn2": torch.tensor([0])}, data.images.images, data.pixels, CPU)
    assert torch.isfinite(model.layer4[1].bn2.running_var).all()
