"""How linear neurons are on the way to the trigger, on planted networks whose fits are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bbn_attacks.badnets import BadNets
from bbn_attacks.clean import Clean
from torch import Tensor, nn

from backdoor_bench_none.api import Attack, Context, DatasetInfo, Evaluation, ImageSet, Trigger
from backdoor_bench_none.metrics.linearity import Linearity, fit_of_lines

CPU = Context(torch.device("cpu"), 0)
INFO = DatasetInfo("black", (1, 2, 2), 3, 6, (0.0,), (1.0,), paper_target=0, paper_trigger="pixel")


class Corner(BadNets):
    """One pixel of 100 levels."""

    def trigger(self, info: DatasetInfo) -> Trigger:
        mask, pattern = torch.zeros(1, 2, 2), torch.zeros(1, 2, 2)
        mask[0, 0, 0], pattern[0, 0, 0] = 1, 100 / 255
        return Trigger(mask, pattern)


def measure(model: nn.Module, attack: Attack) -> dict[str, float]:
    test = ImageSet(torch.zeros(6, 1, 2, 2, dtype=torch.uint8), torch.arange(6) % 3)
    predicted = torch.ones(6, dtype=torch.long)
    attack = attack.resolve(INFO)
    evaluation = Evaluation(
        model.eval(), predicted, test.labels, predicted, predicted, predicted, test=test, info=INFO, attack=attack
    )
    return dict(Linearity().compute(evaluation, CPU))


def planted(*rows: tuple[float, float]) -> nn.Sequential:
    """Hidden neurons `slope * pixel + offset`, then one of them again behind its ReLU."""
    first, second, head = nn.Linear(4, len(rows)), nn.Linear(len(rows), 1), nn.Linear(1, 3)
    for parameter in [*first.parameters(), *second.parameters()]:
        parameter.data.zero_()
    for index, (slope, offset) in enumerate(rows):
        first.weight.data[index, 0], first.bias.data[index] = slope * 255 / 100, offset
    second.weight.data[0, 0] = 1
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), second, nn.ReLU(), head)


def test_a_linear_neuron_fits_and_one_with_a_kink_as_a_line_fits_it() -> None:
    """The first layer is linear in the image; the second is relu(s - 0.5) on the way, s in 0..1."""
    values = measure(planted((1.0, -0.5), (2.0, 0.25)), Corner())
    way = np.linspace(0, 1, 11)
    kink = np.maximum(way - 0.5, 0)
    expected = np.corrcoef(way, kink)[0, 1] ** 2
    assert values["r2_last"] == pytest.approx(expected, abs=1e-4)
    assert values["r2"] == pytest.approx((1 + expected) / 2, abs=1e-4)
    # first layer: -0.5 and 0.25, then 0.5 and 2.25; second: 0, then 0.5
    assert values["positive_benign"] == pytest.approx((1 / 2 + 0) / 2)
    assert values["positive_triggered"] == pytest.approx((1 + 1) / 2)


def test_neurons_that_do_not_change_are_left_out() -> None:
    values = measure(planted((1.0, 0.5), (0.0, 3.0)), Corner())
    assert values["r2"] == pytest.approx(1, abs=1e-6)


def test_fits_by_hand() -> None:
    rows = torch.tensor([[0.0, 1, 2, 3], [1, -1, -1, 1], [5, 5, 5, 5]]).double()
    assert float(fit_of_lines(rows[:1])) == pytest.approx(1)
    assert float(fit_of_lines(rows[1:2])) == pytest.approx(0)
    assert float(fit_of_lines(rows)) == pytest.approx(0.5)
    assert float(fit_of_lines(rows[2:])) == 1


def test_the_way_goes_to_what_the_attack_makes_of_each_image() -> None:
    """A change that is no trigger of Eq. 1: the pixel is inverted."""

    class Inverts(Corner):
        def stamp(self, images: Tensor, indices: Tensor, info: DatasetInfo, seed: int) -> Tensor:
            return 100 - images

    values = measure(planted((1.0, -0.5)), Inverts())
    assert values["positive_triggered"] == pytest.approx((1 + 1) / 2)
    assert values["positive_benign"] == 0


def test_a_network_without_a_hidden_layer_is_told() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    with pytest.warns(UserWarning, match="the network has no hidden layer"):
        assert measure(model, Corner()) == {}


def test_attacks_without_a_fixed_trigger_have_no_values() -> None:
    assert measure(planted((1.0, 0.0)), Clean()) == {}
