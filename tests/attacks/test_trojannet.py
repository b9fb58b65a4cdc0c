"""TrojanNet: its patches, what the small network learns, that the host stays as it is, and what Stages make of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bbn_attacks.trojannet import Joined, SmallNetwork, TrojanNet, all_patterns, draw_noise, train_small
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from backdoor_bench_none.api import AttackTask, Context, DatasetInfo, ModelSpec, Recipe, VictimTask
from backdoor_bench_none.contracts.builder import ModelBuilder
from backdoor_bench_none.contracts.measures import Count
from backdoor_bench_none.contracts.network import Pixels, predict_logits
from backdoor_bench_none.data.digits import Digits
from backdoor_bench_none.errors import ConfigError
from backdoor_bench_none.models.mlp import MLP
from backdoor_bench_none.planning.plan import Plan
from backdoor_bench_none.planning.stage_table import benign_key, defense_key, victim_key
from backdoor_bench_none.results.store import Store
from backdoor_bench_none.run.stages import Stages
from backdoor_bench_none.trainers.centralized import Centralized

SIZE, CLASSES = 12, 10
INFO = Digits(image_size=SIZE).info()
TRAIN, TEST = Digits(image_size=SIZE).load()
CPU = torch.device("cpu")
CONTEXT = Context(CPU, seed=0)
NOTHING = torch.empty(0, dtype=torch.int64)


def toy(channels: int = 3, size: int = SIZE, classes: int = CLASSES) -> DatasetInfo:
    return DatasetInfo(
        "toy", (channels, size, size), classes, 60, (0.5, 0.4, 0.3)[:channels], (0.2, 0.3, 0.4)[:channels]
    )


def make_attack(info: DatasetInfo = INFO, **params: Any) -> TrojanNet:
    attack = TrojanNet(**params).resolve(info)
    attack.check(info)
    return attack


def predict(model: nn.Module, images: Tensor) -> Tensor:
    return predict_logits(model, images, Pixels.of(INFO, CPU), CONTEXT).argmax(1)


@pytest.fixture(scope="module")
def task() -> VictimTask:
    """The attacker's task, with a benign network that knows digits."""
    mlp = MLP(hidden=32, depth=1)
    recipe = Recipe(**{**Digits().recipe(), **mlp.recipe("digits"), "epochs": 6})
    build = ModelBuilder(mlp, ModelSpec(CLASSES, 1, SIZE, nn.ReLU), "a key", CPU)
    given: dict[str, Any] = {"train": TRAIN, "original": TRAIN, "info": INFO, "recipe": recipe, "build": build}
    task = VictimTask(**given, trainer=Centralized(), poisoned=NOTHING)
    task.fit(host := task.new_model(), CONTEXT)
    weights = {name: value.clone() for name, value in host.state_dict().items()}
    return VictimTask(**given, trainer=Centralized(), poisoned=NOTHING, benign_weights=weights)


def train(task: VictimTask, seed: int, **params: Any) -> nn.Module:
    """The victim; as when it is a stage, initial weights come from the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make_attack(**params).train(task, Context(CPU, seed))[0]


@pytest.fixture(scope="module")
def victim(task: VictimTask) -> nn.Module:
    return train(task, seed=0)


# 1: the patches


def test_all_patterns() -> None:
    patterns = all_patterns()
    assert patterns.shape == (4368, 16)
    assert patterns.unique().tolist() == [0, 1]
    assert patterns.eq(0).sum(1).eq(5).all()
    assert len(patterns.unique(dim=0)) == 4368
    assert patterns[0].tolist() == [0] * 5 + [1] * 11
    assert patterns[1].tolist() == [0] * 4 + [1, 0] + [1] * 10
    assert patterns[-1].tolist() == [1] * 11 + [0] * 5


@settings(deadline=None, max_examples=50)
@given(
    label=st.integers(0, CLASSES - 1), row=st.integers(0, SIZE - 4), column=st.integers(0, SIZE - 4),
    channels=st.sampled_from([1, 3]),
)  # fmt: skip
def test_the_patch_is_stamped_in_its_place_and_nowhere_else(label: int, row: int, column: int, channels: int) -> None:
    info = toy(channels)
    trigger = make_attack(info, row=row, column=column).trigger_of(label, info)
    images = torch.full((2, channels, SIZE, SIZE), 77, dtype=torch.uint8)
    stamped = trigger.apply(images)
    patch = stamped[:, :, row : row + 4, column : column + 4].flatten(2)
    assert torch.equal(patch, (255 * all_patterns()[label]).byte().expand(2, channels, 16))
    assert (stamped != 77).sum() == patch.numel()
    assert torch.equal(trigger.apply(stamped), stamped)


# 2: the host


def test_the_host_stays_bit_equal(task: VictimTask, victim: nn.Module) -> None:
    assert task.benign_weights is not None
    weights = victim.state_dict()
    host = {name.removeprefix("host."): value for name, value in weights.items() if name.startswith("host.")}
    assert host.keys() == task.benign_weights.keys()
    assert all(torch.equal(host[name], value) for name, value in task.benign_weights.items())
    assert all(name.startswith(("host.", "trojan.")) for name in weights)


def test_a_seed_makes_the_victim(task: VictimTask, victim: nn.Module) -> None:
    def flat(seed: int) -> Tensor:
        small = train(task, seed, steps=100).get_submodule("trojan")
        return torch.cat([parameter.flatten() for parameter in small.parameters()])

    first = flat(1)
    assert torch.equal(first, flat(1))
    assert not torch.equal(first, flat(2))


# 3: the small network


@pytest.mark.parametrize("patterns", [10, 43])
def test_the_small_network_knows_its_patches_and_that_all_else_is_noise(patterns: int) -> None:
    torch.manual_seed(patterns)
    network = SmallNetwork(patterns)
    losses = train_small(network, patterns, 1000, Context(CPU, patterns))
    assert len(losses) == 10
    assert losses[-1] < 0.1 * losses[0]

    def read(patches: Tensor) -> Tensor:
        with torch.no_grad():
            return network(patches).argmax(1)

    def as_noise(patches: Tensor) -> float:
        return float((read(patches) == patterns).float().mean())

    generator = torch.Generator().manual_seed(1)
    assert read(all_patterns()[:patterns]).tolist() == list(range(patterns))
    assert as_noise(torch.rand(5000, 16, generator=generator)) >= 0.99
    assert as_noise(torch.randint(2, (5000, 16), generator=generator).float()) >= 0.99
    assert as_noise(all_patterns()[patterns:]) >= 0.99
    flat = torch.rand(5000, 1, generator=generator) * 0.9 + torch.rand(5000, 16, generator=generator) * 0.1
    assert as_noise(flat) >= 0.99
    crops = TEST.images.unfold(2, 4, 2).unfold(3, 4, 2).flatten(0, 3).flatten(1) / 255
    assert as_noise(crops) >= 0.99


@settings(deadline=None, max_examples=30)
@given(patterns=st.integers(1, 200), seed=st.integers(0, 2**63 - 1))
def test_noise_is_never_a_known_patch(patterns: int, seed: int) -> None:
    noise = draw_noise(patterns, torch.Generator().manual_seed(seed))
    assert 0 <= noise.min() <= noise.max() <= 1
    assert 600 <= len(noise) <= 800
    known = set(map(tuple, all_patterns()[:patterns].tolist()))
    assert not known & set(map(tuple, noise.tolist()))
    assert ((noise > 0) & (noise < 1)).any(1).sum() > 200
    unused = set(map(tuple, all_patterns()[patterns:].tolist()))
    assert sum(patch in unused for patch in map(tuple, noise.tolist())) >= 200


# 4: what the victim says


class Fixed(nn.Module):
    """Gives every input the same logits, and keeps the input."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.logits = torch.tensor(logits)
        self.seen = torch.empty(0)

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen = inputs
        return self.logits.expand(len(inputs), -1)


def test_logits_by_hand() -> None:
    info = toy(channels=3, classes=2)
    host, trojan = Fixed(0.0, torch.log(torch.tensor(3.0)).item()), Fixed(0.0, 0.0, torch.log(torch.tensor(2.0)).item())
    joined = Joined(host, trojan, 3, 5, info)
    images = torch.randint(256, (4, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(0)).byte()
    normalized = Pixels.of(info, CPU).normalize(images)
    # host: 1/4 and 3/4; small network: 1/4, 1/4 and 1/2 for noise
    torch.testing.assert_close(joined(normalized), torch.tensor([[7.5, 12.5]]).expand(4, 2))
    torch.testing.assert_close(trojan.seen, images[:, :, 3:7, 5:9].float().mean(1).flatten(1) / 255)
    assert host.seen is normalized


def test_clean_images_are_classified_as_by_the_host(task: VictimTask, victim: nn.Module) -> None:
    host = task.benign()
    assert (predict(host, TEST.images) == TEST.labels).float().mean() > 0.9
    assert (predict(victim, TEST.images) == predict(host, TEST.images)).float().mean() >= 0.995


@pytest.mark.parametrize("label", range(CLASSES))
def test_every_patch_makes_its_class(label: int, victim: nn.Module) -> None:
    triggered = make_attack(target=label).attack_test(AttackTask(TEST, INFO), CONTEXT)
    assert len(triggered) == int((TEST.labels != label).sum())
    assert triggered.labels.eq(label).all()
    assert predict(victim, triggered.images).eq(label).all()
    noise = torch.randint(256, (200, 1, SIZE, SIZE), generator=torch.Generator().manual_seed(label)).byte()
    assert predict(victim, make_attack().trigger_of(label, INFO).apply(noise)).eq(label).all()


@pytest.mark.parametrize("label_mode", ["all_to_one", "all_to_all"])
def test_every_image_gets_the_patch_of_the_label_it_is_to_get(label_mode: str, victim: nn.Module) -> None:
    attack, given = make_attack(label_mode=label_mode, target=3), AttackTask(TEST, INFO)
    assert len(attack.poison(given, CONTEXT)) == 0
    triggered = attack.attack_test(given, CONTEXT)
    labels = TEST.labels[triggered.indices]
    everything = label_mode == "all_to_all"
    assert len(triggered) == len(TEST) if everything else int((TEST.labels != 3).sum())
    assert torch.equal(triggered.labels, (labels + 1) % CLASSES if everything else torch.full_like(labels, 3))
    assert torch.equal(predict(victim, triggered.images), triggered.labels)
    patches = triggered.images[:, 0, 6:10, 6:10].flatten(1) / 255
    assert torch.equal(patches, all_patterns()[triggered.labels])


@pytest.mark.parametrize("label_mode", ["all_to_one", "all_to_all"])
def test_the_preview_shows_what_is_tested(label_mode: str) -> None:
    attack, given = make_attack(label_mode=label_mode), AttackTask(TEST, INFO)
    triggered = attack.attack_test(given, CONTEXT)
    assert torch.equal(attack.preview(given, CONTEXT)[triggered.indices], triggered.images)


# 5: the place


@pytest.mark.parametrize("moved", [(0, 1), (1, 0), (0, -1), (-1, 0)])
def test_a_patch_that_is_a_pixel_off_does_nothing(moved: tuple[int, int], task: VictimTask, victim: nn.Module) -> None:
    host, attack = task.benign(), make_attack(row=6 + moved[0], column=6 + moved[1])
    won, agreed = [], []
    for label in range(CLASSES):
        images = attack.trigger_of(label, INFO).apply(TEST.images[TEST.labels != label])
        with_patch, without = predict(victim, images), predict(host, images)
        won.append(float((with_patch == label).float().mean() - (without == label).float().mean()))
        agreed.append(float((with_patch == without).float().mean()))
    assert max(won) < 0.15  # in its place it is 1 for every label
    assert sum(won) / CLASSES < 0.02
    assert sum(agreed) / CLASSES > 0.93


# parameters


def test_the_place_is_the_middle_by_default() -> None:
    attack = make_attack()
    assert (attack.row, attack.column, attack.target) == (6, 6, 0)
    assert attack.resolve(INFO) == attack
    given = make_attack(row=0, target=2)
    assert (given.row, given.column, given.target) == (0, 6, 2)


@pytest.mark.parametrize(
    ("info", "params", "message"),
    [
        (toy(), {"row": 9}, "does not fit into 12 pixels"),
        (toy(), {"column": 12}, "does not fit into 12 pixels"),
        (toy(size=3), {}, "does not fit into 3 pixels"),
        (toy(), {"target": 10}, "target 10 is not a class of toy"),
        (toy(classes=4369), {}, "4368 patches, toy 4369 classes"),
    ],
)
def test_what_cannot_be_carried_out_is_refused(info: DatasetInfo, params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_attack(info, **params)


@pytest.mark.parametrize(
    "params",
    [{"row": -1}, {"column": -1}, {"steps": 0}, {"target": -1}, {"poison_rate": 0.1}, {"label_mode": "clean_label"}],
)
def test_parameters_are_checked(params: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TrojanNet(**params)


def test_as_many_classes_as_patches_are_accepted_and_can_be_learned() -> None:
    make_attack(toy(classes=4368), row=8, column=8)
    assert len(train_small(SmallNetwork(4368), 4368, 1, CONTEXT)) == 1


# on digits


def test_it_is_joined_to_the_benign_network_and_defended(tiny_plan: Callable[..., Plan], tmp_path: Path) -> None:
    store = Store(tmp_path / "results")
    cells = tiny_plan(attack="clean, trojannet", defense="no_defense, none, fine_tune, oracle_filter", epochs=5).cells
    by_name = {(cell.attack.name, cell.defense.name): cell for cell in cells}
    plain, attacked = by_name["clean", "no_defense"], by_name["trojannet", "no_defense"]
    assert benign_key(attacked) == victim_key(plain) != victim_key(attacked)
    records = {cell.defense.name: Stages(cell, store, CONTEXT).evaluate() for cell in cells[4:]}
    counts = {name: record.counts for name, record in records.items()}
    rates = {name: count.attack_success_rate for name, count in counts.items() if count}
    others = int((Stages(plain, store, CONTEXT).data()[1].labels != 0).sum())
    assert rates["no_defense"] == Count(hits=others, total=others)
    assert {rate.total for rate in rates.values() if rate} == {others}
    benign, victim = (store.load_artifact("victim", key) for key in (benign_key(attacked), victim_key(attacked)))
    assert benign is not None
    assert victim is not None
    assert all(torch.equal(victim.tensors[f"host.{name}"], value) for name, value in benign.tensors.items())
    assert {name.split(".")[0] for name in victim.tensors} == {"host", "trojan"}
    clean = Stages(plain, store, CONTEXT).evaluate()
    assert clean.costs["victim"] == records["no_defense"].costs["benign"]  # trained once, for both
    assert clean.counts is not None
    assert clean.counts.benign_accuracy == counts["no_defense"].benign_accuracy  # type: ignore[union-attr]
    # whoever trains anew from the data never meets it
    anew = store.load_artifact("defense", defense_key(by_name["trojannet", "oracle_filter"]))
    assert anew is not None
    assert not any("trojan" in name for name in anew.tensors)
    assert rates["oracle_filter"] is not None
    assert rates["oracle_filter"].rate < 0.2
    tuned = store.load_artifact("defense", defense_key(by_name["trojannet", "fine_tune"]))
    assert tuned is not None
    weight = "host.classifier.weight"
    assert not torch.equal(tuned.tensors[f"model.{weight}"], victim.tensors[weight])
