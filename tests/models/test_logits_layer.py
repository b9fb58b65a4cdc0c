"""Which layer makes the logits: found by what is computed, for networks of any shape, by all that ask."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backdoor_bench_none.api import (
    Architecture,
    Batch,
    Context,
    DatasetInfo,
    FeatureTap,
    FitTask,
    ImageSet,
    ModelBuilder,
    ModelSpec,
    Recipe,
    TrainingData,
    find_layers,
    find_logits_layer,
    find_logits_layers,
)
from backdoor_bench_none.errors import TrainingError
from backdoor_bench_none.trainers.centralized import Centralized
from backdoor_bench_none.trainers.transfer import Transfer

CPU = Context(torch.device("cpu"), 0)
SIDE, HIDDEN, CLASSES = 6, 5, 3
EXAMPLE = torch.linspace(-1, 1, SIDE * SIDE).reshape(1, 1, SIDE, SIDE)
INFO = DatasetInfo("toy", (1, SIDE, SIDE), CLASSES, 12, (0.5,), (0.5,))


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


class Body(nn.Module):
    """A hidden convolution `body` (N, 5, 4, 4), and a head that is defined before it."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.body = nn.Linear(HIDDEN, CLASSES), nn.Conv2d(1, HIDDEN, 3)

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x)).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x))
        return logits


class ThroughSoftmax(Body):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(1)


class ThroughPooling(Body):
    """A 1x1 convolution whose map is pooled by a function and viewed as logits."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(HIDDEN, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.adaptive_avg_pool2d(self.head(F.relu(self.body(x))), 1)
        return pooled.view(len(x), -1)


class ThroughFlatten(ThroughPooling):
    def forward(self, x: Tensor) -> Tensor:
        return torch.flatten(F.max_pool2d(self.head(F.relu(self.body(x))), 4), 1)


class ThroughInPlace(Body):
    """An activation overwrites the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(super().forward(x))
        return logits


class ThroughViewInPlace(ThroughPooling):
    """A view of the logits is overwritten."""

    def forward(self, x: Tensor) -> Tensor:
        viewed = self.head(F.relu(self.body(x))).flatten(2)
        viewed.mul_(2)
        return viewed.mean(2)


class HiddenInPlace(Body):
    """An activation overwrites what the hidden layer puts out."""

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x), inplace=True).mean((2, 3))


class InputInPlace(Body):
    """Normalises its input in place."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.sub_(x.mean()))


class AuxiliaryRunsLast(Body):
    """A second head whose output is looked at and not returned."""

    def __init__(self) -> None:
        super().__init__()
        self.aux, self.sparsity = nn.Linear(HIDDEN, 2), torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        self.sparsity = self.aux(self.features(x)).abs().mean()
        return logits


class AuxiliaryReturned(Body):
    """Returns logits and an auxiliary output."""

    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Linear(HIDDEN, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        features = self.features(x)
        return self.head(features), self.aux(features)


class Branching(Body):
    """Takes a way that depends on the data, which torch.fx refuses."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


class Frozen(Body):
    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)


class BodyOfAnotherNetwork(Body):
    """Its features come without gradients, as those of a frozen encoder."""

    def features(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().features(x)


class TiedWeights(Body):
    """The last layer shares its weight with a hidden one."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.inner = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.head.weight = self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, :CLASSES]

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.inner(super().features(x)))


class UsedTwice(Body):
    """One linear layer is the last hidden layer, and then makes the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, :CLASSES]

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.head(super().features(x)))


class TwoNames(Body):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.alias = self.head


class Detached(Body):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


class Regularized(Body):
    """Batch normalisation and dropout between body and head."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.dropout = nn.BatchNorm2d(HIDDEN), nn.Dropout(0.5)
        self.norm.eval()  # one that the user froze

    def features(self, x: Tensor) -> Tensor:
        return self.dropout(F.relu(self.norm(self.body(x))).mean((2, 3)))


ONE_HEAD: list[Callable[[], Body]] = [
    Body, ThroughSoftmax, ThroughPooling, ThroughFlatten, ThroughInPlace, ThroughViewInPlace, HiddenInPlace,
    InputInPlace, AuxiliaryRunsLast, AuxiliaryReturned, Branching, Frozen, BodyOfAnotherNetwork, TiedWeights,
    UsedTwice, TwoNames, Detached, Regularized,
]  # fmt: skip


@pytest.mark.parametrize("kind", ONE_HEAD)
def test_the_layer_that_makes_the_logits_is_found(kind: Callable[[], Body]) -> None:
    model = kind()
    assert find_logits_layers(model, EXAMPLE) == {"head": model.head}
    assert find_logits_layer(model, EXAMPLE) is model.head


class Sum(Body):
    """The logits are the sum of a deep and a wide part, of which the wide one runs last."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(SIDE * SIDE, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.wide(x.flatten(1))


class SumInPlace(Sum):
    """Added by `+=`, which overwrites what the first head puts out."""

    def forward(self, x: Tensor) -> Tensor:
        logits = self.head(self.features(x))
        logits += self.wide(x.flatten(1))
        return logits


class WideFirst(Sum):
    def forward(self, x: Tensor) -> Tensor:
        return self.wide(x.flatten(1)) + self.head(self.features(x))


class HeadAgainLast(Sum):
    """The head is a hidden layer, too, so that it runs before and after the wide part."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.wide = nn.Linear(HIDDEN, HIDDEN), nn.Linear(SIDE * SIDE, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.head(self.features(x)))
        logits: Tensor = self.wide(x.flatten(1)) + self.head(hidden)
        return logits[:, :CLASSES]


@pytest.mark.parametrize(
    ("kind", "order"),
    [
        (Sum, ["head", "wide"]),
        (SumInPlace, ["head", "wide"]),
        (WideFirst, ["wide", "head"]),
        (HeadAgainLast, ["wide", "head"]),
    ],
)
def test_all_heads_are_found_in_the_order_in_which_they_ran(kind: type[Sum], order: list[str]) -> None:
    model = kind()
    layers = find_logits_layers(model, EXAMPLE)
    assert layers == {name: model.get_submodule(name) for name in order}
    assert list(layers) == order
    assert find_logits_layer(model, EXAMPLE) is model.get_submodule(order[-1])


def test_a_detached_output_falls_back_to_the_layer_that_ran_last() -> None:
    class DetachedWithAuxiliary(AuxiliaryRunsLast):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).detach()

    assert list(find_logits_layers(DetachedWithAuxiliary(), EXAMPLE)) == ["aux"]


@pytest.mark.parametrize("make", [nn.Flatten, lambda: nn.Sequential(nn.BatchNorm2d(1), nn.PReLU(), nn.Flatten())])
def test_a_network_without_a_layer_is_an_error(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(TrainingError, match="no convolution and no linear layer"):
        find_logits_layers(make(), EXAMPLE)


def test_a_layer_that_never_runs_is_none() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.idle = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)

    with pytest.raises(TrainingError, match="no convolution and no linear layer"):
        find_logits_layers(Idle(), EXAMPLE)


@pytest.mark.parametrize("gradients", [True, False])
def test_the_network_and_all_around_it_are_left_as_they_were(gradients: bool) -> None:
    model, example = Regularized().train(), EXAMPLE.clone()
    model.norm.eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    generator = torch.get_rng_state()
    with torch.set_grad_enabled(gradients):
        assert find_logits_layer(model, example) is model.head
        assert torch.is_grad_enabled() == gradients
    assert [module.training for module in model.modules()] == modes
    assert modes.count(True) == len(modes) - 1
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(example, EXAMPLE)
    assert not example.requires_grad
    assert not any(module._forward_hooks for module in model.modules())


def test_a_network_that_fails_is_left_as_it_was() -> None:
    model = Regularized().train()
    model.norm.eval()
    modes = [module.training for module in model.modules()]
    with pytest.raises(RuntimeError):
        find_logits_layers(model, EXAMPLE.expand(1, 2, SIDE, SIDE))
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())


# All that ask for the layer, on one network.


class Odd(nn.Module):
    """The head is defined first, bears the same weight as a hidden layer, and runs before an auxiliary one whose output
    is not returned; the way through the network depends on the data.
    """

    def __init__(self) -> None:
        super().__init__()
        self.head, self.aux = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, 2)
        self.body, self.norm, self.inner = nn.Conv2d(1, HIDDEN, 3), nn.BatchNorm2d(HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.head.weight = self.inner.weight
        self.sparsity = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        x = x if x.sum() > -1e9 else -x
        features = F.relu(self.inner(F.relu(self.norm(self.body(x)), inplace=True).mean((2, 3))))
        logits: Tensor = self.head(features)
        self.sparsity = self.aux(features).abs().mean()
        return logits[:, :CLASSES].softmax(1)


class OddArchitecture(Architecture):
    def build(self, spec: ModelSpec) -> nn.Module:
        return Odd()


HEAD = {"head.weight", "head.bias", "inner.weight"}
BODY = {"aux.weight", "aux.bias", "body.weight", "body.bias", "norm.weight", "norm.bias", "inner.bias"}
STATISTICS = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}


def sum_of_parameters(model: nn.Module, batch: Batch) -> Tensor:
    """A loss that gives every parameter the gradient 1."""
    return torch.stack([parameter.sum() for parameter in model.parameters()]).sum()


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def steps(model: nn.Module, trainer: Centralized | Transfer, **recipe: float) -> dict[str, float]:
    """How far one step of rate 0.1 moves each tensor that it moves."""
    before = state_of(model)
    images = ImageSet(torch.full((12, 1, SIDE, SIDE), 9, dtype=torch.uint8), torch.arange(12) % CLASSES)
    plain = Recipe(
        epochs=1, batch_size=12, lr=0.1, momentum=0, nesterov=False, weight_decay=0, schedule="constant", augment=False,
        **recipe,
    )  # fmt: skip
    data = TrainingData.of(images, INFO, CPU.device)
    trainer.fit(FitTask(model, data, plain, freeze_batchnorm=True, loss=sum_of_parameters), CPU)
    after = state_of(model)
    return {
        name: float((before[name] - after[name]).flatten()[0])
        for name in before
        if not torch.equal(before[name], after[name])
    }


def test_a_head_has_its_own_learning_rate() -> None:
    expected = dict.fromkeys(BODY, 0.1) | dict.fromkeys(HEAD, 0.02)
    assert steps(Odd(), Centralized(), head_lr_factor=0.2) == pytest.approx(expected, abs=1e-6)


def test_transfer_trains_the_head_alone() -> None:
    assert steps(Odd(), Transfer()) == pytest.approx(dict.fromkeys(HEAD, 0.1), abs=1e-6)


def test_a_backbone_is_all_but_the_head() -> None:
    build = ModelBuilder(OddArchitecture(), ModelSpec(CLASSES, 1, SIDE, nn.ReLU), "odd", CPU.device)
    model, weights = build(0), state_of(build(1))
    before = state_of(model)
    for tensor in (*weights.values(), *before.values()):
        assert tensor.numel()
    weights = {name: tensor + 1 for name, tensor in weights.items()}
    build.load_backbone(model, {name: tensor for name, tensor in weights.items() if name not in HEAD})
    for name, tensor in model.state_dict().items():
        expected = weights[name] if name in BODY | STATISTICS else before[name]
        assert torch.equal(tensor, expected), name


def test_features_are_what_the_head_reads() -> None:
    model = Odd().eval()
    with FeatureTap(model, EXAMPLE) as tap:
        features = tap(EXAMPLE)
    logits = model.head(features)[:, :CLASSES]
    torch.testing.assert_close(logits.softmax(1), model(EXAMPLE))


def test_a_layer_to_be_inspected_is_any_but_the_head() -> None:
    assert [layer.name for layer in find_layers(Odd().eval(), EXAMPLE)] == ["body", "inner", "aux"]


@pytest.mark.parametrize("kind", [Sum, SumInPlace, WideFirst])
def test_of_two_heads_each_tensor_is_either_loaded_with_the_backbone_or_trained_by_transfer(kind: type[Sum]) -> None:
    class Architectural(Architecture):
        def build(self, spec: ModelSpec) -> nn.Module:
            return kind()

    build = ModelBuilder(Architectural(), ModelSpec(CLASSES, 1, SIDE, nn.ReLU), "sum", CPU.device)
    model = build(0)
    before = state_of(model)
    build.load_backbone(model, {name: tensor + 1 for name, tensor in before.items()})
    loaded = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    trained = set(steps(model, Transfer()))
    assert loaded == {"body.weight", "body.bias"}
    assert trained == set(before) - loaded
