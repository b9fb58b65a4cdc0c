"""WaNet: one smooth field of shifts by hand, its fixed points, and noisy training images that keep their label."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bbn_attacks.wanet import WaNet, bend
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from backdoor_bench_none.api import AttackTask, Context, DatasetInfo, ImageSet
from backdoor_bench_none.errors import ConfigError
from backdoor_bench_none.planning.plan import Plan
from backdoor_bench_none.results.store import Store
from backdoor_bench_none.run.stages import Stages

CLASSES, COUNT, SIDE = 5, 60, 16


def seeded(seed: int) -> Context:
    return Context(torch.device("cpu"), seed)


CONTEXT = seeded(0)


def make_info(channels: int = 3, count: int = COUNT, side: int = SIDE) -> DatasetInfo:
    return DatasetInfo("toy", (channels, side, side), CLASSES, count, (0.0,) * channels, (1.0,) * channels)


def make_task(channels: int = 3, count: int = COUNT, side: int = SIDE) -> AttackTask:
    """Random images whose labels go round the classes."""
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(256, (count, channels, side, side), generator=generator).byte()
    return AttackTask(ImageSet(images, torch.arange(count) % CLASSES), make_info(channels, count, side))


def make_attack(**params: object) -> WaNet:
    return WaNet(**{"target": 2, **params})


def identity(side: int = SIDE) -> Tensor:
    """The field (1, H, W, 2) that takes every pixel from its own place."""
    steps = torch.linspace(-1, 1, side)
    return torch.stack([steps.expand(side, side), steps[:, None].expand(side, side)], dim=-1)[None]


def shifts(attack: WaNet, side: int = SIDE) -> Tensor:
    """By how many pixels (H, W, 2) the field leads away, right and down."""
    return ((attack.field(make_info(side=side)) - identity(side)) * (side - 1) / 2)[0]


def stamp(attack: WaNet, images: Tensor) -> Tensor:
    info = make_info(images.shape[1], side=images.shape[-1])
    return attack.stamp(images, torch.arange(len(images)), info, 0)


# bending


@settings(deadline=None, max_examples=30)
@given(channels=st.sampled_from([1, 3]), side=st.integers(2, 40), field_seed=st.integers(0, 99))
def test_without_strength_nothing_moves(channels: int, side: int, field_seed: int) -> None:
    images = make_task(channels, count=4, side=side).data.images
    assert torch.equal(stamp(make_attack(strength=1e-6, field_seed=field_seed), images), images)
    assert torch.equal(bend(images, lambda count: identity(side).expand(count, -1, -1, -1)), images)


def test_bilinear_interpolation_by_hand() -> None:
    """A quarter of a pixel to the right, then also half a pixel down; a pixel from beyond the edge is the edge's."""
    image = torch.tensor([[[[0, 100], [200, 40]]]], dtype=torch.uint8)
    right = identity(2) + torch.tensor([0.5, 0.0])
    assert bend(image, lambda count: right.clamp(-1, 1)).flatten().tolist() == [25, 100, 160, 40]
    both = identity(2) + torch.tensor([0.5, 1.0])
    assert bend(image, lambda count: both.clamp(-1, 1)).flatten().tolist() == [92, 70, 160, 40]


@settings(deadline=None, max_examples=30)
@given(level=st.integers(0, 255), strength=st.floats(0.01, 20), field_seed=st.integers(0, 99), grid=st.integers(2, 10))
def test_flat_images_are_fixed_points(level: int, strength: float, field_seed: int, grid: int) -> None:
    image = torch.full((1, 3, SIDE, SIDE), level, dtype=torch.uint8)
    assert torch.equal(stamp(make_attack(strength=strength, field_seed=field_seed, grid=grid), image), image)


@settings(deadline=None, max_examples=30)
@given(strength=st.floats(0.01, 5), field_seed=st.integers(0, 99))
def test_no_level_leaves_the_range_of_the_image(strength: float, field_seed: int) -> None:
    images = make_task(count=3).data.images.clamp(40, 180)
    bent = stamp(make_attack(strength=strength, field_seed=field_seed), images)
    assert bent.min() >= 40
    assert bent.max() <= 180


@pytest.mark.parametrize("axis", [0, 1])
def test_ramps_show_the_field(axis: int) -> None:
    """On a ramp, a shift by one pixel adds one step: along x, columns count, along y, rows."""
    attack = make_attack(strength=2)
    ramp = (torch.arange(SIDE) * 15 + 10).to(torch.uint8).expand(SIDE, SIDE)
    image = (ramp if axis == 0 else ramp.T)[None, None].contiguous()
    moved = (stamp(attack, image).float() - image)[0, 0] / 15
    assert (moved - shifts(attack)[..., axis]).abs().max() <= 0.5 / 15 + 1e-3
    assert moved.abs().max() > 0.5


# the field


def test_the_mean_shift_at_the_points_of_the_grid_is_the_strength() -> None:
    """In half pixels, where every pixel is a point of the grid; the edges are clamped and left out."""
    drawn = torch.cat([
        shifts(make_attack(field_seed=seed, strength=0.5, grid=13), 13)[1:-1, 1:-1].flatten() for seed in range(60)
    ])  # fmt: skip
    assert drawn.abs().mean() * 2 * 13 / 12 == pytest.approx(0.5, rel=0.03)
    assert abs(drawn.mean()) < 0.02


@settings(deadline=None, max_examples=30)
@given(strength=st.floats(0.01, 30), field_seed=st.integers(0, 99), side=st.integers(4, 40))
def test_the_field_stays_inside_the_image(strength: float, field_seed: int, side: int) -> None:
    field = make_attack(strength=strength, field_seed=field_seed).field(make_info(side=side))
    assert field.shape == (1, side, side, 2)
    assert field.abs().max() <= 1


def test_shifts_grow_with_the_strength() -> None:
    weak, strong = (shifts(make_attack(strength=strength))[2:-2, 2:-2] for strength in (0.25, 0.5))
    torch.testing.assert_close(2 * weak, strong, atol=1e-4, rtol=1e-4)


def test_the_field_is_smooth() -> None:
    """A finer grid is rougher, and neighbours in the default one differ by less than shifts are large."""

    def roughness(grid: int) -> float:
        inner = shifts(make_attack(grid=grid), 32)[2:-2, 2:-2]
        return float(inner.diff(dim=0).abs().mean() / inner.abs().mean())

    assert roughness(4) < 0.25
    assert roughness(4) < roughness(8) < roughness(16)


def test_all_images_are_bent_alike_and_as_before() -> None:
    task = make_task()
    alike = ImageSet(task.data.images[:1].expand(COUNT, -1, -1, -1).clone(), task.data.labels)
    previews = [make_attack(field_seed=field).preview(AttackTask(alike, task.info), seeded(seed))
                for field, seed in ((0, 0), (0, 5), (1, 0))]  # fmt: skip
    assert (previews[0] == previews[0][:1]).all()
    assert torch.equal(previews[0], previews[1])
    assert not torch.equal(previews[0], previews[2])


def test_test_images_are_bent_by_the_exact_field() -> None:
    task, attack = make_task(), make_attack()
    triggered = attack.attack_test(task, CONTEXT)
    assert torch.equal(triggered.indices, torch.nonzero(task.data.labels != 2).flatten())
    assert torch.equal(triggered.images, attack.preview(task, CONTEXT)[triggered.indices])
    assert triggered.labels.eq(2).all()


# what is poisoned


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["all_to_one", "all_to_all"])
def test_counts_labels_and_what_stays(channels: int, mode: str) -> None:
    task = make_task(channels)
    images, labels = task.data.images.clone(), task.data.labels.clone()
    attack = make_attack(label_mode=mode, poison_rate=0.1, cross_rate=0.25).resolve(task.info)
    samples = attack.poison(task, CONTEXT)
    assert torch.equal(task.data.images, images)
    assert torch.equal(task.data.labels, labels)
    assert samples.decoys is not None
    assert (len(samples), int(samples.decoys.sum())) == (21, 15)
    assert torch.equal(samples.indices, torch.unique(samples.indices))
    before = labels[samples.indices]
    wanted = torch.full_like(before, 2) if mode == "all_to_one" else (before + 1) % CLASSES
    assert torch.equal(samples.labels, torch.where(samples.decoys, before, wanted))
    changed = (samples.replace(task.data).images != images).flatten(1).any(1)
    assert torch.nonzero(changed).flatten().tolist() == samples.indices.tolist()
    bent = attack.preview(task, CONTEXT)[samples.indices]
    exact = (samples.images == bent).flatten(1).all(1)
    assert torch.equal(exact, ~samples.decoys)


def test_noise_of_cross_samples_is_small_and_their_own() -> None:
    """On a ramp: at most half a pixel along each axis on top of the field, and another for every image."""
    ramp = (torch.arange(SIDE) * 15 + 10).to(torch.uint8).expand(COUNT, 1, SIDE, SIDE).contiguous()
    task = AttackTask(ImageSet(ramp, torch.zeros(COUNT, dtype=torch.int64)), make_info(1))
    attack = make_attack(poison_rate=0, cross_rate=1)
    crossed = attack.poison(task, CONTEXT).images.float()
    noise = (crossed - attack.preview(task, CONTEXT)) / 15
    assert noise.abs().max() <= 0.5 + 1 / 15
    assert noise[..., 2:-2].abs().mean() > 0.2
    assert len(torch.unique(noise.flatten(1), dim=0)) == COUNT


def test_poison_is_a_function_of_the_seed() -> None:
    one, same, other = (make_attack().poison(make_task(), seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(one.indices, same.indices)
    assert torch.equal(one.images, same.images)
    assert not torch.equal(one.indices, other.indices)


@settings(deadline=None, max_examples=60)
@given(poison=st.floats(0, 1), cross=st.floats(0, 1), count=st.integers(1, 60), seed=st.integers(0, 2**63 - 1))
@example(poison=0.0, cross=0.0, count=8, seed=0)
@example(poison=0.5, cross=0.5, count=7, seed=0)
def test_what_the_plan_accepts_can_be_carried_out(poison: float, cross: float, count: int, seed: int) -> None:
    attack = make_attack(poison_rate=poison, cross_rate=cross)
    task, wanted = make_task(1, count, side=4), (round(poison * count), round(cross * count))
    try:
        attack.check(task.info)
    except ConfigError:
        idle = (poison > 0 and wanted[0] == 0) or (cross > 0 and wanted[1] == 0)
        assert idle or poison + cross > 1 or sum(wanted) > count
        return
    samples = attack.poison(task, seeded(seed))
    decoys = int(samples.decoys.sum()) if samples.decoys is not None else 0
    assert (len(samples) - decoys, decoys) == wanted


# rates and parameters


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"poison_rate": 0.6, "cross_rate": 0.5}, "select .* of the .* training images"),
        ({"poison_rate": 0.008}, "poison_rate 0.008 selects none"),
        ({"cross_rate": 0.008}, "cross_rate 0.008 selects none"),
        ({"target": 5}, "not a class of toy"),
    ],
)
def test_rates_that_do_not_fit_are_refused(params: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_attack(**params).check(make_info())


@pytest.mark.parametrize("params", [{"strength": 0}, {"grid": 1}, {"cross_rate": 1.1}, {"label_mode": "clean_label"}])
def test_parameters_are_checked(params: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        make_attack(**params)


def test_the_plan_refuses_what_does_not_fit(tiny_plan: Callable[..., Plan]) -> None:
    with pytest.raises(ConfigError, match=r"select .* of the .* training images"):
        tiny_plan(attack="{name: wanet, params: {poison_rate: 0.9}}")


def test_cross_samples_count_neither_as_poisoned_nor_as_benign(tiny_plan: Callable[..., Plan], tmp_path: Path) -> None:
    (cell,) = tiny_plan(attack="wanet", defense="oracle_filter").cells
    record = Stages(cell, Store(tmp_path / "results"), CONTEXT).evaluate()
    detection, poisoned, crossed = record.detection, round(0.1 * 1297), round(0.2 * 1297)
    assert detection is not None
    counts = (detection.true_positive, detection.false_positive, detection.false_negative, detection.true_negative)
    assert counts == (poisoned, 0, 0, 1297 - poisoned - crossed)
    assert record.upstream["poisoned_samples"] == poisoned
