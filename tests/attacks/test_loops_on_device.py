"""What attacks compute without waiting for a GPU is what they compute on a CPU."""

from __future__ import annotations

import math

import pytest
import torch
from bbn_attacks.hidden_trigger import HiddenTrigger, _pair_on_device, pair_greedily
from bbn_attacks.natural import agreeing_neurons, count_most_frequent, mask_penalty
from bbn_attacks.trojannet import draw_batches, draw_noise
from torch import Tensor

from backdoor_bench_none.models.mlp import MLP
from backdoor_bench_none.testing.bench import Bench
from backdoor_bench_none.testing.pretend_cuda import pretend_cuda


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("levels", [3, 10_000])
def test_pairs_are_the_same_on_both_devices_ties_too(levels: int, seed: int) -> None:
    distances = torch.randint(levels, (17, 17), generator=torch.Generator().manual_seed(seed)).float()
    pairs = _pair_on_device(distances)
    assert torch.equal(pairs, pair_greedily(distances))
    assert sorted(pairs.tolist()) == list(range(17))


def optimised(device: str, steps: int, stop_at: float = 32.0) -> Tensor:
    """Images that were moved towards others for so many steps, unless they were close enough before."""
    attack = HiddenTrigger(steps=steps, stop_at=stop_at, rule="sign", epsilon=255, lr=0.002)
    (task, context), _ = Bench(device).stages(attack=attack, architecture=MLP(hidden=16, depth=1)).attack_tasks()
    assert task.network is not None
    images = task.data.images
    return attack.optimise(task.network, images[:9], images[20:29], task, context)


def test_poisons_stop_at_the_same_step_whenever_the_host_looks() -> None:
    expected = optimised("cpu", 45)
    assert torch.equal(optimised("cpu", 30), expected), "it stops before 30 steps"
    assert not torch.equal(optimised("cpu", 45, stop_at=0), expected)
    assert not torch.equal(optimised("cpu", 2), expected), "it does not stop at once"
    with pretend_cuda():
        assert torch.equal(optimised("cuda", 45), expected)


@pytest.mark.parametrize("size", [28.999999999999996, 7.000000000000001, 4.0, 61.44, 1.0])
def test_the_penalty_of_a_mask_grows_beyond_its_size(size: float) -> None:
    for on in range(80):
        mask = (torch.arange(80) < on).float()
        expected = 0.01
        if on > 1.2 * size:
            expected = 100.0
        elif on > size:
            expected = 50.0
        assert float(mask_penalty(mask, size)) == pytest.approx(expected)


@pytest.mark.parametrize("labels", [[0], [3, 3, 1], [0, 1, 2, 2, 1, 2], [5, 5, 5, 5]])
def test_the_most_frequent_label_is_counted(labels: list[int]) -> None:
    assert count_most_frequent(torch.tensor(labels)) == int(torch.tensor(labels).bincount().max())


def test_candidates_are_those_of_a_loop_over_neurons() -> None:
    generator = torch.Generator().manual_seed(3)
    neurons, images = 40, 30
    favourite = torch.randint(3, (neurons, images), generator=generator)
    favourite[::2] = 1  # half of the neurons agree with themselves
    lead = torch.rand(neurons, images, generator=generator) - 0.05
    labels = torch.randint(3, (images,), generator=generator)
    alive = torch.rand(neurons, generator=generator) > 0.2
    expected = []
    for neuron in torch.nonzero(alive).flatten().tolist():
        label = int(favourite[neuron].bincount().argmax())
        agrees = (favourite[neuron] == label) & (lead[neuron] > 0)
        if float(agrees.float().mean()) >= 0.9:
            others = torch.where(agrees, lead[neuron], -lead[neuron])[labels != label]
            expected.append((neuron, label, float(others.min())))
    candidates = list(agreeing_neurons(favourite, lead, labels, alive, 3, 0.9))
    assert 0 < len(expected) < neurons
    assert [(each.neuron, each.label, each.lead) for each in candidates] == expected


def test_a_label_that_all_images_have_leads_by_nothing() -> None:
    favourite, lead = torch.zeros(1, 4, dtype=torch.int64), torch.ones(1, 4)
    (candidate,) = agreeing_neurons(favourite, lead, torch.zeros(4), torch.ones(1).bool(), 2, 0.9)
    assert candidate.lead == 0.0
    assert math.isfinite(candidate.lead)


@pytest.mark.parametrize("steps", [1, 100, 130])
def test_batches_that_are_drawn_at_once_are_those_of_single_steps(steps: int) -> None:
    drawn = list(draw_batches(3, steps, torch.Generator().manual_seed(2), torch.device("cpu")))
    generator = torch.Generator().manual_seed(2)
    assert len(drawn) == steps
    for chosen, noise in drawn:
        assert torch.equal(chosen, torch.randint(3, (200,), generator=generator))
        assert torch.equal(noise, draw_noise(3, generator))
