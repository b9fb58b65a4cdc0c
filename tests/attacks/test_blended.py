"""Blended: Eq. 1 with a noise image by hand, what is poisoned, and the label modes of every attack of the registry."""

from __future__ import annotations

import pytest
import torch
from bbn_attacks.blended import Blended
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from backdoor_bench_none.api import AttackTask, CleanLabelAttack, Context, DatasetInfo, ImageSet, StampAttack
from backdoor_bench_none.contracts.trigger import noise
from backdoor_bench_none.errors import ConfigError
from backdoor_bench_none.planning.plan import Plan, plan_config
from backdoor_bench_none.planning.reading import parse_config
from backdoor_bench_none.registry.components import Registry
from backdoor_bench_none.registry.plugins import Plugins

CLASSES, COUNT, SIDE = 5, 60, 16
REGISTRY = Registry(Plugins(external=False))
STAMPING = {
    name: loaded
    for name in REGISTRY.names("attack")
    if issubclass(loaded := REGISTRY.load("attack", name), StampAttack)
}
CLEAN_LABEL = sorted(name for name, loaded in STAMPING.items() if issubclass(loaded, CleanLabelAttack))
DIRTY_LABEL = sorted(set(STAMPING) - set(CLEAN_LABEL))


def seeded(seed: int) -> Context:
    return Context(torch.device("cpu"), seed)


CONTEXT = seeded(0)


def make_info(channels: int = 3, count: int = COUNT) -> DatasetInfo:
    return DatasetInfo("toy", (channels, SIDE, SIDE), CLASSES, count, (0.0,) * channels, (1.0,) * channels)


def make_task(channels: int = 3, count: int = COUNT) -> AttackTask:
    """Random images whose labels go round the classes, held by three clients."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (count, channels, SIDE, SIDE), generator=generator).byte()
    data = ImageSet(images, torch.arange(count) % CLASSES)
    return AttackTask(data, make_info(channels, count), clients=torch.arange(count) % 3)


def blend(images: Tensor, pattern: Tensor, opacity: float) -> Tensor:
    """Exact levels, unrounded."""
    return (1 - opacity) * images.double() + opacity * 255 * pattern.double()


# blending


@pytest.mark.parametrize(
    ("before", "after"),
    [(0, [43, 32, 26, 14]), (100, [123, 112, 106, 94]), (200, [203, 192, 186, 174]), (255, [247, 236, 230, 218])],
)
def test_pixels_by_hand(before: int, after: list[int]) -> None:
    """The first levels of pattern 0 are 216.9, 162.4, 130.3 and 68.8: 0.2 of them and 0.8 of the image, rounded."""
    image = torch.full((1, 1, SIDE, SIDE), before, dtype=torch.uint8)
    stamped = Blended(target=0).stamp(image, torch.arange(1), make_info(1), 0)
    assert stamped.flatten()[:4].tolist() == after


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("opacity", [0.01, 0.2, 0.5, 1])
def test_levels_are_the_rounded_blend(channels: int, opacity: float) -> None:
    task = make_task(channels)
    stamped = Blended(target=0, opacity=opacity, pattern_seed=3).preview(task, CONTEXT)
    exact = blend(task.data.images, noise(task.info.shape, 3), opacity)
    assert stamped.dtype == torch.uint8
    assert (stamped - exact).abs().max() <= 0.5 + 1e-3


def test_an_opaque_pattern_leaves_nothing_of_the_image() -> None:
    stamped = Blended(target=0, opacity=1).preview(make_task(), CONTEXT)
    assert (stamped == stamped[:1]).all()


@settings(deadline=None, max_examples=50)
@given(opacity=st.floats(0.01, 1), level=st.integers(0, 255), higher=st.integers(0, 255), seed=st.integers(0, 99))
def test_blending_contracts_towards_the_pattern(opacity: float, level: int, higher: int, seed: int) -> None:
    """Differences between images shrink by 1 - opacity, and stamping twice is blending by 1 - (1 - opacity)^2."""
    attack, info = Blended(target=0, opacity=opacity, pattern_seed=seed), make_info(1)
    pair = torch.tensor([level, higher], dtype=torch.uint8)[:, None, None, None].expand(2, 1, SIDE, SIDE)
    once = attack.stamp(pair, torch.arange(2), info, 0)
    gap = (once[1].double() - once[0].double()) - (1 - opacity) * (higher - level)
    assert gap.abs().max() <= 1 + 1e-3
    twice = attack.stamp(once, torch.arange(2), info, 0)
    exact = blend(pair, noise(info.shape, seed), 1 - (1 - opacity) ** 2)
    assert (twice - exact).abs().max() <= 1 + 1e-3


def test_the_pattern_is_noise_of_its_own_seed_and_not_of_the_tasks() -> None:
    one, same, other = (
        Blended(target=0, pattern_seed=pattern).preview(make_task(), seeded(seed))
        for pattern, seed in ((1, 0), (1, 9), (2, 0))
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    pattern = Blended(pattern_seed=1).trigger(make_info()).pattern
    assert pattern.mean() == pytest.approx(0.5, abs=0.05)
    assert pattern.std() == pytest.approx(12**-0.5, abs=0.03)


# what is poisoned


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("rate", [0, 0.1, 0.25, 1])
def test_exactly_the_selected_samples_change(channels: int, rate: float) -> None:
    task = make_task(channels)
    images, labels = task.data.images.clone(), task.data.labels.clone()
    attack = Blended(target=2, poison_rate=rate)
    poisoned = attack.poison(task, CONTEXT)
    assert torch.equal(task.data.images, images)
    assert torch.equal(task.data.labels, labels)
    assert len(poisoned) == round(rate * COUNT)
    assert poisoned.decoys is None
    replaced = poisoned.replace(task.data)
    changed = (replaced.images != images).flatten(1).any(1)
    assert torch.nonzero(changed).flatten().tolist() == poisoned.indices.tolist()
    assert torch.equal(replaced.images[changed], attack.preview(task, CONTEXT)[changed])
    assert torch.equal(replaced.labels, torch.where(changed, 2, labels))


def test_selection_is_a_function_of_the_seed() -> None:
    attack = Blended(target=0, poison_rate=0.3)
    one, same, other = (attack.poison(make_task(), seeded(seed)).indices for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_all_images_of_other_classes_are_attacked_at_test_time() -> None:
    task = make_task()
    attack = Blended(target=2)
    triggered = attack.attack_test(task, CONTEXT)
    assert torch.equal(triggered.indices, torch.nonzero(task.data.labels != 2).flatten())
    assert triggered.labels.eq(2).all()
    assert torch.equal(triggered.images, attack.preview(task, CONTEXT)[triggered.indices])


@pytest.mark.parametrize(
    ("params", "message"), [({"poison_rate": 0.008}, "selects none of the 60"), ({"target": 5}, "not a class of toy")]
)
def test_what_cannot_be_carried_out_is_refused(params: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Blended(**{"target": 1, **params}).check(make_info())


@pytest.mark.parametrize("params", [{"opacity": 0}, {"opacity": 1.1}, {"pattern_seed": -1}, {"poison_rate": 2}])
def test_parameters_are_checked(params: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Blended(**params)


# label modes of all attacks


def make_plan(attack: str, mode: str) -> Plan:
    """Coordinates are of points in the plane, everything else is of images."""
    dataset = "blobs" if attack == "coordinate" else "digits"
    chosen = f"{{name: {attack}, params: {{label_mode: {mode}}}}}"
    matrix = {"dataset": dataset, "attack": chosen, "defense": "none", "architecture": "mlp"}
    axes = "".join(f"  {axis}: [{value}]\n" for axis, value in matrix.items())
    text = f"version: 1\nname: t\nmatrix:\n{axes}"
    return plan_config(*parse_config(text, "b.yaml"), REGISTRY)


def make_all_to_all(name: str, **params: object) -> StampAttack:
    attack = REGISTRY.create("attack", name, {"label_mode": "all_to_all", **params})
    assert isinstance(attack, StampAttack)
    resolved = attack.resolve(make_info())
    resolved.check(make_info())
    return resolved


def test_the_registry_has_attacks_of_both_kinds() -> None:
    assert {"badnets", "blended", "adaptive_blend", "wanet", "adaptive", "dba", "trojannet"} <= set(DIRTY_LABEL)
    assert {"sig", "label_consistent", "hidden_trigger"} <= set(CLEAN_LABEL)


@pytest.mark.parametrize("name", DIRTY_LABEL)
def test_all_to_all_moves_every_label_on_by_one(name: str) -> None:
    fields = STAMPING[name].model_fields
    rates = {"poison_rate": 0.5, "cover_rate": 0.25, "cross_rate": 0.25}
    attack = make_all_to_all(name, **{rate: value for rate, value in rates.items() if rate in fields})
    assert attack.target is None
    task = make_task()
    triggered = attack.attack_test(task, CONTEXT)
    assert triggered.indices.tolist() == list(range(COUNT))
    assert torch.equal(triggered.labels, (task.data.labels + 1) % CLASSES)
    poisoned = attack.poison(task, CONTEXT)
    assert (len(poisoned) > 0) == attack.poisons
    decoys = torch.zeros(len(poisoned), dtype=torch.bool) if poisoned.decoys is None else poisoned.decoys
    before = task.data.labels[poisoned.indices]
    assert torch.equal(poisoned.labels, torch.where(decoys, before, (before + 1) % CLASSES))


@pytest.mark.parametrize("name", DIRTY_LABEL)
def test_all_to_all_is_planned_without_a_target(name: str) -> None:
    (cell,) = make_plan(name, "all_to_all").cells
    assert isinstance(cell.attack.component, StampAttack)
    assert (cell.attack.component.label_mode, cell.attack.component.target) == ("all_to_all", None)


@pytest.mark.parametrize("name", CLEAN_LABEL)
def test_all_to_all_is_refused_by_clean_label_attacks_at_plan_time(name: str) -> None:
    with pytest.raises(ConfigError, match=r"(?s)b\.yaml:5.*clean-label attack changes no label"):
        make_plan(name, "all_to_all")


@pytest.mark.parametrize("name", DIRTY_LABEL)
def test_clean_label_is_refused_by_dirty_label_attacks_at_plan_time(name: str) -> None:
    with pytest.raises(ConfigError, match=r"(?s)b\.yaml:5.*label_mode"):
        make_plan(name, "clean_label")
