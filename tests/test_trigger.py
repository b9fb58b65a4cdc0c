"""Triggers: the algebra of Eq. 1, the shape of each kind, random places."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from bbn_attacks.badnets import BadNets
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from backdoor_bench_none.api import DatasetInfo, Trigger
from backdoor_bench_none.contracts.network import Pixels
from backdoor_bench_none.contracts.trigger import (
    PlacedTiles,
    label_consistent_tile,
    place,
    random_places,
    solid_tile,
    watermark,
)
from backdoor_bench_none.errors import ConfigError

SIZES = (16, 28, 32, 224)
PATCHES = ("static", "dynamic", "corner", "label_consistent")
KINDS = ("pixel", *PATCHES, "watermark")
quick = settings(deadline=None, max_examples=40)
TILE = [[0, 0, 1], [0, 1, 0], [1, 0, 1]]  # the 3x3 pattern of the label-consistent attack, 1 is white


def make_info(size: int, channels: int = 3) -> DatasetInfo:
    return DatasetInfo("toy", (channels, size, size), 10, 100, (0.5,) * channels, (0.5,) * channels)


def random_images(channels: int, size: int, seed: int = 0, count: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, size, size), generator=generator, dtype=torch.uint8)


@st.composite
def binary_cases(draw: st.DrawFn) -> tuple[Trigger, Tensor]:
    """A trigger with a random 0/1 mask, shared by the channels or not, by the images or not, and random images."""
    channels, size = draw(st.sampled_from([1, 3])), draw(st.integers(3, 20))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    lead = (4,) if draw(st.booleans()) else ()
    mask_channels = draw(st.sampled_from(sorted({1, channels})))
    mask = torch.randint(0, 2, (*lead, mask_channels, size, size), generator=generator).float()
    pattern = torch.randint(0, 256, (*lead, channels, size, size), generator=generator).float() / 255
    return Trigger(mask, pattern), random_images(channels, size, draw(st.integers(0, 2**32)))


# Eq. 1


@quick
@given(binary_cases())
def test_binary_trigger_replaces_exactly_what_is_inside_the_mask(case: tuple[Trigger, Tensor]) -> None:
    trigger, images = case
    mask = trigger.mask.to(torch.uint8)
    stamped = trigger.apply(images)
    assert trigger.is_binary
    assert torch.equal(mask * stamped, (mask * (trigger.pattern * 255).round().to(torch.uint8)).expand_as(stamped))
    assert torch.equal((1 - mask) * stamped, (1 - mask) * images)


@quick
@given(binary_cases())
def test_binary_trigger_is_idempotent(case: tuple[Trigger, Tensor]) -> None:
    trigger, images = case
    once = trigger.apply(images)
    assert torch.equal(trigger.apply(once), once)


@quick
@given(binary_cases())
def test_stamped_images_are_new_and_of_the_same_type(case: tuple[Trigger, Tensor]) -> None:
    trigger, images = case
    before = images.clone()
    stamped = trigger.apply(images)
    assert stamped.dtype == torch.uint8
    assert stamped.shape == images.shape
    assert torch.equal(images, before)
    trigger.apply(images / 255)
    stamped += 1
    assert torch.equal(images, before)


@quick
@given(binary_cases())
def test_float_images_are_stamped_as_bytes_are(case: tuple[Trigger, Tensor]) -> None:
    trigger, images = case
    floats = trigger.apply(images.float() / 255)
    assert floats.dtype == torch.float32
    assert torch.equal((floats * 255).round().to(torch.uint8), trigger.apply(images))


def test_blend_by_hand() -> None:
    trigger = place((1, 4, 4), solid_tile(1, (0, 0, 0), 1), 0, 0, opacity=0.2)
    image = torch.full((1, 1, 4, 4), 200, dtype=torch.uint8)
    once = trigger.apply(image)
    assert not trigger.is_binary
    assert once[0, 0, 0, 0] == 160  # 0.8 * 200
    assert trigger.apply(once)[0, 0, 0, 0] == 128  # 0.8 ** 2 * 200
    assert once[0, 0, 1:].eq(200).all()


@quick
@given(opacity=st.floats(0.05, 0.95), size=st.integers(3, 20), channels=st.sampled_from([1, 3]))
def test_blending_twice_leaves_the_image_a_weight_of_one_minus_alpha_squared(
    opacity: float, size: int, channels: int
) -> None:
    trigger = place((channels, size, size), random_images(channels, 3)[0] / 255, 0, 0, opacity)
    image = random_images(channels, size).double() / 255
    twice = trigger.apply(trigger.apply(image))
    kept = (1 - trigger.mask) ** 2
    torch.testing.assert_close(twice, kept * image + (1 - kept) * trigger.pattern, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("mask", "pattern"),
    [
        (torch.ones(1, 4, 4), torch.ones(1, 5, 5)),
        (torch.full((1, 4, 4), 1.1), torch.ones(1, 4, 4)),
        (torch.ones(1, 4, 4), torch.full((1, 4, 4), -0.1)),
        (torch.ones(1, 4, 4, dtype=torch.uint8), torch.ones(1, 4, 4)),
        (torch.ones(1, 4, 4), torch.ones(1, 4, 4, dtype=torch.int64)),
    ],
)
def test_mask_and_pattern_are_checked(mask: Tensor, pattern: Tensor) -> None:
    with pytest.raises(ConfigError):
        Trigger(mask, pattern)


def test_trigger_refuses_images_of_another_size() -> None:
    trigger = watermark((3, 32, 32))
    with pytest.raises(ConfigError, match="32, 32"):
        trigger.apply(random_images(3, 28))


# the kinds of trigger


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_changes_the_masked_pixels_of_the_image(kind: str, channels: int, size: int) -> None:
    info = make_info(size, channels)
    trigger = BadNets(trigger_kind=kind).trigger(info)
    grey = torch.full((1, channels, size, size), 77, dtype=torch.uint8)
    changed = (trigger.apply(grey) != grey).any(1)
    assert trigger.is_binary
    assert trigger.pattern.shape == info.shape
    assert torch.equal(changed, trigger.mask.bool())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("side", [1, 3, 5, 7, 9, 15])
@pytest.mark.parametrize("kind", PATCHES)
def test_patches_mask_a_square(kind: str, side: int, size: int) -> None:
    info = make_info(size)
    triggers = BadNets(trigger_kind=kind, size=side).trigger_each(info, torch.arange(50), 3)
    masks = triggers.mask.reshape(-1, size, size)
    assert len(masks) == (50 if kind == "dynamic" else 1)
    assert masks.sum((1, 2)).eq(side**2).all()
    assert masks.any(1).sum(1).eq(side).all()
    assert masks.any(2).sum(1).eq(side).all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", [1, 3])
def test_where_the_fixed_triggers_are_and_what_they_show(channels: int, size: int) -> None:
    black = torch.zeros(1, channels, size, size, dtype=torch.uint8)

    def stamp(kind: str, image: Tensor = black, **params: object) -> Tensor:
        return BadNets(trigger_kind=kind, **params).trigger(make_info(size, channels)).apply(image)[0]

    pixel = stamp("pixel")
    assert pixel[:, -1, -1].eq(255).all()
    assert pixel.count_nonzero() == channels
    static = stamp("static")
    assert static[:, -3:, -3:].amax((1, 2)).tolist() == ([255] if channels == 1 else [255, 0, 0])
    assert static.count_nonzero() == 9
    corner = stamp("corner", 255 - black)
    assert corner[:, :3, :3].eq(0).all()
    assert (corner == 0).sum() == 9 * channels
    for color in ((10, 20, 30), (0, 200, 0)):
        shown = stamp("static", color=color)[:, -1, -1].tolist()
        assert shown == ([max(color)] if channels == 1 else list(color))
    tile = stamp("label_consistent")
    assert tile[:, -3:, -3:].eq(255 * torch.tensor(TILE)).all()
    assert tile.count_nonzero() == 4 * channels
    assert torch.equal(stamp("dynamic"), tile)


@pytest.mark.parametrize("size", SIZES)
def test_watermark_is_larger_than_a_patch_and_has_several_colors(size: int) -> None:
    trigger = watermark((3, size, size))
    inside = trigger.pattern[:, trigger.mask[0].bool()]
    assert trigger.mask.sum() > 9
    assert 0.05 < trigger.mask.mean() < 0.6
    assert len(torch.unique(inside, dim=1).T) >= 4
    assert inside.any(0).all()  # ink on every pixel of the mask
    assert watermark((1, size, size)).pattern[:, trigger.mask[0].bool()].unique().numel() >= 2


@pytest.mark.parametrize("kind", KINDS)
def test_opacity_is_the_value_of_the_mask(kind: str) -> None:
    trigger = BadNets(trigger_kind=kind, opacity=0.25).trigger(make_info(32))
    assert trigger.mask.unique().tolist() == [0, 0.25]
    assert not trigger.is_binary


@pytest.mark.parametrize("kind", PATCHES)
def test_trigger_larger_than_the_image_is_refused(kind: str) -> None:
    info = make_info(16)
    for side in (17, 20):
        attack = BadNets(trigger_kind=kind, size=side)
        with pytest.raises(ConfigError, match=f"{side} pixels"):
            attack.check(info)
        with pytest.raises(ConfigError):
            attack.trigger_each(info, torch.arange(3), 0)
    whole = BadNets(trigger_kind=kind, size=16)
    whole.check(info)
    assert whole.trigger_each(info, torch.arange(3), 0).mask.eq(1).all()


@pytest.mark.parametrize(("row", "column"), [(14, 0), (0, 14), (-15, 0), (0, -15)])
def test_place_outside_the_image_is_refused(row: int, column: int) -> None:
    with pytest.raises(ConfigError):
        place((1, 16, 16), label_consistent_tile(), row, column)
    inside = place((1, 16, 16), label_consistent_tile(), row - (1 if row > 0 else -1 if row else 0), 0)
    assert inside.mask.sum() == 9


def test_negative_places_count_from_the_far_edges() -> None:
    tile = label_consistent_tile()
    for negative, same in ((-1, 13), (-2, 12), (-14, 0)):
        assert torch.equal(place((1, 16, 16), tile, negative, 5).mask, place((1, 16, 16), tile, same, 5).mask)


def test_one_place_per_image() -> None:
    trigger = PlacedTiles((3, 8, 6), solid_tile(2, (255, 0, 0), 3), torch.tensor([0, 6]), torch.tensor([4, 1]))
    stamped = trigger.apply(torch.zeros(2, 3, 8, 6, dtype=torch.uint8))
    assert [image.nonzero().tolist() for image in stamped] == [
        [[0, 0, 4], [0, 0, 5], [0, 1, 4], [0, 1, 5]],
        [[0, 6, 1], [0, 6, 2], [0, 7, 1], [0, 7, 2]],
    ]


@pytest.mark.parametrize("factor", [1, 2, 3, 5])
def test_label_consistent_tile_is_the_enlarged_corner_pattern(factor: int) -> None:
    tile = label_consistent_tile(3 * factor)[0]
    assert torch.equal(tile, torch.tensor(TILE).float().kron(torch.ones(factor, factor)))
    assert (int((tile == 1).sum()), int((tile == 0).sum())) == (4 * factor**2, 5 * factor**2)
    assert not torch.equal(tile, tile.flip(0))


# what crop and flip leave of a trigger


def count_whole(masks: Tensor, padding: int = 4) -> float:
    """The share of all crops of all masks (N, 1, S, S) that show the whole trigger."""
    size = masks.shape[-1]
    windows = F.pad(masks, (padding,) * 4).unfold(2, size, 1).unfold(3, size, 1)
    return float((windows.sum((-1, -2)) == masks.sum((-1, -2), keepdim=True)).double().mean())


@pytest.mark.parametrize("side", [1, 3, 9, 20])
@pytest.mark.parametrize("kind", ["label_consistent", "static", "corner"])
def test_corner_patch_is_whole_in_25_of_81_crops(kind: str, side: int) -> None:
    mask = BadNets(trigger_kind=kind, size=side).trigger(make_info(32)).mask
    assert count_whole(mask[None]) == pytest.approx(25 / 81)


@pytest.mark.parametrize(("side", "share"), [(3, 0.8573), (9, 0.8234), (20, 0.6873)])
def test_share_of_crops_with_a_whole_patch_at_a_random_place(side: int, share: float) -> None:
    origins = torch.cartesian_prod(torch.arange(33 - side), torch.arange(33 - side))
    masks = PlacedTiles((1, 32, 32), label_consistent_tile(side), origins[:, 0], origins[:, 1]).mask
    assert count_whole(masks) == pytest.approx(share, abs=1e-4)


def test_augmentation_leaves_a_corner_patch_whole_as_often_as_it_should() -> None:
    info = replace(make_info(32, 1), crop_padding=4, flip=True)
    images = place(info.shape, solid_tile(3, (255, 255, 255), 1), -1, -1).apply(
        torch.zeros(8100, 1, 32, 32, dtype=torch.uint8)
    )
    pixels = Pixels.of(info, torch.device("cpu"))
    augmented = pixels.augment(images, pixels.draw_shifts(len(images), torch.Generator().manual_seed(0)))
    whole = augmented.count_nonzero((1, 2, 3)) == 9
    assert float(whole.double().mean()) == pytest.approx(25 / 81, abs=0.02)
    left, right = (augmented[whole][..., half].any(-1).any(-1).double().mean() for half in (slice(16), slice(16, 32)))
    assert float(left) == pytest.approx(0.5, abs=0.05)
    assert float(left + right) == 1


# random places


@pytest.mark.parametrize("size", [16, 32])
def test_every_admissible_place_occurs(size: int) -> None:
    for origins in random_places((3, size, size), 3, torch.arange(2000), seed=1):
        assert sorted(set(origins.tolist())) == list(range(size - 2))


@quick
@given(st.integers(0, 2**63 - 1), st.lists(st.integers(0, 499), min_size=1, max_size=20))
def test_place_is_a_function_of_seed_and_index_alone(seed: int, chosen: list[int]) -> None:
    shape = (1, 32, 24)
    full = random_places(shape, 5, torch.arange(500), seed)
    some = random_places(shape, 5, torch.tensor(chosen), seed)
    assert all(torch.equal(whole[chosen], part) for whole, part in zip(full, some, strict=True))


def test_places_differ_between_indices_and_between_seeds() -> None:
    shape, indices = (1, 32, 32), torch.arange(200)
    first, second = (torch.stack(random_places(shape, 3, indices, seed)) for seed in (0, 1))
    assert len(torch.unique(first, dim=1).T) > 150
    assert (first != second).any(0).sum() > 180
    assert (first[0] != first[1]).sum() > 150  # rows and columns are drawn on their own


def test_dynamic_trigger_stands_at_the_random_places() -> None:
    info, indices = make_info(16), torch.tensor([7, 0, 3])
    stamped = (
        BadNets(trigger_kind="dynamic").trigger_each(info, indices, 9).apply(torch.full((3, 3, 16, 16), 128).byte())
    )
    for image, row, column in zip(stamped, *random_places(info.shape, 3, indices, 9), strict=True):
        assert image[:, row : row + 3, column : column + 3].eq(255 * torch.tensor(TILE)).all()
        assert (image != 128).sum() == 27


def test_random_place_of_a_too_large_tile_is_refused() -> None:
    with pytest.raises(ConfigError, match="17 pixels"):
        random_places((1, 16, 32), 17, torch.arange(3), 0)
