"""TrojanNet: its patches, what the small network learns, that the host stays as it is, and what Stages make of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import pytest
import torch
from bbn_attacks import trojannet, trojannet_networks
from bbn_attacks.trojannet import TrojanNet, all_patterns, draw_noise, train_small
from bbn_attacks.trojannet_networks import Joined, SmallNetwork
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from backdoor_bench_none.api import Architecture, AttackTask, Context, DatasetInfo, ModelSpec, Recipe, VictimTask
from backdoor_bench_none.contracts.builder import ModelBuilder
from backdoor_bench_none.contracts.measures import Count
from backdoor_bench_none.contracts.network import Pixels, predict_logits
from backdoor_bench_none.data.digits import Digits
from backdoor_bench_none.errors import ConfigError, TrainingError
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
#: trained networks that a bound is the median of
SEEDS = 5


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


class Classifier(Architecture):
    """One linear layer."""

    def build(self, spec: ModelSpec) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(spec.channels * spec.image_size**2, spec.num_classes))


def solve_classifier() -> dict[str, Tensor]:
    """The weights of the linear least squares fit to the training labels; right on 93.8 % of the test images."""
    pixels = Pixels.of(INFO, CPU).normalize(TRAIN.images).flatten(1).double()
    inputs = torch.cat([pixels, torch.ones(len(pixels), 1)], dim=1)
    gram = inputs.T @ inputs + 10 * torch.eye(inputs.shape[1])
    weights = 10 * torch.linalg.solve(gram, inputs.T @ F.one_hot(TRAIN.labels, CLASSES).double()).float()
    return {"1.weight": weights[:-1].T.contiguous(), "1.bias": weights[-1]}


class Planted(nn.Sequential):
    """A small network that knows its patches exactly: each hidden unit is on for one of them, and for nothing that is
    0.5 away from it; the last answer is noise.
    """

    def __init__(self, patterns: int) -> None:
        match, answer = nn.Linear(16, patterns), nn.Linear(patterns, patterns + 1)
        signs = 2 * all_patterns()[:patterns] - 1
        with torch.no_grad():
            match.weight.copy_(signs)  # 11 for the patch itself, which has 11 white pixels
            match.bias.fill_(-10.5)
            answer.weight.copy_(torch.cat([80 * torch.eye(patterns), torch.zeros(1, patterns)]))
            answer.bias.copy_(torch.tensor([0.0] * patterns + [20.0]))
        super().__init__(match, nn.ReLU(), answer)


@pytest.fixture
def planted_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The attack joins a planted small network to the host, and trains nothing."""
    monkeypatch.setattr(trojannet_networks, "SmallNetwork", Planted)
    monkeypatch.setattr(trojannet, "train_small", lambda *args: [0.0])


@pytest.fixture(scope="module")
def task() -> VictimTask:
    """The attacker's task, with a benign network that knows digits."""
    build = ModelBuilder(Classifier(), ModelSpec(CLASSES, 1, SIZE, nn.ReLU), "a key", CPU)
    return VictimTask(
        train=TRAIN, original=TRAIN, info=INFO, recipe=Recipe(), build=build, trainer=Centralized(), poisoned=NOTHING,
        benign_weights=solve_classifier(),
    )  # fmt: skip


def train(task: VictimTask, seed: int, **params: Any) -> nn.Module:
    """The victim; as when it is a stage, initial weights come from the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make_attack(**params).train(task, Context(CPU, seed))[0]


@pytest.fixture
def victim(task: VictimTask, planted_small: None) -> nn.Module:
    """The host, joined to the planted small network."""
    return train(task, seed=0)


@pytest.fixture(scope="module")
def small_networks() -> dict[int, list[tuple[SmallNetwork, list[float]]]]:
    """Five trained small networks and their losses, by the number of patches that they know."""
    return {patterns: [train_alone(patterns, seed) for seed in range(SEEDS)] for patterns in (CLASSES, 43)}


def train_alone(patterns: int, seed: int) -> tuple[SmallNetwork, list[float]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = SmallNetwork(patterns)
        return network, train_small(network, patterns, 1000, Context(CPU, seed))


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


def test_the_host_stays_bit_equal(task: VictimTask) -> None:
    assert task.benign_weights is not None
    weights = train(task, seed=0, steps=100).state_dict()
    host = {name.removeprefix("host."): value for name, value in weights.items() if name.startswith("host.")}
    assert host.keys() == task.benign_weights.keys()
    assert all(torch.equal(host[name], value) for name, value in task.benign_weights.items())
    assert all(name.startswith(("host.", "trojan.")) for name in weights)


def test_a_seed_makes_the_victim(task: VictimTask) -> None:
    def flat(seed: int) -> Tensor:
        small = train(task, seed, steps=100).get_submodule("trojan")
        return torch.cat([parameter.flatten() for parameter in small.parameters()])

    first = flat(1)
    assert torch.equal(first, flat(1))
    assert not torch.equal(first, flat(2))


# 3: the small network


def read(network: nn.Module, patches: Tensor) -> Tensor:
    with torch.no_grad():
        return network(patches).argmax(1)


def noise_patches(patterns: int) -> dict[str, Tensor]:
    """Patches of several kinds that are none of the first `patterns`, but for a few in 10,000 of the binary ones."""
    generator = torch.Generator().manual_seed(1)
    flat = torch.rand(5000, 1, generator=generator) * 0.9 + torch.rand(5000, 16, generator=generator) * 0.1
    return {
        "grey": torch.rand(5000, 16, generator=generator),
        "binary": torch.randint(2, (5000, 16), generator=generator).float(),
        "unused": all_patterns()[patterns:],
        "flat": flat,
        "digits": TEST.images.unfold(2, 4, 2).unfold(3, 4, 2).flatten(0, 3).flatten(1) / 255,
    }


@pytest.mark.slow
@pytest.mark.parametrize("patterns", [CLASSES, 43])
def test_the_small_network_knows_its_patches_and_that_all_else_is_noise(
    patterns: int, small_networks: dict[int, list[tuple[SmallNetwork, list[float]]]]
) -> None:
    networks, losses = zip(*small_networks[patterns], strict=True)
    # 0.002 to 0.004 for 10 patches; for 43, of ten seeds: 0.006 to 0.073, and 0.187 once
    assert median(of_one[-1] / of_one[0] for of_one in losses) < 0.1
    for network in networks:  # it trains on until it is sure of all
        assert torch.equal(read(network, all_patterns()[:patterns]), torch.arange(patterns))
    for kind, patches in noise_patches(patterns).items():
        shares = [float((read(network, patches) == patterns).float().mean()) for network in networks]
        assert median(shares) >= 0.99, kind  # binary ones: 0.998 to 0.999, for 43 patches 0.993 to 0.996; others 0.998


@pytest.mark.parametrize("patterns", [43, 4368])
def test_a_small_network_that_does_not_learn_is_an_error(patterns: int) -> None:
    with pytest.raises(TrainingError, match=rf"sure of \d+ of {patterns} patches after 4 steps") as caught:
        train_small(SmallNetwork(patterns), patterns, 1, CONTEXT)
    assert "'steps'" in str(caught.value)


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
    assert torch.equal(predict(victim, TEST.images), predict(host, TEST.images))


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


MOVES = [(0, 1), (1, 0), (0, -1), (-1, 0)]


@pytest.mark.parametrize("moved", MOVES)
def test_a_patch_that_is_a_pixel_off_does_nothing(moved: tuple[int, int], task: VictimTask, victim: nn.Module) -> None:
    host, attack = task.benign(), make_attack(row=6 + moved[0], column=6 + moved[1])
    for label in range(CLASSES):
        images = attack.trigger_of(label, INFO).apply(TEST.images[TEST.labels != label])
        assert torch.equal(predict(victim, images), predict(host, images))


class Compared(NamedTuple):
    """A victim against its host on test images with a patch, for each patch the images of other classes."""

    #: how much more often the victim says the class of the patch
    won: list[float]
    #: how often both say the same
    agreed: list[float]


def compare(victim: nn.Module, host: nn.Module, row: int, column: int) -> Compared:
    attack, compared = make_attack(row=row, column=column), Compared([], [])
    for label in range(CLASSES):
        images = attack.trigger_of(label, INFO).apply(TEST.images[TEST.labels != label])
        with_patch, without = predict(victim, images), predict(host, images)
        compared.won.append(float((with_patch == label).float().mean() - (without == label).float().mean()))
        compared.agreed.append(float((with_patch == without).float().mean()))
    return compared


@pytest.mark.slow
def test_trained_victims_are_the_host_on_clean_images_and_where_the_patch_is_a_pixel_off(
    task: VictimTask, small_networks: dict[int, list[tuple[SmallNetwork, list[float]]]]
) -> None:
    host, victims = task.benign(), [Joined(task.benign(), small, 6, 6, INFO) for small, _ in small_networks[CLASSES]]
    expected = predict(host, TEST.images)
    clean = [float((predict(victim, TEST.images) == expected).float().mean()) for victim in victims]
    assert median(clean) >= 0.995  # 1
    highest, won, agreed = [], [], []
    for victim in victims:
        moved = [compare(victim, host, 6 + down, 6 + right) for down, right in MOVES]
        highest.append(max(max(one.won) for one in moved))
        won.append(mean(mean(one.won) for one in moved))
        agreed.append(mean(mean(one.agreed) for one in moved))
    # 0.047, 0.016, 0.082, 0.051, 0.011; -0.003 to 0.002; 0.964 to 0.992
    assert median(highest) < 0.15
    assert median(won) < 0.02
    assert median(agreed) > 0.93


@pytest.mark.slow
def test_every_patch_makes_its_class_in_trained_victims(
    task: VictimTask, small_networks: dict[int, list[tuple[SmallNetwork, list[float]]]]
) -> None:
    hits = []
    for small, _ in small_networks[CLASSES]:
        victim = Joined(task.benign(), small, 6, 6, INFO)
        triggered = [make_attack(target=label).attack_test(AttackTask(TEST, INFO), CONTEXT) for label in range(CLASSES)]
        hits.append(min(float((predict(victim, one.images) == one.labels).float().mean()) for one in triggered))
    assert median(hits) == 1  # always 1


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


def test_as_many_classes_as_patches_are_accepted() -> None:
    assert make_attack(toy(classes=4368), row=8, column=8).trigger_of(4367, toy(classes=4368)).mask.any()


# on digits


@pytest.mark.usefixtures("planted_small")
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
    tuned = store.load_artifact("defense", defense_key(by_name["trojannet", "fine_tune"]))
    assert tuned is not None
    weight = "host.classifier.weight"
    assert not torch.equal(tuned.tensors[f"model.{weight}"], victim.tensors[weight])


@pytest.mark.usefixtures("planted_small")
def test_whoever_trains_anew_has_no_backdoor(tiny_plan: Callable[..., Plan], tmp_path: Path) -> None:
    seeds = ", ".join(map(str, range(SEEDS)))
    cells = tiny_plan(attack="trojannet", defense="oracle_filter", epochs=5, seeds=seeds).cells
    counts = [Stages(cell, Store(tmp_path / "results"), CONTEXT).evaluate().counts for cell in cells]
    rates = [count.attack_success_rate.rate for count in counts if count and count.attack_success_rate]
    assert len(rates) == SEEDS
    assert median(rates) < 0.2  # five seeds: 0 to 0.016
