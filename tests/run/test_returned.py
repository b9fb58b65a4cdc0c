"""What components return is what is measured: networks that are rebuilt, data sets and samples as promised."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from backdoor_bench_none.api import (
    Architecture,
    AttackTask,
    Context,
    Defense,
    DefenseResult,
    DefenseTask,
    History,
    ImageSet,
    ModelSpec,
    PoisonedSamples,
    Stage,
    VictimTask,
)
from backdoor_bench_none.contracts.network import Pixels, unwrap
from backdoor_bench_none.run.checks import check_rebuilt, check_samples
from backdoor_bench_none.testing.bench import Bench, Patch, Stripes
from backdoor_bench_none.testing.checks import run_check
from backdoor_bench_none.testing.defense_checks import check_changes_network, check_result_well_formed


class Plain(Architecture):
    """Two layers with an activation between them."""

    def build(self, spec: ModelSpec) -> nn.Module:
        return nn.Sequential(
            nn.Flatten(), nn.Linear(spec.channels * spec.image_size**2, 16), nn.ReLU(), nn.Linear(16, 3)
        )


class Hidden(Plain):
    """Keeps what it learns outside of its state dictionary."""

    def build(self, spec: ModelSpec) -> nn.Module:
        model = super().build(spec)
        model.register_forward_hook(count_calls)
        return model


def count_calls(module: nn.Module, given: Any, made: Tensor) -> Tensor:
    """Adds to the logits what grows with every call."""
    calls = getattr(module, "calls", 0) + 1
    object.__setattr__(module, "calls", calls)
    return made + calls * torch.arange(3.0)


def silence(model: nn.Module) -> None:
    model[1].register_forward_hook(lambda module, given, made: torch.zeros_like(made))  # type: ignore[index]


def clip(model: nn.Module) -> None:
    model[2] = nn.Hardtanh(0.0, 1e-3)  # type: ignore[index]


def negate(model: nn.Module) -> None:
    plain = model.forward
    model.forward = lambda images: -plain(images)  # type: ignore[method-assign]


def only_bright(model: nn.Module) -> None:
    """Changes what images with the trigger get: its white patch, and nothing else."""
    plain = model.forward
    model.forward = (
        lambda images: torch.where(  # type: ignore[method-assign]
            (images[:, :, -4:, -4:].amin((1, 2, 3)) > 2)[:, None], -plain(images), plain(images)
        )
    )


class Repair(Defense):
    """Returns the victim as `change` leaves it."""

    stage: ClassVar[Stage] = Stage.POST_TRAINING
    starts_from_victim: ClassVar[bool] = True
    change: ClassVar[Callable[[nn.Module], Any]]

    def run(self, task: DefenseTask, context: Context) -> DefenseResult:
        model = task.victim()
        return DefenseResult(type(self).change(model) or model)


def repair(change: Callable[[nn.Module], Any]) -> Repair:
    """A defense that changes the victim so."""
    kind: type[Repair] = type("Repairing", (Repair,), {"__module__": __name__, "change": staticmethod(change)})
    return kind()


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench()


CHANGES = (silence, clip, negate, only_bright)


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_state_dictionary_does_not_hold_fails_the_cell(change: Callable[..., Any], bench: Bench) -> None:
    stages = bench.stages(defense=repair(change), architecture=Plain())
    with pytest.raises(TypeError, match=r"computes something else .* of 164 predictions differ; hooks") as fault:
        stages.evaluate()
    assert "Defense.adapt" in str(fault.value)


@pytest.mark.parametrize("change", [negate, only_bright])
def test_bbn_check_finds_it(change: Callable[..., Any], bench: Bench) -> None:
    assert "computes something else" in run_check(check_result_well_formed, repair(change), bench).reason


def twice(model: nn.Module) -> nn.Module:
    return nn.DataParallel(nn.DataParallel(model))


@pytest.mark.parametrize("wrap", [nn.DataParallel, twice, torch.compile])
def test_wrappers_are_taken_off(wrap: Callable[..., Any], bench: Bench) -> None:
    wrapped = bench.stages(defense=repair(wrap), architecture=Plain()).evaluate()
    plain = bench.stages(defense=repair(lambda model: None), architecture=Plain()).evaluate()
    assert wrapped.counts == plain.counts
    model = nn.Linear(2, 2)
    assert unwrap(wrap(model)) is model


def test_a_network_in_training_mode_is_compared_in_eval_mode(bench: Bench) -> None:
    assert bench.stages(defense=repair(nn.Module.train)).evaluate().counts is not None


def test_logits_that_are_no_numbers_fail_the_cell(bench: Bench) -> None:
    def ruin(model: nn.Module) -> None:
        next(model.parameters()).data.fill_(float("nan"))

    with pytest.raises(ValueError, match="the network's logits are not all finite"):
        bench.stages(defense=repair(ruin), architecture=Plain()).evaluate()


def test_an_architecture_with_state_of_its_own_fails_the_cell(bench: Bench) -> None:
    with pytest.raises(TypeError, match=r"computes something else .*Architecture.build"):
        bench.stages(architecture=Hidden()).evaluate()


def test_a_victim_with_a_hook_fails_the_cell(bench: Bench) -> None:
    class Hooking(Patch):
        controls_training: ClassVar[bool] = True

        def train(self, task: VictimTask, context: Context) -> tuple[nn.Module, History]:
            model, history = super().train(task, context)
            silence(model)
            return model, history

    with pytest.raises(TypeError, match=r"computes something else .*Attack.adapt"):
        bench.stages(attack=Hooking(), architecture=Plain()).evaluate()


def test_a_network_that_is_the_victim_is_marked(bench: Bench) -> None:
    same = repair(lambda model: None)
    assert bench.stages(defense=same, architecture=Plain()).evaluate().unchanged
    assert bench.stages(defense=repair(unwrapped_copy), architecture=Plain()).evaluate().unchanged
    assert "set `may_return_victim`" in run_check(check_changes_network, same, bench).reason


def unwrapped_copy(model: nn.Module) -> nn.Module:
    return deepcopy(model)


def nudge(model: nn.Module) -> None:
    next(model.parameters()).data[0].mul_(1.001)


def test_one_changed_weight_is_a_change(bench: Bench) -> None:
    assert not bench.stages(defense=repair(nudge), architecture=Plain()).evaluate().unchanged
    assert run_check(check_changes_network, repair(nudge), bench).reason == ""


def test_a_detector_may_return_the_victim(bench: Bench) -> None:
    class Detector(Repair):
        returns: ClassVar[tuple[Any, ...]] = ("infected",)

        def run(self, task: DefenseTask, context: Context) -> DefenseResult:
            return DefenseResult(task.victim(), infected=True)

    assert run_check(check_changes_network, Detector(), bench).reason == ""
    assert bench.stages(defense=Detector()).evaluate().unchanged


def other_outputs(model: nn.Module) -> nn.Module:
    return nn.Sequential(model, nn.Linear(3, 5))


def nowhere(model: nn.Module) -> nn.Module:
    return model.to("meta")


@pytest.mark.parametrize("change", [other_outputs, nowhere])
def test_another_kind_of_network_fails_the_cell(change: Callable[..., Any], bench: Bench) -> None:
    with pytest.raises((TypeError, ValueError, NotImplementedError)):
        bench.stages(defense=repair(change), architecture=Plain()).evaluate()


@pytest.mark.parametrize("change", [nn.Module.half, nn.Module.double, nn.Module.bfloat16])
def test_a_network_in_another_precision_fails_the_cell(change: Callable[..., Any], bench: Bench) -> None:
    with pytest.raises(TypeError, match=r"1.weight is torch.\w+; return the network in float32"):
        bench.stages(defense=repair(change), architecture=Plain()).evaluate()


def test_rounding_is_no_difference(bench: Bench) -> None:
    """Half of the tolerance is accepted, twice as much is not."""
    stages = bench.stages(architecture=Plain())
    model = stages.builder(0).eval()
    images, pixels = stages.data()[0].images, Pixels.of(stages.cell.info, bench.device)
    logits = model(pixels.normalize(images)).detach()
    spread = float(logits.max() - logits.min())
    for share, fits in ((0.005, True), (0.02, False)):
        other = stages.builder(0).eval()
        other.register_forward_hook(lambda module, given, made, by=share * spread: made + by)
        if fits:
            check_rebuilt(other, stages.builder(0), images, pixels, bench.context, "X")
        else:
            with pytest.raises(TypeError, match="0% of 240 predictions differ"):
                check_rebuilt(other, stages.builder(0), images, pixels, bench.context, "X")


# data sets


def floats(data: ImageSet) -> ImageSet:
    return ImageSet(data.images.float() / 255, data.labels)


def fewer(data: ImageSet) -> ImageSet:
    return data.take(torch.arange(len(data) // 2))


def smaller(data: ImageSet) -> ImageSet:
    return ImageSet(data.images[:, :, ::2, ::2], data.labels)


def twelve_bits(data: ImageSet) -> ImageSet:
    return ImageSet(data.images.short() * 16, data.labels)


def from_one(data: ImageSet) -> ImageSet:
    return ImageSet(data.images, data.labels + 1)


def one_hot(data: ImageSet) -> ImageSet:
    return ImageSet(data.images, nn.functional.one_hot(data.labels))


def unlabelled(data: ImageSet) -> ImageSet:
    return ImageSet(data.images, data.labels[:-1])


def nothing(data: ImageSet) -> ImageSet:
    return data.take(torch.arange(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (floats, "images is torch.float32, not uint8"),
        (fewer, "120 training images, info says 240"),
        (smaller, r"shape \(240, 3, 8, 8\), not \(240, 3, 16, 16\)"),
        (twelve_bits, "images is torch.int16"),
        (from_one, "training.labels is not within 0 to 2"),
        (one_hot, r"training.labels has shape \(240, 3\), not \(240,\)"),
        (unlabelled, "there are 239 training images, info says 240"),
        (nothing, "there are 0 training images"),
    ],
)
def test_a_data_set_that_is_not_what_it_says_fails_the_cell(
    change: Callable[[ImageSet], ImageSet], message: str, bench: Bench
) -> None:
    class Changed(Stripes):
        def load(self) -> tuple[ImageSet, ImageSet]:
            train, test = super().load()
            return change(train), test

        def fingerprint(self) -> str:
            return change.__name__

    with pytest.raises((TypeError, ValueError), match=message):
        bench.stages(dataset=Changed(), architecture=Plain()).data()


# samples


def samples_of(**changed: Any) -> PoisonedSamples:
    """Two samples of the bench's data, changed so."""
    images = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    return replace(PoisonedSamples(torch.tensor([0, 5]), images, torch.tensor([0, 1])), **changed)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (samples_of(labels=torch.tensor([0, 3])), r"test\(\).labels is not within 0 to 2"),
        (samples_of(labels=torch.tensor([0, -1])), "labels is not within"),
        (samples_of(labels=torch.tensor([0.0, 1.0])), "labels is torch.float32, not int64"),
        (samples_of(labels=torch.tensor([0])), r"labels has shape \(1,\)"),
        (samples_of(indices=torch.tensor([0, 60])), "indices is not within 0 to 59"),
        (samples_of(indices=torch.tensor([5, 5])), "names a sample twice"),
        (samples_of(images=torch.zeros(2, 3, 16, 16)), "images is torch.float32"),
        (samples_of(images=torch.zeros(2, 1, 16, 16, dtype=torch.uint8)), "images has shape"),
        (samples_of(decoys=torch.tensor([1, 0])), "decoys is not"),
        (torch.zeros(2), "returned Tensor, not PoisonedSamples"),
    ],
)
def test_samples_that_cannot_be_are_refused(samples: Any, message: str, bench: Bench) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        check_samples(samples, 60, bench.cell().info, "test()")


def test_a_label_beyond_the_classes_fails_the_cell(bench: Bench) -> None:
    """It would count as an attack that never succeeds: a perfect defense."""

    class Beyond(Patch):
        def attack_test(self, task: AttackTask, context: Context) -> PoisonedSamples:
            made = super().attack_test(task, context)
            return replace(made, labels=made.labels + task.info.num_classes)

    with pytest.raises(ValueError, match=r"attack_test\(\).labels is not within 0 to 2"):
        bench.stages(attack=Beyond(), architecture=Plain()).poison()
