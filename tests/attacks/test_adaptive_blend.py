"""Adaptive-Blend: pieces that belong to the sample, cover samples that keep their label and count as nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bbn_attacks.adaptive_blend import AdaptiveBlend
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from backdoor_bench_none.api import AttackTask, Context, DatasetInfo, ImageSet, PoisonedSamples
from backdoor_bench_none.contracts.trigger import noise
from backdoor_bench_none.errors import ConfigError
from backdoor_bench_none.planning.plan import Plan
from backdoor_bench_none.results.store import Store
from backdoor_bench_none.run.stages import Stages

CLASSES, COUNT, SIDE = 5, 60, 16
#: the training set of digits
TRAIN = 1297
#: flags every training sample, and is granted clean data
BBNFILE = """
from typing import ClassVar
import torch
from pydantic import Field
from backdoor_bench_none.api import Defense, DefenseResult, Stage, hookimpl

class Suspicious(Defense):
    stage: ClassVar[Stage] = Stage.IN_TRAINING
    clean_fraction: float = Field(0.5, ge=0, lt=1)

    def run(self, task, context):
        count = len(task.train)
        return DefenseResult(task.new_model(), torch.ones(count, dtype=torch.bool), torch.arange(count).float())

@hookimpl
def bbn_defenses():
    return {"suspicious": Suspicious}
"""


def seeded(seed: int) -> Context:
    return Context(torch.device("cpu"), seed)


CONTEXT = seeded(0)


def make_info(channels: int = 3, count: int = COUNT, side: int = SIDE) -> DatasetInfo:
    return DatasetInfo("toy", (channels, side, side), CLASSES, count, (0.0,) * channels, (1.0,) * channels)


def make_task(channels: int = 3, count: int = COUNT, level: int = 0, side: int = SIDE) -> AttackTask:
    """Images of one level whose labels go round the classes."""
    images = torch.full((count, channels, side, side), level, dtype=torch.uint8)
    return AttackTask(ImageSet(images, torch.arange(count) % CLASSES), make_info(channels, count, side))


def make_attack(**params: object) -> AdaptiveBlend:
    return AdaptiveBlend(**{"target": 2, "poison_rate": 0.2, "cover_rate": 0.3, **params})


def pieces_of(images: Tensor, pieces: int = 4) -> Tensor:
    """Which pieces (N, pieces, pieces) of black images are no longer black."""
    size = images.shape[-1] // pieces
    return images.amax(1).unfold(1, size, size).unfold(2, size, size).flatten(3).amax(3) > 0


def decoys_of(samples: PoisonedSamples) -> Tensor:
    assert samples.decoys is not None
    return samples.decoys


# what changes


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["all_to_one", "all_to_all"])
def test_counts_labels_and_what_stays(channels: int, mode: str) -> None:
    task = make_task(channels)
    images, labels = task.data.images.clone(), task.data.labels.clone()
    samples = make_attack(label_mode=mode).resolve(task.info).poison(task, CONTEXT)
    assert torch.equal(task.data.images, images)
    assert torch.equal(task.data.labels, labels)
    assert len(samples) == 12 + 18
    assert int(decoys_of(samples).sum()) == 18
    assert torch.equal(samples.indices, torch.unique(samples.indices))  # ascending and distinct
    before = labels[samples.indices]
    wanted = torch.full_like(before, 2) if mode == "all_to_one" else (before + 1) % CLASSES
    assert torch.equal(samples.labels, torch.where(decoys_of(samples), before, wanted))
    changed = (samples.replace(task.data).images != images).flatten(1).any(1)
    assert torch.nonzero(changed).flatten().tolist() == samples.indices.tolist()


@settings(deadline=None, max_examples=60)
@given(poison=st.floats(0, 1), cover=st.floats(0, 1), count=st.integers(1, 80), seed=st.integers(0, 2**63 - 1))
@example(poison=0.0, cover=0.0, count=8, seed=0)
@example(poison=0.5, cover=0.5, count=7, seed=0)
def test_what_the_plan_accepts_can_be_carried_out(poison: float, cover: float, count: int, seed: int) -> None:
    attack = make_attack(poison_rate=poison, cover_rate=cover, pieces=2)
    task, wanted = make_task(1, count, side=4), (round(poison * count), round(cover * count))
    try:
        attack.check(task.info)
    except ConfigError:
        idle = (poison > 0 and wanted[0] == 0) or (cover > 0 and wanted[1] == 0)
        assert idle or poison + cover > 1 or sum(wanted) > count
        return
    samples = attack.poison(task, seeded(seed))
    decoys = int(samples.decoys.sum()) if samples.decoys is not None else 0
    assert (len(samples) - decoys, decoys) == wanted


# pieces


@pytest.mark.parametrize(
    ("pieces", "rate", "borne"), [(4, 0.5, 8), (4, 0.25, 4), (4, 1, 16), (2, 0.5, 2), (1, 0.3, 1), (8, 0.001, 1)]
)
def test_every_training_image_bears_its_share_of_the_pieces(pieces: int, rate: float, borne: int) -> None:
    samples = make_attack(pieces=pieces, piece_rate=rate, opacity=1).poison(make_task(), CONTEXT)
    assert pieces_of(samples.images, pieces).flatten(1).sum(1).tolist() == [borne] * 30


def test_pieces_belong_to_the_seed_and_the_sample_and_not_to_the_selection() -> None:
    task = make_task()
    everything = make_attack(poison_rate=1, cover_rate=0, opacity=1).poison(task, CONTEXT)
    some = make_attack(opacity=1).poison(task, CONTEXT)
    assert torch.equal(some.images, everything.images[some.indices])
    assert len(torch.unique(pieces_of(everything.images).flatten(1), dim=0)) > COUNT * 0.9
    other = make_attack(poison_rate=1, cover_rate=0, opacity=1).poison(task, seeded(1))
    assert not torch.equal(other.images, everything.images)


def test_every_piece_is_borne_by_about_half_of_the_images() -> None:
    samples = make_attack(poison_rate=1, cover_rate=0, opacity=1).poison(make_task(1, count=400), CONTEXT)
    shares = pieces_of(samples.images).float().mean(0)
    assert (shares - 0.5).abs().max() < 0.12


def test_levels_in_training_and_at_test_time() -> None:
    """Of an image of level 100: 0.85 and 0.15 of the pattern inside the pieces, 0.8 and 0.2 everywhere when tested."""
    task, attack = make_task(level=100), make_attack(pattern_seed=7)
    pattern = 255 * noise(task.info.shape, 7)
    samples = attack.poison(task, CONTEXT)
    exact = 85 + 0.15 * pattern
    inside = (samples.images.float() - exact).abs() <= 0.5 + 1e-3
    untouched = samples.images == 100
    assert (inside | untouched).all()
    blocks = ~untouched.reshape(30, 3, 4, 4, 4, 4).transpose(3, 4).flatten(4).all(4)
    assert (blocks.all(1) == blocks.any(1)).all()  # a piece is there in all channels, or in none
    assert blocks.all(1).flatten(1).sum(1).tolist() == [8] * 30
    assert (attack.preview(task, CONTEXT).float() - (80 + 0.2 * pattern)).abs().max() <= 0.5 + 1e-3


def test_pieces_cover_images_they_do_not_divide() -> None:
    task = make_task(1, side=10)
    samples = make_attack(piece_rate=1, opacity=1).poison(task, CONTEXT)
    assert torch.equal(samples.images[0], make_attack(test_opacity=1).preview(task, CONTEXT)[0])


# rates and parameters


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"poison_rate": 0.6, "cover_rate": 0.5}, "select .* of the .* training images"),
        ({"poison_rate": 0.008}, "poison_rate 0.008 selects none"),
        ({"cover_rate": 0.008}, "cover_rate 0.008 selects none"),
        ({"target": 5}, "not a class of toy"),
    ],
)
def test_rates_that_do_not_fit_are_refused(params: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_attack(**params).check(make_info())


def test_more_pieces_than_pixels_are_refused() -> None:
    with pytest.raises(ConfigError, match="16x16 pieces do not fit"):
        make_attack(pieces=16).check(make_info(side=15))
    make_attack(pieces=15).check(make_info(side=15))


@pytest.mark.parametrize(
    "params", [{"piece_rate": 0}, {"pieces": 0}, {"opacity": 0}, {"cover_rate": -0.1}, {"label_mode": "clean_label"}]
)
def test_parameters_are_checked(params: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        make_attack(**params)


def test_the_plan_refuses_what_does_not_fit(tiny_plan: Callable[..., Plan]) -> None:
    with pytest.raises(ConfigError, match=r"select .* of the .* training images"):
        tiny_plan(attack="{name: adaptive_blend, params: {poison_rate: 0.7, cover_rate: 0.7}}")


# cover samples count as nothing

DECOYS = 130
ATTACK = "{name: adaptive_blend, params: {poison_rate: 0.05, cover_rate: 0.1}}"
POISONED = 65


@pytest.fixture
def make_stages(tiny_plan: Callable[..., Plan], tmp_path: Path) -> Callable[[str], Stages]:
    (tmp_path / "bbnfile.py").write_text(BBNFILE)

    def make(defense: str) -> Stages:
        (cell,) = tiny_plan(attack=ATTACK, defense=defense).cells
        return Stages(cell, Store(tmp_path / "results"), CONTEXT)

    return make


def test_cover_samples_are_neither_hits_nor_false_alarms(make_stages: Callable[[str], Stages]) -> None:
    stages = make_stages("suspicious")
    record = stages.evaluate()
    assert record.upstream["poisoned_samples"] == POISONED
    detection = record.detection
    assert detection is not None
    assert (detection.true_positive, detection.false_negative, detection.true_negative) == (POISONED, 0, 0)
    assert detection.false_positive == TRAIN - POISONED - DECOYS
    truth, decoys = stages.poisoned(), stages.decoys()
    assert (int(truth.sum()), int(decoys.sum()), int((truth & decoys).sum())) == (POISONED, DECOYS, 0)
    hits, misses = torch.nonzero(truth).flatten(), torch.nonzero(~truth & ~decoys).flatten()
    assert detection.auroc == pytest.approx((hits[:, None] > misses).float().mean().item(), abs=1e-6)


def test_cover_samples_are_never_held_out_as_clean(make_stages: Callable[[str], Stages]) -> None:
    stages = make_stages("{name: suspicious, params: {clean_fraction: 0.84}}")
    held, train = stages.clean_holdout(), stages.data()[0]
    assert held is not None
    assert len(held) == int(0.84 * TRAIN)
    images = {image.numpy().tobytes(): index for index, image in enumerate(train.images)}
    assert len(images) == TRAIN
    indices = torch.tensor([images[image.numpy().tobytes()] for image in held.images])
    assert not (stages.poisoned() | stages.decoys())[indices].any()


def test_cover_samples_are_not_enough_for_a_larger_holdout(make_stages: Callable[[str], Stages]) -> None:
    with pytest.raises(ConfigError, match=f"{TRAIN - POISONED - DECOYS} are not poisoned"):
        make_stages("{name: suspicious, params: {clean_fraction: 0.86}}").clean_holdout()


def test_the_oracle_is_told_of_the_poisoned_samples_only(make_stages: Callable[[str], Stages]) -> None:
    stages = make_stages("oracle_filter")
    detection = stages.evaluate().detection
    assert detection is not None
    assert torch.equal(stages.defense().tensors["flagged"], stages.poisoned())
    assert int(stages.defense().tensors["flagged"].sum()) == POISONED
    counts = (detection.true_positive, detection.false_positive, detection.false_negative, detection.true_negative)
    assert counts == (POISONED, 0, 0, TRAIN - POISONED - DECOYS)
