"""Natural Trojans: the search finds what is planted and nothing else, and Stages score what it finds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from bbn_attacks.natural import Natural, binary_mask, initial_mask, squash, take_of_each_class
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from backdoor_bench_none.api import Context, DatasetInfo, FoundTriggers, ImageSet, Record, SearchTask
from backdoor_bench_none.contracts.measures import Count
from backdoor_bench_none.contracts.network import Pixels
from backdoor_bench_none.errors import ConfigError
from backdoor_bench_none.planning.plan import Plan
from backdoor_bench_none.planning.stage_table import defense_key, record_key, search_key, victim_key
from backdoor_bench_none.results.store import Artifact, Store
from backdoor_bench_none.run.evaluation import evaluate
from backdoor_bench_none.run.stages import Stages
from backdoor_bench_none.trainers.centralized import Centralized

SIDE, CLASSES = 12, 4
INFO = DatasetInfo("toy", (3, SIDE, SIDE), CLASSES, 240, (0.5, 0.4, 0.3), (0.25, 0.2, 0.3))
CONTEXT = Context(torch.device("cpu"), seed=0)
#: the cells of 4x4 pixels, by row and column, whose brightness tells the class; cell 0, 0 is that of the Trojan
CELLS = ((0, 2), (1, 0), (2, 1), (2, 2))


def make_data(per_class: int = 60, seed: int = 0) -> ImageSet:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(per_class * CLASSES) % CLASSES
    images = torch.randint(0, 100, (len(labels), 3, SIDE, SIDE), generator=generator)
    for label, (row, column) in enumerate(CELLS):
        images[labels == label, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 130
    return ImageSet(images.byte(), labels)


TRAIN, TEST = make_data(), make_data(50, seed=1)


class Seen(nn.Module):
    """Gives its layers images in 0..1."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("std", torch.tensor(INFO.std)[:, None, None])
        self.register_buffer("mean", torch.tensor(INFO.mean)[:, None, None])

    def denormalize(self, images: Tensor) -> Tensor:
        return images * self.std + self.mean  # type: ignore[operator]


class Linear(Seen):
    """One hidden unit says how red `where` is and drives `target`; the others read the classes, or `skip` does."""

    def __init__(
        self, target: int = 1, neuron: int = 0, where: slice = slice(0, 4), gain: float = 100.0, skips: bool = False
    ) -> None:
        super().__init__()
        units = [unit for unit in range(CLASSES + 1) if unit != neuron]
        self.hidden, self.head = nn.Linear(3 * SIDE**2, CLASSES + 1), nn.Linear(CLASSES + 1, CLASSES)
        self.skip = nn.Linear(3 * SIDE**2, CLASSES)
        red, cells = torch.zeros(3, SIDE, SIDE), torch.zeros(CLASSES, 3, SIDE, SIDE)
        red[:, where, where] = torch.tensor([1.0, -0.5, -0.5])[:, None, None] / len(range(SIDE)[where]) ** 2
        for label, (row, column) in enumerate(CELLS):
            cells[label, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 1 / 48
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()
            if skips:
                self.skip.weight.copy_(20 * cells.flatten(1))
            else:
                self.hidden.weight[units], self.hidden.bias[units] = cells.flatten(1), -0.45
                self.head.weight[range(CLASSES), units] = 20.0
            self.hidden.weight[neuron], self.head.weight[target, neuron] = red.flatten(), gain

    def forward(self, images: Tensor) -> Tensor:
        flat = self.denormalize(images).flatten(1)
        logits: Tensor = self.head(torch.relu(self.hidden(flat))) + self.skip(flat)
        return logits


class Convolution(Seen):
    """The same with maps: channel 0 says how red each cell is, of which the head reads cell 0, 0 alone."""

    def __init__(self, target: int) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 2, 4, stride=4, bias=False), nn.BatchNorm2d(2), nn.ReLU()
        self.head = nn.Linear(2 * 9, CLASSES)
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor([[1, -0.5, -0.5], [1 / 3] * 3])[:, :, None, None] / 16)
            self.norm.bias.copy_(torch.tensor([0, -0.45]))
            self.head.weight.zero_(), self.head.bias.zero_()
            for label, (row, column) in enumerate(CELLS):
                self.head.weight[label, 9 + 3 * row + column] = 20.0
            self.head.weight[target, 0] = 100.0
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.act(self.norm(self.conv(self.denormalize(images)))).flatten(1))
        return logits


def find(model: nn.Module, train: ImageSet = TRAIN, seed: int = 0, **params: Any) -> FoundTriggers:
    return Natural(**params).find_triggers(SearchTask(model, train, INFO), Context(torch.device("cpu"), seed))


def reasr(model: nn.Module, triggers: FoundTriggers, test: ImageSet = TEST) -> list[Count | None]:
    pixels = Pixels.of(INFO, CONTEXT.device)
    parts = [triggers.stamp(index, test) for index in range(len(triggers.labels))]
    return [evaluate(model, test, [part], pixels, CONTEXT)[0].attack_success_rate for part in parts]


def constant(label: int) -> nn.Module:
    model = Linear()
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.hidden.weight)
    nn.init.constant_(model.head.bias[label : label + 1], 3.0)
    return model


# 1: sizes and the initial mask


def test_sizes_and_initial_mask() -> None:
    sizes = [area * 32 * 32 for area in Natural().areas]
    assert sizes == pytest.approx([20.48, 40.96, 61.44, 81.92, 102.4, 122.88])
    for size, side in zip(sizes, (3, 5, 6, 7, 8, 8), strict=True):
        mask = squash(initial_mask(32, 32, size))
        assert mask.shape == (1, 32, 32)
        inside = mask[:, 16 : 16 + side, 16 : 16 + side]
        assert inside.flatten().tolist() == pytest.approx([0.982] * side**2, abs=5e-4)
        outside = mask[mask < 0.5]
        assert len(outside) == 32 * 32 - side**2
        assert outside.tolist() == pytest.approx([0.000335] * len(outside), abs=5e-7)


# 2: planted and constant networks


@pytest.mark.parametrize(
    ("model", "layer", "neuron", "target"),
    [(Linear(1, 0), "hidden", 0, 1), (Linear(3, 2), "hidden", 2, 3), (Convolution(2), "conv", 0, 2)],
)
def test_a_planted_trojan_is_found(model: nn.Module, layer: str, neuron: int, target: int) -> None:
    triggers = find(model)
    assert triggers.labels.tolist() == [target] * 6
    assert torch.equal(triggers.masks, triggers.masks.bool().float())
    counts, areas = reasr(model, triggers), Natural().areas
    for fact, count, mask, area in zip(triggers.facts, counts, triggers.masks, areas, strict=True):
        assert count is not None
        assert count.total == 150
        assert count.rate >= 0.95
        assert mask[0, :4, :4].any()
        assert 0 < mask.sum() <= 1.2 * area * SIDE**2
        assert fact["mask_pixels"] == int(mask.sum())
        assert (fact["area"], fact["label"], fact["sampled_label"]) == (area, target, target)
        assert (fact["layer"], fact["neuron"]) == (layer, neuron)


@pytest.mark.parametrize("label", range(CLASSES))
def test_a_constant_network_is_noted_and_not_scored(label: int) -> None:
    model = constant(label)
    triggers = find(model)
    assert [dict(fact) for fact in triggers.facts] == [
        {"area": area, "note": "the network gives nearly all images one label"} for area in Natural().areas
    ]
    assert triggers.labels.tolist() == [-1] * 6
    assert not triggers.masks.any()
    assert reasr(model, triggers) == [Count(hits=0, total=200)] * 6
    assert torch.equal(triggers.stamp(5, TEST).images, TEST.images)


# 3: networks that no patch can drive


def test_what_a_patch_cannot_reach_is_no_candidate() -> None:
    model = Linear(skips=True)
    nn.init.constant_(model.hidden.bias, -1000.0)  # no unit is ever on
    triggers = find(model)
    assert {fact["note"] for fact in triggers.facts} == {"no neuron favours one label on enough images"}
    assert reasr(model, triggers) == [Count(hits=0, total=200)] * 6


def test_neurons_that_nothing_reads_favour_no_label() -> None:
    model = Linear(gain=0.0, skips=True)
    triggers = find(model, epochs=1)
    assert {fact.get("note") for fact in triggers.facts} == {"no neuron favours one label on enough images"}


# 4: the mask's area


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.001, 1), st.integers(0, 2**32))
def test_the_binary_mask_keeps_the_largest_and_at_most_the_area(
    height: int, width: int, share: float, seed: int
) -> None:
    size = max(1.0, share * height * width)
    mask = torch.rand(1, height, width, generator=torch.Generator().manual_seed(seed))
    on = binary_mask(mask, size).bool()
    assert on.shape == mask.shape
    assert on.sum() == min(int((mask > 0.1).sum()), int(1.2 * size))
    left_out = ~on & (mask > 0.1)
    assert not left_out.any() or mask[on].min() >= mask[left_out].max()
    assert not on[mask <= 0.1].any()
    assert (binary_mask(mask, 1.5 * size).bool() | ~on).all()  # a larger area only adds


def test_area_and_success_grow_with_the_size() -> None:
    model = Linear(where=slice(0, SIDE), gain=200.0)  # the whole image counts: the smallest patches do not suffice
    triggers = find(model)
    pixels = [int(mask.sum()) for mask in triggers.masks]
    rates = [count.rate for count in reasr(model, triggers) if count]
    assert pixels == [fact["mask_pixels"] for fact in triggers.facts]
    assert all(count <= 1.2 * area * SIDE**2 for count, area in zip(pixels, Natural().areas, strict=True))
    growing = [rate < 0.99 for rate in rates].index(False) + 1  # a search that succeeds at once stops at once
    assert growing > 1
    assert pixels[:growing] == sorted(set(pixels[:growing]))
    assert sum(pixels[:3]) < sum(pixels[3:])
    assert rates == sorted(rates)
    assert rates[0] < 0.6 < rates[-1]


# 5: what is counted


def test_images_of_the_label_itself_are_not_counted() -> None:
    data = ImageSet(torch.full((5, 3, SIDE, SIDE), 7, dtype=torch.uint8), torch.tensor([0, 1, 1, 2, 3]))
    mask, pattern = torch.zeros(3, 1, SIDE, SIDE), torch.zeros(3, 3, SIDE, SIDE)
    mask[:2, :, 1, 2], pattern[:2, 1, 1, 2] = 1, 1
    triggers = FoundTriggers(mask, pattern, torch.tensor([1, 2, -1]), ({}, {}, {}))
    stamped = [triggers.stamp(index, data) for index in range(3)]
    assert [part.indices.tolist() for part in stamped] == [[0, 3, 4], [0, 1, 2, 4], [0, 1, 2, 3, 4]]
    assert [part.labels.tolist() for part in stamped] == [[1] * 3, [2] * 4, [-1] * 5]
    for part in stamped[:2]:
        assert part.images[:, :, 1, 2].tolist() == [[0, 255, 0]] * len(part)
        assert (part.images != 7).any(1).flatten(1).sum(1).tolist() == [1] * len(part)
    for label, hits in ((1, 3), (2, 4), (0, 0)):
        counts = reasr(constant(label), triggers, data)
        assert counts[:2] == [Count(hits=hits * (label == 1), total=3), Count(hits=hits * (label == 2), total=4)]
        assert counts[2] == Count(hits=0, total=5)


# 6: range and colours


def test_triggers_span_the_pixel_range_and_keep_their_colours() -> None:
    triggers = find(Linear(), areas=(0.08,))
    levels = triggers.patterns * 255
    assert torch.equal(levels, levels.round())
    assert (levels.min(), levels.max()) == (0, 255)
    part = triggers.stamp(0, TEST)
    assert part.images.dtype == torch.uint8
    on = triggers.masks[0, 0].bool() & (torch.arange(SIDE) < 4) & (torch.arange(SIDE) < 4)[:, None]
    red, green, blue = part.images[:, :, on].float().mean((0, 2))  # the planted unit looks for red
    assert red > 230
    assert max(green, blue) < 25


def test_pure_red_stays_pure_red_when_saved_and_loaded(tmp_path: Path) -> None:
    red = torch.zeros(1, 3, SIDE, SIDE)
    red[:, 0] = 1
    store = Store(tmp_path)
    saved = {"masks": torch.ones(1, 1, SIDE, SIDE), "patterns": red, "labels": torch.tensor([1])}
    store.save_artifact("search", "0" * 16, Artifact(saved, {}))
    loaded = store.load_artifact("search", "0" * 16)
    assert loaded is not None
    images = FoundTriggers(**loaded.tensors, facts=({},)).stamp(0, TEST).images
    assert images.permute(0, 2, 3, 1).reshape(-1, 3).unique(dim=0).tolist() == [[255, 0, 0]]


# how it searches


@settings(deadline=None)
@given(labels=st.lists(st.integers(0, 3), max_size=40), start=st.integers(0, 12), count=st.integers(1, 12))
def test_images_of_each_class_in_order(labels: list[int], start: int, count: int) -> None:
    images = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1)
    taken = take_of_each_class(ImageSet(images, torch.tensor(labels, dtype=torch.int64)), CLASSES, start, count)
    places = [[place for place, label in enumerate(labels) if label == wanted] for wanted in range(CLASSES)]
    expected = [place for of_class in places for place in of_class[start : start + count]]
    assert taken.images.flatten().tolist() == expected
    assert taken.labels.tolist() == [labels[place] for place in expected]


def test_the_share_is_that_of_training_images_that_were_not_searched() -> None:
    model = Linear(where=slice(0, SIDE), gain=200.0)
    triggers = find(model, areas=(0.02, 0.04))
    chooser = take_of_each_class(TRAIN, CLASSES, 24, 24)
    for fact, count in zip(triggers.facts, reasr(model, triggers, chooser), strict=True):
        assert count is not None
        assert fact["share_on_training_images"] == pytest.approx(count.rate)
        assert 0 < count.rate < 1


def test_equal_seeds_find_equal_triggers_and_the_network_stays() -> None:
    model = Linear()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = find(model, areas=(0.05,))
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    again, other = find(model, areas=(0.05,)), find(model, areas=(0.05,), seed=1)
    assert torch.equal(first.patterns, again.patterns)
    assert torch.equal(first.masks, again.masks)
    assert not torch.equal(first.patterns, other.patterns)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


# bad input


@pytest.mark.parametrize(
    "params",
    [{"areas": ()}, {"areas": (0.1, 1.01)}, {"areas": (0.0,)}, {"areas": (-0.1,)}, {"areas": (float("nan"),)},
     {"max_candidates": 0}, {"agreement": 0}, {"agreement": 1.1}, {"epochs": 0}, {"lr": 0}, {"poison_rate": 0.1}],
)  # fmt: skip
def test_parameters_are_checked(params: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Natural(**params)


def test_an_area_of_less_than_a_pixel_is_refused() -> None:
    Natural(areas=(1 / 144, 1.0)).check(INFO)
    with pytest.raises(ConfigError, match=r"area of 0\.0069 is less than one of the 144 pixels of toy"):
        Natural(areas=(0.5, 0.0069)).check(INFO)


def test_a_network_without_a_hidden_layer_is_refused() -> None:
    with pytest.raises(ConfigError, match="no hidden convolution or linear layer"):
        find(nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE**2, CLASSES)))


# on digits

BBNFILE = """
from typing import ClassVar
import torch
from backdoor_bench_none.api import Defense, DefenseResult, Stage, hookimpl

class Flat(Defense):
    stage: ClassVar[Stage] = Stage.POST_TRAINING
    starts_from_victim: ClassVar[bool] = True

    def run(self, task, context):
        model = task.victim()
        torch.nn.init.zeros_(model.classifier.weight)
        return DefenseResult(model)

@hookimpl
def bbn_defenses():
    return {"flat": Flat}
"""


def test_clean_and_natural_share_networks_and_the_search_is_kept(
    tiny_plan: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fit, search = Centralized.fit, Natural.find_triggers
    monkeypatch.setattr(Centralized, "fit", lambda *args: (done.append("fit"), fit(*args))[1])
    monkeypatch.setattr(Natural, "find_triggers", lambda *args: (done.append("search"), search(*args))[1])
    clean, natural = tiny_plan(attack="clean, natural", defense="no_defense", epochs=10).cells
    assert (victim_key(clean), defense_key(clean)) == (victim_key(natural), defense_key(natural))
    assert record_key(clean) != record_key(natural)
    store = Store(tmp_path / "results")
    records = [Stages(cell, store, CONTEXT).evaluate() for cell in (clean, natural, natural)]
    assert done == ["fit", "search"]
    plain, first, again = (record.counts for record in records)
    assert plain is not None
    assert first is not None
    assert first == again
    assert records[1].triggers == records[2].triggers
    assert first.benign_accuracy == plain.benign_accuracy
    assert plain.attack_success_rate is None
    assert records[0].triggers == []
    facts = records[1].triggers
    hits, totals = ([fact[name] for fact in facts] for name in ("hits", "total"))
    assert first.attack_success_rate == Count(hits=sum(hits), total=sum(totals))
    assert [fact["area"] for fact in facts] == list(Natural().areas)
    labels = Stages(natural, store, CONTEXT).data()[1].labels
    assert totals == [int((labels != fact.get("label", -1)).sum()) for fact in facts]


@pytest.mark.slow
def test_larger_patches_succeed_more_often_in_trained_networks(tiny_plan: Callable[..., Plan], tmp_path: Path) -> None:
    cells = tiny_plan(seeds="0, 1, 2, 3, 4", attack="natural", defense="no_defense", epochs=10).cells
    records = [Stages(cell, Store(tmp_path / "results"), CONTEXT).evaluate() for cell in cells]
    runs = [record.triggers for record in records if all("note" not in fact for fact in record.triggers)]
    assert len(runs) >= 3  # of five seeds: 5
    for facts in runs:
        pixels = [fact["mask_pixels"] for fact in facts]
        assert pixels == sorted(pixels)
        assert all(0 < count <= max(1, 1.2 * area * 64) for count, area in zip(pixels, Natural().areas, strict=True))
    hits = [[fact["hits"] for fact in facts] for facts in runs]
    assert median(sum(of_one[3:]) - sum(of_one[:3]) for of_one in hits) > 0  # 427 to 652 of about 1350
    assert median(facts[-1]["hits"] / facts[-1]["total"] for facts in runs) > 0.5  # 0.572 to 0.831, median 0.645


def test_a_defended_network_is_searched_by_itself_and_a_constant_one_scores_zero(
    tiny_plan: Callable[..., Plan], tmp_path: Path
) -> None:
    (tmp_path / "bbnfile.py").write_text(BBNFILE)
    attack = "{name: natural, params: {areas: [0.05, 0.1], epochs: 5}}"
    cells = tiny_plan(attack=attack, defense="no_defense, none, flat", epochs=5, seeds="0, 1, 2, 3, 4").cells
    assert len({search_key(cell) for cell in cells}) == 15
    records: dict[str, list[Record]] = {"no_defense": [], "none": [], "flat": []}
    for cell in cells:
        records[cell.defense.name].append(Stages(cell, Store(tmp_path / "results"), CONTEXT).evaluate())
    for defense in ("no_defense", "none"):
        searched = [all(fact["total"] < 500 and "note" not in fact for fact in record.triggers)
                    for record in records[defense]]  # fmt: skip
        assert searched.count(True) >= 3  # of five seeds: 5 with each defense
    for flat in records["flat"]:
        assert flat.counts is not None
        assert flat.counts.attack_success_rate == Count(hits=0, total=1000)
        note = "the network gives nearly all images one label"
        assert flat.triggers == [{"area": area, "note": note, "hits": 0, "total": 500} for area in (0.05, 0.1)]


@pytest.mark.parametrize(("area", "message"), [(0.01, "less than one of the 64 pixels of digits"), (1.5, "areas")])
def test_areas_are_checked_at_plan_time(area: float, message: str, tiny_plan: Callable[..., Plan]) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_plan(attack=f"{{name: natural, params: {{areas: [{area}]}}}}")
