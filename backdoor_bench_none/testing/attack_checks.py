"""The checks of attacks."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from backdoor_bench_none.contracts.attack import (
    Attack,
    AttackTask,
    CleanLabelAttack,
    FoundTriggers,
    PoisonedSamples,
    SearchTask,
    StampAttack,
    TriggerAttack,
)
from backdoor_bench_none.contracts.context import Context
from backdoor_bench_none.contracts.network import Pixels, predict_logits, unwrap
from backdoor_bench_none.run.checks import check_images, check_rebuilt, check_samples
from backdoor_bench_none.run.stages import Stages
from backdoor_bench_none.testing.bench import Bench, weights_of
from backdoor_bench_none.testing.checks import (
    Check,
    disturbed,
    equal,
    left_alone,
    need_repeatable,
    require,
    same_weights,
)


def _stages(attack: Attack, bench: Bench) -> Stages:
    return cast("Stages", bench.keep("stages", attack, lambda: bench.stages(attack=attack)))


def _resolved(attack: Attack, bench: Bench) -> Attack:
    return _stages(attack, bench).cell.attack.component


#: the arguments of `poison`, and those of `attack_test`
Arguments = tuple[tuple[AttackTask, Context], tuple[AttackTask, Context]]


def _arguments(attack: Attack, bench: Bench) -> Arguments:
    return cast("Arguments", bench.keep("arguments", attack, _stages(attack, bench).attack_tasks))


def _tasks(attack: Attack, bench: Bench) -> tuple[AttackTask, AttackTask]:
    (train, _), (test, _) = _arguments(attack, bench)
    return train, test


def _run(attack: Attack, arguments: Arguments) -> tuple[PoisonedSamples, PoisonedSamples]:
    train, test = arguments
    return attack.poison(*train), attack.attack_test(*test)


def _samples(attack: Attack, bench: Bench) -> tuple[PoisonedSamples, PoisonedSamples]:
    """The training and the test samples, made once."""

    def make() -> tuple[PoisonedSamples, PoisonedSamples]:
        return _run(_resolved(attack, bench), _arguments(attack, bench))

    return cast("tuple[PoisonedSamples, PoisonedSamples]", bench.keep("samples", attack, make))


def check_resolves(attack: Attack, bench: Bench) -> None:
    """`resolve` fills in the defaults that depend on the data set, once, and the result can be run."""
    info = bench.cell().info
    resolved = attack.resolve(info)
    require(type(resolved) is type(attack), f"resolve returned {type(resolved).__name__}")
    require(resolved.resolve(info) == resolved, "resolve changes an attack that is resolved already")
    resolved.check(info)


def check_samples_well_formed(attack: Attack, bench: Bench) -> None:
    """Indices, images and labels of the samples have the right types, shapes, ranges and device."""
    for name, samples, task in zip(
        ("poison()", "attack_test()"), _samples(attack, bench), _tasks(attack, bench), strict=True
    ):
        check_samples(samples, len(task.data), task.info, name)


def check_poison_count(attack: Attack, bench: Bench) -> None:
    """The number of poisoned samples is that of the rate."""
    samples = _samples(attack, bench)[0]
    count = len(samples)
    if samples.decoys is not None:
        count = int((~samples.decoys).sum())
    if not attack.poisons:
        require(len(samples) == 0, f"it says poisons = False and changes {len(samples)} training samples")
        return
    require(count > 0, "no training sample is poisoned; say poisons = False, or raise the rate")
    wanted, rule = _wanted_count(_resolved(attack, bench), _tasks(attack, bench)[0].data.labels)
    require(wanted is None or count == wanted, f"{count} samples are poisoned, not {rule} = {wanted}")


def _wanted_count(attack: Attack, labels: Tensor) -> tuple[int | None, str]:
    """The number of poisoned samples and its rule, where the attack inherits `poison`; else None."""
    if isinstance(attack, TriggerAttack) and type(attack).poison is TriggerAttack.poison:
        return round(attack.poison_rate * len(labels)), "round(poison_rate * N)"
    if isinstance(attack, CleanLabelAttack) and type(attack).poison is CleanLabelAttack.poison:
        return round(attack.class_rate * int(torch.eq(labels, attack.target_label).sum())), "round(class_rate * n)"
    return None, ""


def check_labels(attack: Attack, bench: Bench) -> None:
    """Poisoned samples have the label the attacker wants; those of a clean-label attack had it before."""
    (task, _), (samples, _), resolved = _tasks(attack, bench), _samples(attack, bench), _resolved(attack, bench)
    before = task.data.labels[samples.indices]
    poisoned = torch.ones(len(samples), dtype=torch.bool)
    if samples.decoys is not None:
        poisoned = ~samples.decoys
    if isinstance(resolved, CleanLabelAttack):
        require(torch.equal(samples.labels, before), "a clean-label attack changes labels")
        require(set(before.tolist()) <= {resolved.target}, "a clean-label attack changes samples of other classes")
    elif isinstance(resolved, StampAttack):
        wanted = resolved.relabel(before, task.info.num_classes)
        require(torch.equal(samples.labels[poisoned], wanted[poisoned]), "labels are not those that relabel() gives")


def check_test_samples(attack: Attack, bench: Bench) -> None:
    """The triggered test samples are all those whose label the attack would change, and no others."""
    (_, task), (_, samples) = _tasks(attack, bench), _samples(attack, bench)
    before = task.data.labels[samples.indices]
    same = torch.eq(samples.labels, before).sum().item()
    require(same == 0, f"{same} test samples have the label that the attacker wants already: they would count as hits")
    whole = int(torch.isin(task.data.labels, before).sum())
    require(
        len(samples) == whole,
        f"{len(samples)} test samples are triggered, of {whole} in the classes they are from: take all of a class",
    )


def check_inputs_unchanged(attack: Attack, bench: Bench) -> None:
    """The data of its tasks are not changed."""
    resolved, stages = _resolved(attack, bench), bench.stages(attack=attack)
    arguments = stages.attack_tasks()
    tasks = [task for task, _ in arguments]
    before = [(task.data.images.clone(), task.data.labels.clone()) for task in tasks]
    _run(resolved, arguments)
    if not attack.searches:
        resolved.preview(*arguments[1])
    for task, (images, labels) in zip(tasks, before, strict=True):
        require(torch.equal(task.data.images, images), "it changes task.data.images in place; change a clone")
        require(torch.equal(task.data.labels, labels), "it changes task.data.labels in place; change a clone")


def check_deterministic(attack: Attack, bench: Bench) -> None:
    """Equal seeds give equal samples, in any state of the global generators."""
    resolved, arguments = _resolved(attack, bench), _arguments(attack, bench)
    if arguments[0][0].network is not None:
        need_repeatable(bench)
    with disturbed(1):
        first = _run(resolved, arguments)
    with disturbed(2):
        second = _run(resolved, arguments)
    for name, one, other in zip(("poison()", "attack_test()"), first, second, strict=True):
        for part in ("indices", "images", "labels", "decoys"):
            require(
                equal(getattr(one, part), getattr(other, part)),
                f"{name}.{part} differs between two calls with one seed; draw from context.seed only",
            )


def check_global_state_left_alone(attack: Attack, bench: Bench) -> None:
    """Generators, gradient mode and settings are not changed."""
    resolved, arguments = _resolved(attack, bench), _arguments(attack, bench)
    with left_alone():
        _run(resolved, arguments)


def check_stamp_is_per_sample(attack: Attack, bench: Bench) -> None:
    """A sample's trigger is a function of the seed and its index, not of the samples stamped with it."""
    resolved, (_, task) = _resolved(attack, bench), _tasks(attack, bench)
    if not isinstance(resolved, StampAttack):
        return
    images, indices = task.data.images, torch.arange(len(task.data))
    whole = resolved.stamp(images, indices, task.info, 5)
    check_images(whole, tuple(images.shape), "stamp()")
    some = torch.tensor([7, 3, 50])
    alone = resolved.stamp(images[some], indices[some], task.info, 5)
    require(torch.equal(alone, whole[some]), "stamp() of three images differs from stamp() of them among all others")
    nothing = resolved.stamp(images[:0], indices[:0], task.info, 5)
    check_images(nothing, (0, *task.info.shape), "stamp() of no image")


def check_preview(attack: Attack, bench: Bench) -> None:
    """A preview shows every image, in order."""
    if not attack.searches:
        task, context = _arguments(attack, bench)[1]
        check_images(_resolved(attack, bench).preview(task, context), tuple(task.data.images.shape), "preview()")


def check_victim(attack: Attack, bench: Bench) -> None:
    """An attacker who controls training returns a network that core can rebuild, and equal ones for equal seeds."""
    if not attack.controls_training:
        return
    stages, resolved = _stages(attack, bench), _resolved(attack, bench)
    weights = []
    for _ in range(2):
        task = stages.victim_task()
        before = task.train.images.clone(), task.original.images.clone()
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(0)
            model, history = resolved.train(task, bench.context)
        require(isinstance(history.losses, list), "train() returns (model, History)")
        unchanged = torch.equal(task.train.images, before[0]) and torch.equal(task.original.images, before[1])
        require(unchanged, "train() changes its data in place; change a clone")
        shell, pixels = resolved.adapt(task.new_model(), task.info), Pixels.of(task.info, bench.device)
        check_rebuilt(unwrap(model), shell, task.train.images, pixels, bench.context, "Attack.adapt")
        weights.append(weights_of(model))
    if bench.device.type == "cpu":  # elsewhere two trainings differ by rounding
        require(same_weights(*weights), "two victims of one seed differ; draw from context.generator")


def check_found_triggers(attack: Attack, bench: Bench) -> None:
    """An attack that searches networks returns triggers of Eq. 1, with the labels they cause."""
    if not attack.searches:
        return
    stages, resolved = _stages(attack, bench), _resolved(attack, bench)
    model = stages.network()
    before = weights_of(model)
    task = SearchTask(model, stages.data()[0].to(bench.device), stages.cell.info)
    triggers = resolved.find_triggers(task, bench.context)
    require(isinstance(triggers, FoundTriggers), f"find_triggers returned {type(triggers).__name__}")
    count, (channels, height, width) = len(triggers.labels), task.info.shape
    require(tuple(triggers.masks.shape) == (count, 1, height, width), "masks are not (A, 1, H, W)")
    require(tuple(triggers.patterns.shape) == (count, channels, height, width), "patterns are not (A, C, H, W)")
    require(len(triggers.facts) == count, "there is not one mapping of facts for each trigger")
    for name, values in (("masks", triggers.masks), ("patterns", triggers.patterns)):
        require(bool(((values >= 0) & (values <= 1)).all()), f"{name} are not within 0 to 1")
    require(bool(((triggers.labels >= -1) & (triggers.labels < task.info.num_classes)).all()), "labels are not classes")
    require(same_weights(weights_of(model), before), "find_triggers changes the network")
    logits = predict_logits(model, task.train.images[:2], Pixels.of(task.info, bench.device), bench.context)
    require(bool(torch.isfinite(logits).all()), "the network no longer works after the search")


ATTACK_CHECKS: tuple[Check, ...] = (
    check_resolves, check_samples_well_formed, check_poison_count, check_labels, check_test_samples,
    check_inputs_unchanged, check_deterministic, check_global_state_left_alone, check_stamp_is_per_sample,
    check_preview, check_victim, check_found_triggers,
)  # fmt: skip
