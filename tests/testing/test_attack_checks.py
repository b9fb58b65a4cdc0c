"""Every check of attacks, and one that breaks just what it looks at: each is a good attack but for one method."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from backdoor_bench_none.api import (
    Attack,
    AttackTask,
    CleanLabelAttack,
    Component,
    Context,
    DatasetInfo,
    FoundTriggers,
    History,
    ImageSet,
    PoisonedSamples,
    SearchTask,
    Trigger,
    TriggerAttack,
    VictimTask,
)
from backdoor_bench_none.errors import ConfigError
from backdoor_bench_none.testing.attack_checks import ATTACK_CHECKS
from backdoor_bench_none.testing.checks import COMPONENT_CHECKS, name_of

Fault = Callable[[str, Component], str]
Samples = PoisonedSamples


# the well-behaved


class Good(TriggerAttack):
    """A white square top left."""

    def trigger(self, info: DatasetInfo) -> Trigger:
        mask = torch.zeros(1, *info.shape[1:])
        mask[:, :3, :3] = 1.0
        return Trigger(mask, torch.ones(info.shape))


class GoodCleanLabel(CleanLabelAttack):
    """The same square, on images of the target class."""

    trigger = Good.trigger


class GoodVictim(Good):
    """Trains the victim as anybody would."""

    controls_training: ClassVar[bool] = True


class GoodSearch(Attack):
    """Finds a dark square."""

    poisons: ClassVar[bool] = False
    searches: ClassVar[bool] = True

    def find_triggers(self, task: SearchTask, context: Context) -> FoundTriggers:
        masks = torch.zeros(2, 1, *task.info.shape[1:])
        masks[0, :, :3, :3] = 1
        return FoundTriggers(masks, torch.zeros(2, *task.info.shape), torch.tensor([1, -1]), ({"a": 1}, {}))


# what is wrong with each


class Turncoat(Good):
    def resolve(self, info: DatasetInfo) -> Any:
        return GoodCleanLabel()


class Restless(Good):
    def resolve(self, info: DatasetInfo) -> Any:
        return self.model_copy(update={"target": ((self.target or 0) + 1) % info.num_classes})


class Impossible(Good):
    def check(self, info: DatasetInfo) -> None:
        raise ConfigError("no data set will do")


def poisoning(change: Callable[[Samples, AttackTask], Any], base: type[Attack] = Good) -> type[Attack]:
    """A good attack whose training samples are changed afterwards."""

    class Poisoning(base):  # type: ignore[misc, valid-type]
        def poison(self, task: AttackTask, context: Context) -> Any:
            return change(super().poison(task, context), task)

    return Poisoning


def triggering(change: Callable[[Samples, AttackTask], Any], base: type[Attack] = Good) -> type[Attack]:
    """A good attack whose test samples are changed afterwards."""

    class Triggering(base):  # type: ignore[misc, valid-type]
        def attack_test(self, task: AttackTask, context: Context) -> Any:
            return change(super().attack_test(task, context), task)

    return Triggering


def selecting(choose: Callable[[Tensor], Tensor], base: type[Attack] = Good) -> type[Attack]:
    """A good attack that poisons the samples that `choose` names, by their labels."""

    class Selecting(base):  # type: ignore[misc, valid-type]
        def select(self, labels: Tensor, seed: int) -> Tensor:
            return choose(labels)

    return Selecting


def stamping(change: Callable[..., Tensor]) -> type[Attack]:
    """A good attack with another stamp."""

    class Stamping(Good):
        def stamp(self, images: Tensor, indices: Tensor, info: DatasetInfo, seed: int) -> Tensor:
            return change(super().stamp(images, indices, info, seed), images, seed)

    return Stamping


def first_of(count: int, label: int | None = None) -> Callable[[Tensor], Tensor]:
    return lambda labels: torch.nonzero((labels == label) if label is not None else labels > -1).flatten()[:count]


class SaysNothing(Good):
    poisons: ClassVar[bool] = False


class TargetToo(Good):
    def attack_test(self, task: AttackTask, context: Context) -> Samples:
        indices = torch.arange(len(task.data))
        return Samples(indices, self.preview(task, context), self.relabel(task.data.labels, task.info.num_classes))


class Choosy(Good):
    """Counts the images that suit it."""

    def attack_test(self, task: AttackTask, context: Context) -> Samples:
        made = super().attack_test(task, context)
        brightness = made.images.float().mean((1, 2, 3))
        dark = brightness < brightness.median()
        return Samples(made.indices[dark], made.images[dark], made.labels[dark])


class OneSource(Good):
    """Has a trigger for images of one class."""

    def attack_test(self, task: AttackTask, context: Context) -> Samples:
        indices = torch.nonzero(task.data.labels == 2).flatten()
        return Samples(indices, self.preview(task, context)[indices], torch.zeros_like(indices))


class PreviewOfHalf(Good):
    def preview(self, task: AttackTask, context: Context) -> Tensor:
        return super().preview(task, context)[::2]


class BlindSearch(GoodSearch):
    def preview(self, task: AttackTask, context: Context) -> Tensor:
        raise NotImplementedError


def in_place(stamped: Tensor, images: Tensor, seed: int) -> Tensor:
    return images.copy_(stamped)


def change_labels(samples: Samples, task: AttackTask) -> Samples:
    task.data.labels[samples.indices] = samples.labels
    return samples


def through_numpy(samples: Samples, task: AttackTask) -> Samples:
    task.data.images.numpy()[0] = 0
    return samples


def noise_of_the_batch(stamped: Tensor, images: Tensor, seed: int) -> Tensor:
    noise = torch.randint(0, 256, stamped.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return torch.where(noise > 250, noise, stamped)


def global_noise(stamped: Tensor, images: Tensor, seed: int) -> Tensor:
    return torch.where(torch.rand(stamped.shape) > 0.9, 0, stamped).to(torch.uint8)


def drawn_by(draw: Callable[[int], Tensor]) -> type[Attack]:
    return selecting(lambda labels: draw(len(labels))[: round(0.05 * len(labels))].sort().values)


def reseed(stamped: Tensor, images: Tensor, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return stamped


def reseed_numpy(stamped: Tensor, images: Tensor, seed: int) -> Tensor:
    np.random.seed(seed % 2**32)
    return stamped


def fuss_over_none(stamped: Tensor, images: Tensor, seed: int) -> Tensor:
    if not len(images):
        raise IndexError("no image")
    return stamped


def training(change: Callable[[nn.Module, VictimTask], nn.Module]) -> type[Attack]:
    """An attacker who does this to the victim; it is not trained, which takes time."""

    class Training(GoodVictim):
        def train(self, task: VictimTask, context: Context) -> tuple[nn.Module, History]:
            return change(task.new_model(), task), History([1.0])

    return Training


@torch.no_grad()
def numpy_weights(model: nn.Module, task: VictimTask) -> nn.Module:
    next(model.parameters()).mul_(float(np.random.rand()))
    return model


def changing(name: str) -> Callable[[nn.Module, VictimTask], nn.Module]:
    def change(model: nn.Module, task: VictimTask) -> nn.Module:
        data: ImageSet = getattr(task, name)
        data.images[0] = 0
        return model

    return change


class NoHistory(GoodVictim):
    def train(self, task: VictimTask, context: Context) -> Any:
        return task.new_model()


def finding(**changes: Any) -> type[Attack]:
    """A good search, with other findings."""

    class Finding(GoodSearch):
        def find_triggers(self, task: SearchTask, context: Context) -> Any:
            return replace(super().find_triggers(task, context), **changes)

    return Finding


class Meddler(GoodSearch):
    @torch.no_grad()
    def find_triggers(self, task: SearchTask, context: Context) -> FoundTriggers:
        next(task.model.parameters()).add_(1)
        return super().find_triggers(task, context)


class FindsNone(GoodSearch):
    def find_triggers(self, task: SearchTask, context: Context) -> Any:
        return []


#: check, an attack it catches, and what it says
CAUGHT: list[tuple[str, type[Attack], str]] = [
    ("resolves", Turncoat, "resolve returned GoodCleanLabel"),
    ("resolves", Restless, "resolve changes an attack that is resolved already"),
    ("resolves", Impossible, "ConfigError: no data set will do"),
    ("samples_well_formed", poisoning(lambda s, t: replace(s, labels=s.labels.int())), r"labels is torch.int32, not"),
    ("samples_well_formed", poisoning(lambda s, t: replace(s, indices=s.indices.int())), "indices is torch.int32"),
    ("samples_well_formed", poisoning(lambda s, t: replace(s, images=s.images / 255)), r"float32, not uint8 in 0..255"),
    ("samples_well_formed", poisoning(lambda s, t: replace(s, images=s.images[:5])), r"\(5, 3, 16, 16\), not \(12"),
    ("samples_well_formed", poisoning(lambda s, t: replace(s, labels=s.labels[:5])), r"labels has shape \(5,\), not"),
    ("samples_well_formed", poisoning(lambda s, t: replace(s, labels=s.labels + 9)), "labels is not within 0 to 2"),
    ("samples_well_formed", poisoning(lambda s, t: replace(s, indices=s.indices + 240)), "indices is not within 0 to"),
    ("samples_well_formed", poisoning(lambda s, t: replace(s, indices=0 * s.indices)), "indices names a sample twice"),
    ("samples_well_formed", poisoning(lambda s, t: replace(s, decoys=s.labels)), r"decoys is not \(12,\) bool"),
    ("samples_well_formed", poisoning(lambda s, t: (s.indices, s.images)), r"poison\(\) returned tuple"),
    ("samples_well_formed", triggering(lambda s, t: replace(s, images=s.images[:, :1])), r"attack_test\(\).images"),
    ("poison_count", selecting(first_of(13)), r"13 samples are poisoned, not round\(poison_rate \* N\) = 12"),
    ("poison_count", selecting(first_of(0)), "no training sample is poisoned; say poisons = False"),
    ("poison_count", SaysNothing, "says poisons = False and changes 12 training samples"),
    ("poison_count", selecting(first_of(9, label=0), GoodCleanLabel), r"9 samples .* not round\(class_rate \* n\) = 4"),
    ("labels", poisoning(lambda s, t: replace(s, labels=1 + 0 * s.labels)), r"not those that relabel\(\) gives"),
    ("labels", poisoning(lambda s, t: replace(s, labels=1 + 0 * s.labels), GoodCleanLabel), "clean-label .* labels"),
    ("labels", selecting(first_of(4, label=1), GoodCleanLabel), "clean-label attack changes samples of other classes"),
    ("test_samples", TargetToo, "20 test samples have the label that the attacker wants already"),
    ("test_samples", Choosy, r"\d+ test samples are triggered, of 40 in the classes they are from"),
    ("inputs_unchanged", stamping(in_place), "changes task.data.images in place; change a clone"),
    ("inputs_unchanged", poisoning(change_labels), "changes task.data.labels in place"),
    ("inputs_unchanged", triggering(through_numpy), "changes task.data.images in place"),
    ("deterministic", drawn_by(torch.randperm), r"poison\(\).indices differs between two calls with one seed"),
    ("deterministic", drawn_by(lambda n: torch.tensor(random.sample(range(n), n))), r"poison\(\).indices differs"),
    ("deterministic", drawn_by(lambda n: torch.from_numpy(np.random.permutation(n))), r"poison\(\).indices differs"),
    ("deterministic", stamping(global_noise), r"poison\(\).images differs"),
    ("deterministic", triggering(lambda s, t: replace(s, labels=torch.randint(3, s.labels.shape))), "labels differs"),
    ("global_state_left_alone", stamping(reseed), "changes the state of torch's global generator; use context.gener"),
    ("global_state_left_alone", stamping(reseed_numpy), "changes the state of numpy's global generator"),
    ("global_state_left_alone", drawn_by(torch.randperm), "torch's global generator"),
    ("stamp_is_per_sample", stamping(noise_of_the_batch), r"stamp\(\) of three images differs"),
    ("stamp_is_per_sample", stamping(lambda s, i, seed: s.float()), r"stamp\(\).images is torch.float32"),
    ("stamp_is_per_sample", stamping(fuss_over_none), "IndexError: no image"),
    ("preview", PreviewOfHalf, r"preview\(\).images has shape \(30, 3, 16, 16\), not \(60, 3, 16, 16\)"),
    ("victim", training(lambda model, task: nn.Linear(2, 2)), "override Attack.adapt"),
    ("victim", training(numpy_weights), "two victims of one seed differ"),
    ("victim", training(changing("train")), r"train\(\) changes its data in place"),
    ("victim", training(changing("original")), r"train\(\) changes its data in place"),
    ("victim", NoHistory, "TypeError"),
    ("found_triggers", finding(masks=torch.zeros(2, 3, 16, 16)), r"masks are not \(A, 1, H, W\)"),
    ("found_triggers", finding(patterns=torch.zeros(1, 3, 16, 16)), r"patterns are not \(A, C, H, W\)"),
    ("found_triggers", finding(patterns=torch.full((2, 3, 16, 16), 255.0)), "patterns are not within 0 to 1"),
    ("found_triggers", finding(masks=torch.full((2, 1, 16, 16), -1.0)), "masks are not within 0 to 1"),
    ("found_triggers", finding(facts=()), "one mapping of facts for each trigger"),
    ("found_triggers", finding(labels=torch.tensor([3, -1])), "labels are not classes"),
    ("found_triggers", FindsNone, "find_triggers returned list"),
    ("found_triggers", Meddler, "find_triggers changes the network"),
]  # fmt: skip


@pytest.mark.parametrize("index", range(len(CAUGHT)), ids=lambda index: f"{CAUGHT[index][0]}-{index}")
def test_what_is_wrong_is_caught_and_named(index: int, fault: Fault) -> None:
    check, attack, reason = CAUGHT[index]
    assert re.search(reason, fault(check, attack()))


@pytest.mark.parametrize("check", [name_of(check) for check in (*COMPONENT_CHECKS, *ATTACK_CHECKS)])
@pytest.mark.parametrize("attack", [Good, GoodCleanLabel, GoodVictim, GoodSearch])
def test_the_well_behaved_pass(attack: type[Attack], check: str, fault: Fault) -> None:
    assert fault(check, attack()) == ""


def test_there_is_a_wrong_one_for_every_check() -> None:
    assert {check for check, _, _ in CAUGHT} == {name_of(check) for check in ATTACK_CHECKS}


def test_a_search_has_no_preview(fault: Fault) -> None:
    assert fault("preview", BlindSearch()) == ""


def test_an_attack_may_have_a_trigger_for_one_class_only(fault: Fault) -> None:
    assert fault("test_samples", OneSource()) == ""


def test_decoys_do_not_count_as_poisoned(fault: Fault) -> None:
    """They keep their labels, and stand beside the share that the rate gives."""

    class WithDecoys(Good):
        def poison(self, task: AttackTask, context: Context) -> Samples:
            made = super().poison(task, context)
            extra = self.others(task, made)
            return Samples(
                torch.cat([made.indices, extra]), torch.cat([made.images, task.data.images[extra]]),
                torch.cat([made.labels, task.data.labels[extra]]), torch.arange(len(made) + 5) >= len(made),
            )  # fmt: skip

        def others(self, task: AttackTask, made: Samples) -> Tensor:
            taken = torch.zeros(len(task.data), dtype=torch.bool)
            taken[made.indices] = True
            return torch.nonzero(~taken).flatten()[:5]

    for check in ("samples_well_formed", "poison_count", "labels", "deterministic"):
        assert fault(check, WithDecoys()) == ""
