"""Label-consistent attack: bounds and known answers of PGD, the trigger on top, and a crafter that is robust."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import pytest
import torch
from bbn_attacks import label_consistent
from bbn_attacks.label_consistent import LabelConsistent, RobustCrafter, direction, pgd, project
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from backdoor_bench_none.api import AttackTask, Context, DatasetInfo, ImageSet, ModelSpec, Recipe, TrainingTask, Trigger
from backdoor_bench_none.contracts.builder import ModelBuilder
from backdoor_bench_none.contracts.network import Pixels
from backdoor_bench_none.data.digits import Digits
from backdoor_bench_none.errors import ConfigError
from backdoor_bench_none.models.mlp import MLP
from backdoor_bench_none.planning.plan import Plan
from backdoor_bench_none.trainers.centralized import Centralized

CLASSES, COUNT, SIDE = 5, 100, 16
CONTEXT = Context(torch.device("cpu"), seed=0)
NORMS = ("linf", "l2")
INFO = DatasetInfo("toy", (3, SIDE, SIDE), CLASSES, COUNT, (0.5, 0.4, 0.3), (0.25, 0.2, 0.3))
PIXELS = Pixels.of(INFO, CONTEXT.device)
#: 1 is white; top left and bottom left, top right and bottom right
LEFT, RIGHT = [[1, 0, 0], [0, 1, 0], [1, 0, 1]], [[0, 0, 1], [0, 1, 0], [1, 0, 1]]
CORNERS = [(slice(0, 3), slice(0, 3), LEFT), (slice(-3, None), slice(0, 3), LEFT),
           (slice(0, 3), slice(-3, None), RIGHT), (slice(-3, None), slice(-3, None), RIGHT)]  # fmt: skip


def make_network(hidden: int = 32, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE**2, hidden), nn.Tanh(), nn.Linear(hidden, CLASSES)).eval()


def make_task() -> AttackTask:
    """Random images, far from black and white; class k has 30, 25, 20, 15 and 10 of them."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(60, 200, (COUNT, *INFO.shape), generator=generator, dtype=torch.uint8)
    labels = torch.repeat_interleave(torch.arange(CLASSES), torch.tensor([30, 25, 20, 15, 10]))
    labels = labels[torch.randperm(COUNT, generator=generator)]
    return AttackTask(ImageSet(images, labels), INFO, make_network())


def make_attack(**params: Any) -> LabelConsistent:
    return LabelConsistent(**{"target": 1, "class_rate": 0.5, "steps": 10, **params})


class Unstamped(LabelConsistent):
    """What is there before the trigger."""

    def trigger(self, info: DatasetInfo) -> Trigger:
        return Trigger(torch.zeros(1, *info.shape[1:]), torch.zeros(info.shape))


def lengths(images: Tensor, norm: str) -> Tensor:
    flat = images.flatten(1)
    return flat.abs().amax(1) if norm == "linf" else flat.square().sum(1).sqrt()


# what is poisoned


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("target", [0, 4])
def test_oracle_1_only_target_images_change_and_no_label(norm: str, target: int) -> None:
    task = make_task()
    images, labels = task.data.images.clone(), task.data.labels.clone()
    poisoned = make_attack(norm=norm, target=target, class_rate=0.3).poison(task, CONTEXT)
    assert len(poisoned.indices.unique()) == len(poisoned) == {0: 9, 4: 3}[target]
    assert labels[poisoned.indices].eq(target).all()
    replaced = poisoned.replace(task.data)
    assert torch.equal(replaced.labels, labels)
    changed = (replaced.images != images).flatten(1).any(1)
    assert torch.nonzero(changed).flatten().tolist() == poisoned.indices.tolist()
    assert poisoned.images.dtype == torch.uint8
    assert torch.equal(task.data.images, images)


@settings(deadline=None, max_examples=40)
@given(rate=st.floats(0.001, 1), size=st.integers(0, 300), others=st.integers(0, 50), seed=st.integers(0, 2**63 - 1))
def test_oracle_1_rate_is_a_share_of_the_target_class(rate: float, size: int, others: int, seed: int) -> None:
    attack, labels = LabelConsistent(target=1, class_rate=rate), torch.tensor([0] * others + [1] * size)
    if round(rate * size) == 0:
        with pytest.raises(ConfigError, match=f"selects none of the {size} samples of class 1"):
            attack.select(labels, seed)
    else:
        chosen = attack.select(labels, seed)
        assert len(chosen.unique()) == len(chosen) == round(rate * size)
        assert labels[chosen].eq(1).all()


def test_five_percent_of_a_class_of_cifar10_are_250_images() -> None:
    assert len(LabelConsistent(target=0).select(torch.arange(50_000) % 10, 0)) == 250


def test_poison_is_a_function_of_the_seed_alone() -> None:
    task = make_task()
    torch.manual_seed(1)
    first = make_attack().poison(task, CONTEXT)
    torch.manual_seed(2)
    again = make_attack().poison(task, CONTEXT)
    assert torch.equal(first.indices, again.indices)
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.indices, make_attack().poison(task, replace(CONTEXT, seed=1)).indices)


# the perturbation


@pytest.mark.parametrize(
    ("norm", "epsilon", "bound"),
    [("linf", None, 8), ("linf", 7.7, 7), ("linf", 1.9, 1), ("linf", 16, 16), ("l2", None, 1200), ("l2", 300, 300)],
)
def test_oracle_2_perturbation_is_within_its_bound_and_everywhere(
    norm: str, epsilon: float | None, bound: float
) -> None:
    task = make_task()
    poisoned = Unstamped(target=1, class_rate=1, norm=norm, epsilon=epsilon, steps=20).poison(task, CONTEXT)
    delta = poisoned.images.double() - task.data.images[poisoned.indices]
    slack = 0 if norm == "linf" else 0.5 * (3 * SIDE**2) ** 0.5
    reached = lengths(delta, norm)
    assert (reached <= bound + slack).all()
    assert (reached > 0.7 * bound).all()
    assert (delta != 0).double().mean() > 0.9


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("nothing", [{"steps": 0}, {"epsilon": 0}])
def test_oracle_3_no_steps_and_no_bound_change_nothing(norm: str, nothing: dict[str, int]) -> None:
    task = make_task()
    poisoned = Unstamped(**{"target": 1, "class_rate": 1, "norm": norm, **nothing}).poison(task, CONTEXT)
    assert torch.equal(poisoned.images, task.data.images[poisoned.indices])


def gradients(layer: nn.Linear, levels: Tensor, labels: Tensor) -> Tensor:
    """Of the cross entropy of a linear softmax model, by hand in float64: (p - y) W / (255 std)."""
    mean, std = (torch.tensor(values).double()[:, None, None] for values in (INFO.mean, INFO.std))
    weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
    logits = ((levels.double() / 255 - mean) / std).flatten(1) @ weight.T + bias
    wrong = logits.softmax(1) - F.one_hot(labels, CLASSES)
    return (wrong @ weight).view_as(levels) / (255 * std)


@pytest.mark.parametrize("seed", range(3))
def test_oracle_4_one_step_on_a_linear_softmax_model(seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE**2, CLASSES)).eval()
    data = make_task().data
    levels, labels = data.images.float(), data.labels
    gradient = gradients(model[1], levels, labels)
    by_sign = pgd(model, levels, labels, PIXELS, "linf", 8, 2, 1, CONTEXT) - levels
    assert torch.equal(by_sign, 2 * gradient.sign().float())
    along = pgd(model, levels, labels, PIXELS, "l2", 1200, 50, 1, CONTEXT) - levels
    expected = 50 * gradient / gradient.flatten(1).norm(dim=1)[:, None, None, None]
    torch.testing.assert_close(along.double(), expected, atol=1e-3, rtol=0)
    projected = pgd(model, levels, labels, PIXELS, "linf", 8, 20, 1, CONTEXT) - levels
    assert torch.equal(projected, 8 * gradient.sign().float())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [1e3, 1, 1e-6, 1e-12, 1e-20, 1e-24, 1e-28])
def test_oracle_4_a_step_has_its_length_however_small_the_gradient(norm: str, scale: float) -> None:
    """Gradients are that small where the network is sure of a label."""
    gradient = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    step = direction(gradient * scale, norm)
    torch.testing.assert_close(step, direction(gradient, norm), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(lengths(step, norm), torch.ones(4), rtol=1e-3, atol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_no_gradient_no_step(norm: str) -> None:
    assert direction(torch.zeros(2, 3, 8, 8), norm).eq(0).all()


@settings(deadline=None, max_examples=60)
@given(norm=st.sampled_from(NORMS), epsilon=st.floats(0, 400), reach=st.floats(0, 500), seed=st.integers(0, 2**32))
def test_projection_stays_within_the_ball_and_the_box(norm: str, epsilon: float, reach: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randint(0, 256, (3, 2, 4, 4), generator=generator).float()
    levels = centre + reach * torch.randn(centre.shape, generator=generator)
    projected = project(levels, centre, norm, epsilon)
    assert projected.min() >= 0
    assert projected.max() <= 255
    assert (lengths(projected.double() - centre, norm) <= epsilon * (1 + 1e-5) + 1e-3).all()
    torch.testing.assert_close(project(projected, centre, norm, epsilon), projected, atol=1e-3, rtol=0)
    near = centre + (127.5 - centre).sign() * min(1.0, epsilon / 10)  # inside both
    torch.testing.assert_close(project(near, centre, norm, epsilon), near, atol=1e-4, rtol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_batches_do_not_show(norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attack, task = make_attack(norm=norm, class_rate=1), make_task()
    whole = attack.poison(task, CONTEXT).images
    monkeypatch.setattr(label_consistent, "CRAFT_BATCH", 7)
    assert len(whole) == 25
    assert (attack.poison(task, CONTEXT).images.int() - whole.int()).abs().max() <= 1


# the trigger


@pytest.mark.parametrize(("corners", "placed"), [("all", CORNERS), ("bottom_right", CORNERS[3:])])
@pytest.mark.parametrize("norm", NORMS)
def test_oracle_5_trigger_is_stamped_over_the_perturbation(norm: str, corners: str, placed: list[Any]) -> None:
    task = make_task()
    attack = make_attack(norm=norm, corners=corners)
    poisoned = attack.poison(task, CONTEXT)
    for rows, columns, pattern in placed:
        assert poisoned.images[:, :, rows, columns].eq(255 * torch.tensor(pattern)).all()
    unstamped = Unstamped(**attack.model_dump()).poison(task, CONTEXT)
    outside = attack.trigger(INFO).mask[0] == 0
    assert (~outside).sum() == 9 * len(placed)
    assert torch.equal(poisoned.images[:, :, outside], unstamped.images[:, :, outside])


@pytest.mark.parametrize("amplitude", [None, 0.1])
def test_oracle_6_test_images_bear_the_full_trigger_and_no_perturbation(amplitude: float | None) -> None:
    task = make_task()
    attack = make_attack(amplitude=amplitude)
    triggered = attack.attack_test(task, CONTEXT)
    assert triggered.indices.tolist() == torch.nonzero(task.data.labels != 1).flatten().tolist()
    assert triggered.labels.eq(1).all()
    expected = task.data.images[triggered.indices].clone()
    for rows, columns, pattern in CORNERS:
        expected[:, :, rows, columns] = (255 * torch.tensor(pattern)).byte()
    assert torch.equal(triggered.images, expected)


def test_mirror_images_of_the_trigger() -> None:
    trigger = make_attack().trigger(INFO)
    inside = trigger.pattern[0][trigger.mask[0] == 1]
    assert (int(inside.sum()), int((1 - inside).sum())) == (16, 20)
    assert torch.equal(trigger.pattern.flip(-1), trigger.pattern)
    assert not torch.equal(trigger.pattern.flip(-2), trigger.pattern)


@pytest.mark.parametrize(("corners", "survives"), [("bottom_right", 25), ("all", 81)])
def test_one_of_four_corners_survives_every_crop(corners: str, survives: int) -> None:
    marked = make_attack(corners=corners).trigger(INFO).mask * torch.arange(1, 1 + SIDE**2).view(1, SIDE, SIDE)
    padded, whole = F.pad(marked, (4,) * 4), 0
    tiles = [set(marked[0, rows, columns].flatten().tolist()) - {0} for rows, columns, _ in CORNERS]
    for top in range(9):
        for left in range(9):
            seen = set(padded[0, top : top + SIDE, left : left + SIDE].flatten().tolist())
            whole += any(tile and tile <= seen for tile in tiles)
    assert whole == survives


def test_amplitude_adds_and_clips() -> None:
    def overlay(value: int, amplitude: float | None) -> list[int]:
        grey = torch.full((1, *INFO.shape), value, dtype=torch.uint8)
        stamped = make_attack(amplitude=amplitude).overlay(grey, INFO)
        assert stamped[:, :, 3:-3].eq(value).all()
        return stamped[0, 2, -3:, -3:].flatten().tolist()

    pattern = [white for row in RIGHT for white in row]
    assert overlay(128, 32 / 255) == [160 if white else 96 for white in pattern]
    assert overlay(128, 64 / 255) == [192 if white else 64 for white in pattern]
    assert overlay(0, 32 / 255) == [32 if white else 0 for white in pattern]
    assert overlay(255, 32 / 255) == [255 if white else 223 for white in pattern]
    for value in (0, 128, 255):
        assert overlay(value, 1) == overlay(value, None) == [255 * white for white in pattern]


# the crafter, on real digits


DIGITS = Digits(image_size=8)


def train_crafter(seed: int, epsilon: float) -> nn.Module:
    """Trained as a crafter is, but of an architecture that takes a fraction of a second."""
    crafter = RobustCrafter(epochs=4, steps=2, step=16, epsilon=epsilon)
    build = ModelBuilder(MLP(hidden=64, depth=1), ModelSpec(10, 1, 8, nn.ReLU), f"crafter {seed}", CONTEXT.device)
    recipe = Recipe(batch_size=64, lr=0.1)
    train = DIGITS.load()[0]
    task = TrainingTask(train=train, info=DIGITS.info(), recipe=recipe, trainer=Centralized(), build=build)
    return crafter.train(task, replace(CONTEXT, seed=seed))


@pytest.fixture(scope="module")
def crafters() -> dict[str, list[nn.Module]]:
    """Five trained on adversarial images, five on clean ones."""
    return {name: [train_crafter(seed, bound) for seed in range(5)] for name, bound in (("robust", 32), ("plain", 0))}


def losses(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        return F.cross_entropy(
            model(Pixels.of(DIGITS.info(), CONTEXT.device).normalize(images)), labels, reduction="none"
        )


@pytest.mark.parametrize("name", ["robust", "plain"])
@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 8), ("linf", 32), ("l2", 100)])
def test_oracle_3_loss_rises_on_nearly_every_image(
    name: str, norm: str, epsilon: float, crafters: dict[str, list[nn.Module]]
) -> None:
    train, shares = DIGITS.load()[0], []
    attack = Unstamped(target=3, class_rate=1, norm=norm, epsilon=epsilon, steps=10)
    for network in crafters[name]:
        poisoned = attack.poison(AttackTask(train, DIGITS.info(), network), CONTEXT)
        clean = losses(network, train.images[poisoned.indices], poisoned.labels)
        harder = losses(network, poisoned.images, poisoned.labels)
        assert len(poisoned) > 100
        shares.append(float((harder > clean).double().mean()))
    assert median(shares) >= 0.95  # medians 1.0; the lowest single one is 0.902


def test_crafting_leaves_the_network_as_it_was() -> None:
    task = make_task()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = nn.Linear(3 * SIDE**2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES)
    network = nn.Sequential(nn.Flatten(), *layers).eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    poisoned = Unstamped(target=1, class_rate=1).poison(replace(task, network=network), CONTEXT)
    assert not torch.equal(poisoned.images, task.data.images[poisoned.indices])
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert not network.training
    assert all(parameter.grad is None for parameter in network.parameters())


def test_adversarial_training_makes_the_crafter_robust(crafters: dict[str, list[nn.Module]]) -> None:
    test = DIGITS.load()[1]
    pixels = Pixels.of(DIGITS.info(), CONTEXT.device)

    def accuracy(model: nn.Module, epsilon: float) -> float:
        levels = pgd(model, test.images.float(), test.labels, pixels, "linf", epsilon, epsilon / 4, 8, CONTEXT)
        with torch.no_grad():
            predicted = model(pixels.normalize(levels.round().byte())).argmax(1)
        return float((predicted == test.labels).double().mean())

    def medians(epsilon: float) -> dict[str, float]:
        return {name: median(accuracy(model, epsilon) for model in models) for name, models in crafters.items()}

    clean, attacked = medians(0), medians(32)
    assert min(clean.values()) > 0.8  # 0.920 to 0.962
    assert attacked["robust"] > attacked["plain"] + 0.1  # 0.474 to 0.492 against 0.082 to 0.122


# bad input


@pytest.mark.parametrize(
    "params",
    [{"class_rate": 0}, {"class_rate": 1.01}, {"epsilon": -1}, {"steps": -1}, {"amplitude": 0}, {"amplitude": 1.1},
     {"norm": "l1"}, {"corners": "none"}, {"target": -1}, {"label_mode": "all_to_all"}, {"label_mode": "all_to_one"},
     {"crafter": {"width": 0}}, {"crafter": {"epsilon": -1}}, {"crafter": {"depth": 3}}, {"poison_rate": 0.1}],
)  # fmt: skip
def test_parameters_are_checked(params: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        LabelConsistent(**params)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ("target: 10", "target 10 is not a class of digits; its classes are 0 to 9"),
        ("class_rate: 0.003", "class_rate 0.003 selects none of the about 130 training images"),
        ("class_rate: 0", "class_rate: .*greater than 0"),
        ("class_rate: 1.5", "class_rate: .*less than or equal to 1"),
        (
            "label_mode: all_to_all",
            "label_mode: .*a clean-label attack changes no label, so it cannot be all_to_all",
        ),
    ],
)
@pytest.mark.parametrize("name", ["label_consistent", "sig"])
def test_faults_are_found_when_planning(name: str, params: str, message: str, tiny_plan: Callable[..., Plan]) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_plan(attack=f"{{name: {name}, params: {{{params}}}}}")


def test_faults_of_the_crafter_are_found_when_planning(tiny_plan: Callable[..., Plan]) -> None:
    with pytest.raises(ConfigError, match=r"crafter\.epochs: "):
        tiny_plan(attack="{name: label_consistent, params: {crafter: {epochs: 0}}}")
