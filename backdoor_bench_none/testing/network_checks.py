"""The checks of architectures, activation functions and the other kinds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from backdoor_bench_none.contracts.architecture import Activation, Architecture, ModelSpec
from backdoor_bench_none.contracts.dataset import Dataset, check_info
from backdoor_bench_none.contracts.metric import Evaluation, Metric
from backdoor_bench_none.contracts.network import find_logits_layer
from backdoor_bench_none.contracts.recipe import Recipe
from backdoor_bench_none.contracts.trainer import FitTask, Trainer
from backdoor_bench_none.run.checks import check_dataset as check_dataset_holds
from backdoor_bench_none.testing.bench import Bench, weights_of
from backdoor_bench_none.testing.checks import Check, left_alone, require, same_weights

CLASSES, SIDE = 7, 32


class Marked(nn.Module):
    """A rare activation function, which shows whether a network uses the one it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        """x if it is positive, else x / 10."""
        self.calls += 1
        return torch.where(x > 0, x, 0.1 * x)


def _build(architecture: Architecture, bench: Bench, channels: int = 3, seed: int = 0) -> nn.Module:
    """A network as core builds it: on the CPU, then moved to the device."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return architecture.build(ModelSpec(CLASSES, channels, SIDE, Marked)).to(bench.device)


def _images(bench: Bench, channels: int = 3) -> Tensor:
    return torch.randn(4, channels, SIDE, SIDE, generator=torch.Generator().manual_seed(0)).to(bench.device)


def check_logits(architecture: Architecture, bench: Bench) -> None:
    """Grey and colour images give finite logits (N, K), in eval and in training mode."""
    for channels in (1, 3):
        model = _build(architecture, bench, channels)
        for mode in ("training", "eval"):
            logits = model.train(mode == "training")(_images(bench, channels))
            where = f"for {channels} channels in {mode} mode"
            require(isinstance(logits, Tensor), f"the network returns {type(logits).__name__} {where}, not a tensor")
            require(tuple(logits.shape) == (4, CLASSES), f"logits have shape {tuple(logits.shape)} {where}")
            require(bool(torch.isfinite(logits).all()), f"logits are not finite {where}")


def check_activation_used(architecture: Architecture, bench: Bench) -> None:
    """The activation function of the cell is the only one, as a separate module at each position."""
    model = _build(architecture, bench).eval()
    marked = [module for module in model.modules() if isinstance(module, Marked)]
    for module in marked:
        module.calls = 0  # build may have tried the network
    model(_images(bench))
    require(marked, "the network does not use spec.activation")
    others = {type(m).__name__ for m in model.modules() if type(m).__module__ == "torch.nn.modules.activation"}
    require(not others, f"the network also has {', '.join(sorted(others))}; use spec.activation() everywhere")
    require(
        all(module.calls == 1 for module in marked),
        "an activation module is used several times, or never; call spec.activation() once for each use",
    )


def check_seeded(architecture: Architecture, bench: Bench) -> None:
    """Initial weights are a function of torch's global seed, and can be loaded into a second network."""
    first, second, other = (weights_of(_build(architecture, bench, seed=seed)) for seed in (0, 0, 1))
    require(same_weights(first, second), "two networks of one torch seed have different weights")
    require(not same_weights(first, other), "networks of different torch seeds have equal weights")
    _build(architecture, bench).load_state_dict(dict(first))


def check_width(architecture: Architecture, bench: Bench) -> None:
    """`width` scales the network, where it can be chosen."""
    try:
        slim = type(architecture)(**{**architecture.model_dump(), "width": architecture.width / 2})
    except ValueError:
        return
    counts = [sum(p.numel() for p in _build(network, bench).parameters()) for network in (slim, architecture)]
    require(counts[0] < counts[1], f"half the width leaves {counts[0]} of {counts[1]} parameters; use self.scale")


def check_trains(architecture: Architecture, bench: Bench) -> None:
    """Every parameter has a gradient, and the last layer computes the logits."""
    model = _build(architecture, bench).train()
    labels = torch.arange(4, device=bench.device)
    nn.functional.cross_entropy(model(_images(bench)), labels).backward()  # type: ignore[no-untyped-call]
    idle = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    require(not idle, f"parameters without gradient: {', '.join(idle[:5])}")
    head = cast("nn.Linear", find_logits_layer(model, _images(bench)[:1]))
    require(head.weight.shape[0] == CLASSES, "the layer defined last does not compute the logits; define that one last")


def check_recipe(component: Architecture | Dataset | Trainer, bench: Bench) -> None:
    """The changes to the training recipe are valid."""
    if isinstance(component, Architecture):
        Recipe(**component.recipe("stripes"))
    else:
        Recipe(**component.recipe())


def check_activation(activation: Activation, bench: Bench) -> None:
    """A new module each time, elementwise, finite, differentiable, and not in place."""
    module, another = activation.build(), activation.build()
    require(isinstance(module, nn.Module), f"build returned {type(module).__name__}")
    require(module is not another, "build returns one module twice")
    x = torch.linspace(-6, 6, 64, device=bench.device).reshape(2, 4, 8).requires_grad_()
    module.to(bench.device)
    before = x.detach().clone()
    y = module(x)
    require(tuple(y.shape) == tuple(x.shape), f"shape {tuple(x.shape)} becomes {tuple(y.shape)}")
    require(torch.equal(x.detach(), before), "it writes into its input, where neurons are read")
    y.sum().backward()
    finite = torch.isfinite(y).all() and x.grad is not None and torch.isfinite(x.grad).all()
    require(bool(finite), "values or gradients are not finite between -6 and 6")


def check_dataset(dataset: Dataset, bench: Bench) -> None:
    """`load` returns what `info` says, and both are the same each time."""
    dataset.prepare()
    info = dataset.info()
    train, test = dataset.load()
    check_info(info)
    check_dataset_holds(train, test, info)
    again = dataset.load()[0]
    require(torch.equal(again.images, train.images), "two calls of load return different images")
    require(dataset.fingerprint() == dataset.fingerprint(), "the fingerprint changes from call to call")


def check_trainer(trainer: Trainer, bench: Bench) -> None:
    """`fit` trains in place, ends in eval mode, returns one loss for each epoch, and does not change global state."""
    stages = bench.stages(trainer=trainer)
    task = stages.defense_task()
    model = task.new_model()
    before = weights_of(model)
    with left_alone():
        history = trainer.fit(FitTask(model, task.training_data(None, bench.context), task.recipe), bench.context)
    require(not same_weights(weights_of(model), before), "fit does not change the network")
    require(len(history.losses) == task.recipe.epochs, f"{len(history.losses)} losses, {task.recipe.epochs} epochs")
    require(not model.training, "the network is left in training mode")


def check_metric(metric: Metric, bench: Bench) -> None:
    """`compute` returns numbers by name, with and without triggered images."""
    stages = bench.stages()
    test, info, attack = stages.data()[1], stages.cell.info, stages.cell.attack.component
    reason = metric.absent_for(attack, info)
    require(isinstance(reason, str), f"absent_for returned {type(reason).__name__}, not text")
    model, predicted = stages.victim_network(), (test.labels + 1) % info.num_classes
    for triggered in (test.labels[:0], test.labels[:4]):
        evaluation = Evaluation(
            model, predicted, test.labels, triggered, triggered, (triggered + 1) % info.num_classes, (), test, info,
            attack,
        )  # fmt: skip
        numbers = metric.compute(evaluation, bench.context)
        require(all(isinstance(name, str) for name in numbers), "names are not strings")
        for name, value in numbers.items():
            require(isinstance(value, (int, float)), f"{name} is {type(value).__name__}, not a number")


def checks_of_kind(kind: str) -> Iterator[Check]:
    """The checks of a kind other than attacks and defenses."""
    yield from {
        "architecture": (
            check_logits, check_activation_used, check_seeded, check_width, check_trains, check_recipe,
        ),
        "activation": (check_activation,),
        "dataset": (check_dataset, check_recipe),
        "trainer": (check_trainer, check_recipe),
        "metric": (check_metric,),
    }.get(kind, ())  # fmt: skip
