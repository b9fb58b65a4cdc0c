"""SIG: the pixel values of the wave, who bears it, and what is refused before any work starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bbn_attacks.sig import SIG
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from backdoor_bench_none.api import AttackTask, Context, DatasetInfo, ImageSet
from backdoor_bench_none.errors import ConfigError
from backdoor_bench_none.planning.plan import Plan
from backdoor_bench_none.results.store import Store
from backdoor_bench_none.run.stages import Stages

CLASSES, COUNT = 5, 100
CONTEXT = Context(torch.device("cpu"), seed=0)
#: round(128 + 40 sin(2 pi 6 j / 32)) for j = 0, ..., 15; then it repeats
WAVE_ON_GREY = [128, 165, 156, 113, 88, 113, 156, 165, 128, 91, 100, 143, 168, 143, 100, 91]


def make_info(size: int = 32, channels: int = 3) -> DatasetInfo:
    return DatasetInfo("toy", (channels, size, size), CLASSES, COUNT, (0.0,) * channels, (1.0,) * channels)


def make_task(size: int = 32, channels: int = 3) -> AttackTask:
    """Random images; class k has 30, 25, 20, 15 and 10 of them."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (COUNT, channels, size, size), generator=generator, dtype=torch.uint8)
    labels = torch.repeat_interleave(torch.arange(CLASSES), torch.tensor([30, 25, 20, 15, 10]))
    labels = labels[torch.randperm(COUNT, generator=generator)]
    return AttackTask(ImageSet(images, labels), make_info(size, channels))


def grey(value: int, channels: int = 3) -> Tensor:
    return torch.full((1, channels, 32, 32), value, dtype=torch.uint8)


def stamp(attack: SIG, images: Tensor) -> Tensor:
    return attack.stamp(images, torch.arange(len(images)), make_info(images.shape[-1], images.shape[1]), 0)


# the wave


@pytest.mark.parametrize("channels", [1, 3])
def test_known_pixel_values(channels: int) -> None:
    wave = stamp(SIG(), grey(128, channels))
    assert wave.dtype == torch.uint8
    assert torch.equal(wave, torch.tensor(WAVE_ON_GREY * 2, dtype=torch.uint8).expand(1, channels, 32, 32))


def test_clipped_at_black_and_at_white() -> None:
    change = torch.tensor(WAVE_ON_GREY * 2) - 128
    assert stamp(SIG(), grey(0))[0, 0, 5].tolist() == change.clamp(min=0).tolist()
    assert stamp(SIG(), grey(255))[0, 2, 9].tolist() == (255 + change.clamp(max=0)).tolist()


def test_one_wave_over_the_image_rises_to_delta_at_a_quarter() -> None:
    row = stamp(SIG(frequency=1, delta=20), grey(100))[0, 0, 0]
    assert row[[0, 8, 16, 24]].tolist() == [100, 120, 100, 80]


@settings(deadline=None, max_examples=40)
@given(
    delta=st.floats(0.5, 255), frequency=st.floats(0.1, 20), size=st.integers(1, 24), channels=st.sampled_from([1, 3])
)
def test_wave_is_that_of_the_paper(delta: float, frequency: float, size: int, channels: int) -> None:
    images = make_task(size, channels).data.images[:3]
    before = images.clone()
    wave = delta * np.sin(2 * np.pi * np.arange(size) * frequency / size)
    expected = np.clip(images.numpy() + wave, 0, 255)
    stamped = stamp(SIG(delta=delta, frequency=frequency), images)
    assert np.abs(stamped.numpy() - expected).max() <= 0.5 + 1e-6
    assert torch.equal(images, before)


# who bears it


@pytest.mark.parametrize(("rate", "count"), [(1.0, 20), (0.5, 10), (0.26, 5), (0.03, 1)])
def test_a_share_of_the_target_class_bears_the_wave_and_keeps_its_label(rate: float, count: int) -> None:
    task = make_task()
    images, labels = task.data.images.clone(), task.data.labels.clone()
    poisoned = SIG(target=2, class_rate=rate).poison(task, CONTEXT)
    assert len(poisoned.indices.unique()) == len(poisoned) == count
    assert labels[poisoned.indices].eq(2).all()
    assert poisoned.labels.eq(2).all()
    assert torch.equal(poisoned.images, stamp(SIG(), images[poisoned.indices]))
    replaced, benign = poisoned.replace(task.data), torch.ones(COUNT, dtype=torch.bool)
    benign[poisoned.indices] = False
    assert torch.equal(replaced.labels, labels)
    assert torch.equal(replaced.images[benign], images[benign])
    assert torch.equal(task.data.images, images)


def test_the_whole_target_class_by_default() -> None:
    task = make_task()
    attack = SIG().resolve(task.info)
    assert attack.poison(task, CONTEXT).indices.tolist() == torch.nonzero(task.data.labels == 0).flatten().tolist()


def test_selection_depends_on_the_seed_alone() -> None:
    attack, task = SIG(target=0, class_rate=0.5), make_task()
    torch.manual_seed(1)
    first = attack.poison(task, CONTEXT).indices
    torch.manual_seed(2)
    assert torch.equal(first, attack.poison(task, CONTEXT).indices)
    assert not torch.equal(first, attack.poison(task, replace(CONTEXT, seed=1)).indices)


@pytest.mark.parametrize(("params", "height"), [({}, 40), ({"test_delta": 60}, 60), ({"delta": 10}, 10)])
def test_all_other_classes_bear_the_wave_of_test_time(params: dict[str, float], height: float) -> None:
    task = make_task()
    attack = SIG(target=2, **params)
    triggered = attack.attack_test(task, CONTEXT)
    assert triggered.indices.tolist() == torch.nonzero(task.data.labels != 2).flatten().tolist()
    assert triggered.labels.eq(2).all()
    wave = stamp(SIG(delta=height), task.data.images)
    assert torch.equal(triggered.images, wave[triggered.indices])
    assert torch.equal(attack.preview(task, CONTEXT), wave)
    training = stamp(SIG(delta=params.get("delta", 40)), task.data.images)
    poisoned = attack.poison(task, CONTEXT)
    assert torch.equal(poisoned.images, training[poisoned.indices])


# bad input


@pytest.mark.parametrize(
    "params",
    [{"class_rate": 0}, {"class_rate": 1.01}, {"delta": 0}, {"delta": 256}, {"test_delta": 0}, {"frequency": 0},
     {"target": -1}, {"label_mode": "all_to_all"}, {"label_mode": "all_to_one"}, {"poison_rate": 0.1}],
)  # fmt: skip
def test_parameters_are_checked(params: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        SIG(**params)


def test_a_class_too_small_for_the_rate_is_an_error() -> None:
    task = make_task()
    with pytest.raises(ConfigError, match="selects none of the 10 samples of class 4"):
        SIG(target=4, class_rate=0.04).poison(task, CONTEXT)


@pytest.mark.parametrize("params", ["target: 9", "class_rate: 0.004", "label_mode: clean_label"])
def test_what_just_works_is_planned(params: str, tiny_plan: Callable[..., Plan]) -> None:
    plan = tiny_plan(attack=f"{{name: sig, params: {{{params}}}}}")
    assert len(plan.cells) == 2
    assert plan.skipped == {}


# on real digits


def test_from_the_benchmark_file_to_the_record(tiny_plan: Callable[..., Plan], tmp_path: Path) -> None:
    (cell,) = tiny_plan(attack="{name: sig, params: {class_rate: 0.5, target: 3}}", defense="no_defense").cells
    stages = Stages(cell, Store(tmp_path / "results"), CONTEXT)
    record = stages.evaluate()
    train, test = stages.data()
    changed = (stages.poisoned_train().images != train.images).flatten(1).any(1)
    assert int(changed.sum()) == round(0.5 * int((train.labels == 3).sum())) == record.upstream["poisoned_samples"]
    assert train.labels[changed].eq(3).all()
    assert torch.equal(stages.poisoned_train().labels, train.labels)
    assert record.counts is not None
    assert record.counts.attack_success_rate is not None
    assert record.counts.attack_success_rate.total == int((test.labels != 3).sum())
