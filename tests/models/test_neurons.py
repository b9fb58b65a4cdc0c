"""Neurons of the built-in networks and of a user's own: found, read, pruned and renewed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backdoor_bench_none.api import Context, DatasetInfo
from backdoor_bench_none.contracts.architecture import Architecture, ModelSpec
from backdoor_bench_none.contracts.network import Pixels
from backdoor_bench_none.inspection import neurons
from backdoor_bench_none.inspection.layers import Consumer, Layer, Tap
from backdoor_bench_none.inspection.neurons import collect_activations, find_layers, prune_neurons, reinitialize_neurons
from backdoor_bench_none.models import activations
from backdoor_bench_none.models.alexnet import AlexNet
from backdoor_bench_none.models.mlp import MLP
from backdoor_bench_none.models.nin import NiN
from backdoor_bench_none.models.resnet import ResNet18
from backdoor_bench_none.models.vgg import VGG11, VGG16

CPU = Context(torch.device("cpu"), 0)
SIDE = 6
CLASSES = 3


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def build(kind: type[Architecture], size: int, activation: type[nn.Module] = nn.ReLU, width: float = 0.05) -> nn.Module:
    return shake(kind(width=width).build(ModelSpec(5, 1, size, activation)))


def shake(model: nn.Module) -> nn.Module:
    """Biases, norms and statistics that are not zero or one, so that nothing is right by chance; in eval mode."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.ndim == 1 and tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.5 if not name.endswith("bias") else torch.randn_like(tensor))
    return model.eval()


# A user's own networks: (N, 1, 6, 6) to (N, 3).


class Chain(nn.Module):
    """Two convolutions with activation modules and one linear layer behind a flattened 3x3 map."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 5, 3, padding=1)
        self.act = nn.ReLU()
        self.head = nn.Linear(5 * 9, CLASSES)

    def features(self, x: Tensor) -> Tensor:
        return F.max_pool2d(self.act(self.b(self.act(self.a(x)))), 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.flatten(self.features(x), 1))


class InPlace(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)


class Functional(Chain):
    def features(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.relu(self.b(torch.relu(self.a(x)))), 2)


class Viewed(Chain):
    """Flattens as most code on the web does."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.head(x.view(x.size(0), -1))


class Reshaped(Chain):
    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.head(x.reshape(x.shape[0], -1))


class DataDependent(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.mean() > 0 else -x)


class ChannelsLastFlattened(Chain):
    """One channel feeds every fifth column of the linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).permute(0, 2, 3, 1).flatten(1))


class Rearranged(Chain):
    """Something that moves channels between the first convolution and the second."""

    def __init__(self, move: nn.Module) -> None:
        super().__init__()
        self.move = move

    def features(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.relu(self.b(self.move(F.relu(self.a(x))))), 2)


class ChannelMean(nn.Module):
    """Averages over channels, so that the linear layer has columns for places, not for channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(36, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.a(x)).mean(1).flatten(1))


class OwnConv(nn.Conv2d):
    """A convolution of the user's, as one with standardised weights."""


class OwnLayers(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.a = OwnConv(1, 4, 3, padding=1)


class Normed(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(1, 4, 3, padding=1, bias=False), norm(4)
        self.head = nn.Linear(4 * 36, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.a(x))).flatten(1))


class DataDependentNormed(Normed):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.mean() > 0 else -x)


class Concatenated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(1, 4, 1)
        self.c, self.head = nn.Conv2d(8, 4, 1), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.c(torch.cat([F.relu(self.a(x)), F.relu(self.b(x))], 1)))
        return self.head(x.mean((2, 3)))


class Grouped(nn.Module):
    """Convolution, depthwise convolution, grouped convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(1, 4, 1)
        self.b, self.c = nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 8, 1, groups=2)
        self.head = nn.Linear(8 * 36, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.c(F.relu(self.b(F.relu(self.a(x)))))).flatten(1))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = F.relu(x + self.b(x))
        x += self.c(x)
        return self.head(F.relu(x).amax((2, 3)))


class SharedLayer(nn.Module):
    """One convolution that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4 * 36, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.b(F.relu(self.b(F.relu(self.a(x)))))).flatten(1))


class Tokens(nn.Module):
    """Linear layers over the rows of the image: (N, 6 rows, features)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(SIDE, 4), nn.Linear(4, 12), nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.b(F.relu(self.a(x[:, 0])))).mean(1))


class Added(nn.Module):
    """The logits are the sum of a deep and a wide part."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.deep, self.wide = nn.Linear(36, 4), nn.Linear(4, CLASSES), nn.Linear(36, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.deep(F.relu(self.hidden(x))) + self.wide(x)


class ViewedLogits(nn.Module):
    """The last convolution makes the logits, averaged over the map."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3), nn.Conv2d(4, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.b(F.relu(self.a(x))), 1)
        return x.view(x.size(0), -1)


class SizedEarly(ViewedLogits):
    """The number of images is read off the hidden layer: that path makes no logits."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        count = x.size(0)
        return F.adaptive_avg_pool2d(self.b(x), 1).view(count, -1)


def linear_only() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, CLASSES))


OWN: dict[str, tuple[Callable[[], nn.Module], dict[str, tuple[Consumer, ...] | None]]] = {
    "chain": (Chain, {"a": (Consumer("b", 1),), "b": (Consumer("head", 9),)}),
    "in place": (InPlace, {"a": (Consumer("b", 1),), "b": (Consumer("head", 9),)}),
    "functional": (Functional, {"a": (Consumer("b", 1),), "b": (Consumer("head", 9),)}),
    "viewed": (Viewed, {"a": (Consumer("b", 1),), "b": (Consumer("head", 9),)}),
    "reshaped": (Reshaped, {"a": (Consumer("b", 1),), "b": (Consumer("head", 9),)}),
    "data dependent": (DataDependent, {"a": None, "b": None}),
    "own layers": (OwnLayers, {"a": (Consumer("b", 1),), "b": (Consumer("head", 9),)}),
    "batch norm": (lambda: Normed(nn.BatchNorm2d), {"a": (Consumer("head", 36),)}),
    "concatenated": (Concatenated, {"a": (), "b": (), "c": (Consumer("head", 1),)}),
    "grouped": (Grouped, {"a": (), "b": (), "c": (Consumer("head", 36),)}),
    "residual": (Residual, {"a": (Consumer("b", 1),), "b": (), "c": ()}),
    "linear only": (linear_only, {"1": (Consumer("3", 1),), "3": (Consumer("5", 1),)}),
    "added logits": (Added, {"hidden": (Consumer("deep", 1),)}),
    "viewed logits": (ViewedLogits, {"a": (Consumer("b", 1),)}),
    "sized early": (SizedEarly, {"a": (Consumer("b", 1),)}),
}
#: where it is right, if not the best, to say that the consumers are not known
MAY_STAY_UNRESOLVED = ("viewed", "reshaped", "concatenated", "grouped", "sized early")
#: networks whose consumers are only checked by what pruning does
ALL_OWN: dict[str, Callable[[], nn.Module]] = {name: make for name, (make, _) in OWN.items()} | {
    "channels last": ChannelsLastFlattened,
    "shuffled": lambda: Rearranged(nn.ChannelShuffle(2)),
    "channel mean": ChannelMean,
    "shared layer": SharedLayer,
    "tokens": Tokens,
    "data dependent norm": lambda: DataDependentNormed(nn.BatchNorm2d),
}


def find_own(make: Callable[[], nn.Module]) -> tuple[nn.Module, list[Layer]]:
    model = shake(make())
    return model, find_layers(model, torch.rand(1, 1, SIDE, SIDE))


# Finding layers.

RESNET_STAGES = [
    f"layer{stage}.{block}.{name}"
    for stage in (1, 2, 3, 4)
    for block in (0, 1)
    for name in (("downsample.0", "conv1", "conv2") if stage > 1 and block == 0 else ("conv1", "conv2"))
]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (NiN, [f"features.{i}" for i in (0, 2, 4, 8, 10, 12, 16, 18)]),
        (VGG11, [f"features.{i}" for i in (0, 3, 6, 8, 11, 13, 16, 18)]),
        (VGG16, [f"features.{i}" for i in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)]),
        (ResNet18, ["conv1", *RESNET_STAGES]),
        (AlexNet, [*(f"features.{i}" for i in (0, 3, 6, 8, 10)), "classifier.1", "classifier.4"]),
        (MLP, ["features.0", "features.2"]),
    ],
)
@pytest.mark.parametrize("size", [16, 32])
def test_hidden_layers_of_the_built_in_networks(kind: type[Architecture], expected: list[str], size: int) -> None:
    layers = find_layers(build(kind, size), torch.rand(1, 1, size, size))
    assert [layer.name for layer in layers] == expected
    assert all(layer.consumers is not None for layer in layers)


def test_every_convolution_of_a_resnet_has_its_norm_behind() -> None:
    norms = {layer.name: layer.norm for layer in find_layers(build(ResNet18, 16), torch.rand(1, 1, 16, 16))}
    expected = {name: name.replace("conv", "bn").replace("downsample.0", "downsample.1") for name in norms}
    assert norms == expected


@pytest.mark.parametrize("kind", [NiN, VGG11, AlexNet, MLP])
def test_networks_without_norms_have_none_behind(kind: type[Architecture]) -> None:
    assert {layer.norm for layer in find_layers(build(kind, 16), torch.rand(1, 1, 16, 16))} == {None}


def test_only_the_inner_convolutions_of_a_resnet_have_consumers() -> None:
    consumers = {layer.name: layer.consumers for layer in find_layers(build(ResNet18, 16), torch.rand(1, 1, 16, 16))}
    for name in RESNET_STAGES:
        inner = name.endswith("conv1")
        assert consumers[name] == ((Consumer(name.replace("conv1", "conv2"), 1),) if inner else ())


@pytest.mark.parametrize(("size", "columns"), [(16, 1), (32, 4), (64, 16), (100, 4), (224, 36)])
def test_a_channel_of_alexnets_last_map_feeds_a_block_of_columns(size: int, columns: int) -> None:
    consumers = {
        layer.name: layer.consumers for layer in find_layers(build(AlexNet, size), torch.rand(1, 1, size, size))
    }
    assert consumers["features.10"] == (Consumer("classifier.1", columns),)
    assert consumers["features.0"] == (Consumer("features.3", 1),)
    assert consumers["classifier.1"] == (Consumer("classifier.4", 1),)
    assert consumers["classifier.4"] == (Consumer("classifier.6", 1),)


@pytest.mark.parametrize("size", [8, 28])
def test_consumers_of_an_mlp(size: int) -> None:
    layers = find_layers(build(MLP, size), torch.rand(1, 1, size, size))
    assert [layer.consumers for layer in layers] == [(Consumer("features.2", 1),), (Consumer("classifier", 1),)]


@pytest.mark.parametrize("name", OWN)
def test_layers_and_consumers_of_own_networks(name: str) -> None:
    make, expected = OWN[name]
    consumers_of = {layer.name: layer.consumers for layer in find_own(make)[1]}
    assert list(consumers_of) == list(expected)
    for layer, consumers in consumers_of.items():
        assert consumers == expected[layer] or (consumers is None and name in MAY_STAY_UNRESOLVED)


@pytest.mark.parametrize("name", ALL_OWN)
def test_no_layer_is_found_twice(name: str) -> None:
    names = [layer.name for layer in find_own(ALL_OWN[name])[1]]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("kind", [Normed, DataDependentNormed])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, lambda c: nn.GroupNorm(2, c), nn.InstanceNorm2d])
def test_the_norm_behind_is_found(kind: type[Normed], norm: Callable[[int], nn.Module]) -> None:
    assert [layer.norm for layer in find_own(lambda: kind(norm))[1]] == ["norm"]


@pytest.mark.parametrize("traceable", [True, False])
def test_a_norm_behind_the_activation_is_not_the_layers(traceable: bool) -> None:
    class ActivationFirst(Normed):
        def forward(self, x: Tensor) -> Tensor:
            if not traceable and x.mean() < 0:
                x = -x
            return self.head(self.norm(F.relu(self.a(x), inplace=True)).flatten(1))

    assert [layer.norm for layer in find_own(lambda: ActivationFirst(nn.BatchNorm2d))[1]] == [None]


def test_a_network_that_only_makes_logits_has_no_hidden_layer() -> None:
    assert find_own(lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, CLASSES)))[1] == []


@pytest.mark.parametrize("name", ALL_OWN)
def test_finding_leaves_the_network_as_it_was(name: str) -> None:
    model = shake(ALL_OWN[name]())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    find_layers(model, torch.rand(1, 1, SIDE, SIDE))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert count_hooks(model) == 0


def count_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


# Reading neurons.


def draw_images(count: int, size: int = SIDE) -> tuple[Tensor, Pixels]:
    info = DatasetInfo("noise", (1, size, size), CLASSES, count, (0.4,), (0.3,))
    return torch.randint(0, 256, (count, 1, size, size), dtype=torch.uint8), Pixels.of(info, CPU.device)


def collect_naively(model: nn.Module, modules: dict[str, str], inputs: Tensor) -> dict[str, Tensor]:
    """One image at a time, copying every output whole; `modules` is from layer to the module whose output counts."""
    maps: dict[str, list[Tensor]] = {name: [] for name in modules}
    named = dict(model.named_modules())
    for name, tapped in modules.items():
        named[tapped].register_forward_hook(lambda _m, _a, out, name=name: maps[name].append(out.detach().clone()))
    for image in inputs:
        model(image[None])
    for module in named.values():
        module._forward_hooks.clear()
    return {name: torch.stack([out.flatten(2).amax(2)[0] if out.ndim == 4 else out[0] for out in outs], 1)
            for name, outs in maps.items()}  # fmt: skip


@pytest.mark.parametrize("tap", ["pre_activation", "convolution"])
@pytest.mark.parametrize("kind", [NiN, VGG11, ResNet18, AlexNet, MLP])
def test_activations_equal_a_naive_loop(kind: type[Architecture], tap: Tap) -> None:
    images, pixels = draw_images(7, 16)
    model = build(kind, 16)
    layers = find_layers(model, pixels.normalize(images[:1]))
    values, probabilities = collect_activations(model, layers, tap, images, pixels, CPU)
    behind = tap == "pre_activation" and kind is ResNet18
    tapped = {x.name: x.name.replace("conv", "bn").replace("downsample.0", "downsample.1") for x in layers}
    expected = collect_naively(model, tapped if behind else {x.name: x.name for x in layers}, pixels.normalize(images))
    assert list(values) == [layer.name for layer in layers]
    for name, maxima in values.items():
        assert maxima.dtype == torch.float32
        torch.testing.assert_close(maxima, expected[name], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(probabilities, model(pixels.normalize(images)).softmax(1), rtol=1e-4, atol=1e-5)


def test_the_two_taps_differ_behind_a_norm() -> None:
    images, pixels = draw_images(5)
    model, layers = find_own(lambda: Normed(nn.BatchNorm2d))
    before = collect_activations(model, layers, "convolution", images, pixels, CPU)[0]["a"]
    behind = collect_activations(model, layers, "pre_activation", images, pixels, CPU)[0]["a"]
    assert not torch.allclose(before, behind)


def test_a_linear_layer_over_tokens_has_one_neuron_per_feature() -> None:
    images, pixels = draw_images(5)
    model, layers = find_own(Tokens)
    values, _ = collect_activations(model, layers, "pre_activation", images, pixels, CPU)
    rows = pixels.normalize(images)[:, 0]
    assert isinstance(model, Tokens)
    torch.testing.assert_close(values["a"], model.a(rows).amax(1).T)


@pytest.mark.parametrize("batch_size", [1, 4, 13, 512])
def test_activations_do_not_depend_on_the_batch_size(batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    images, pixels = draw_images(13)
    model, layers = find_own(lambda: Normed(nn.BatchNorm2d))
    expected, likely = collect_activations(model, layers, "pre_activation", images, pixels, CPU)
    split = neurons.iterate_normalized
    seen = []

    def in_batches(images: Tensor, pixels: Pixels) -> Iterator[Tensor]:
        for batch in split(images, pixels, batch_size):
            seen.append(len(batch))
            yield batch

    monkeypatch.setattr(neurons, "iterate_normalized", in_batches)
    values, probabilities = collect_activations(model, layers, "pre_activation", images, pixels, CPU)
    assert max(seen) == min(batch_size, 13)
    torch.testing.assert_close(values["a"], expected["a"])
    torch.testing.assert_close(probabilities, likely)


@pytest.mark.parametrize("tap", ["pre_activation", "convolution"])
def test_an_activation_in_place_changes_nothing(tap: Tap) -> None:
    images, pixels = draw_images(9)
    model, layers = find_own(Chain)
    expected = collect_activations(model, layers, tap, images, pixels, CPU)[0]
    other, others = find_own(InPlace)
    other.load_state_dict(model.state_dict())
    values = collect_activations(other, others, tap, images, pixels, CPU)[0]
    assert all(torch.equal(values[name], expected[name]) for name in ("a", "b"))
    assert min(values["a"].min(), values["b"].min()) < 0  # read before the ReLU


def test_linear_layers_with_activations_in_place_are_read_before_them() -> None:
    images, pixels = draw_images(9)
    model = shake(nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.ReLU(inplace=True), nn.Linear(8, CLASSES)))
    layers = find_layers(model, pixels.normalize(images[:1]))
    values, _ = collect_activations(model, layers, "pre_activation", images, pixels, CPU)
    assert values["1"].min() < 0


def test_collecting_puts_the_network_into_eval_mode_and_leaves_no_hooks() -> None:
    images, pixels = draw_images(4)
    model, layers = find_own(lambda: Normed(nn.BatchNorm2d))
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    collect_activations(model.train(), layers, "pre_activation", images, pixels, CPU)
    assert count_hooks(model) == 0
    assert all(torch.equal(statistics[name], buffer) for name, buffer in model.named_buffers())
    assert torch.is_grad_enabled()


def test_no_hooks_are_left_behind_by_a_network_that_fails() -> None:
    images, pixels = draw_images(4)
    model, layers = find_own(Chain)
    model.head = nn.Linear(7, CLASSES)
    with pytest.raises(RuntimeError):
        collect_activations(model, layers, "pre_activation", images, pixels, CPU)
    assert count_hooks(model) == 0


# Pruning and renewing.


@contextmanager
def silenced(model: nn.Module, tapped: str, neuron: int) -> Iterator[None]:
    """The last axis but the map's of what `tapped` puts out is 0 for one neuron."""

    def hook(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        output = output.clone()
        if output.ndim == 3:
            output[..., neuron] = 0
        else:
            output[:, neuron] = 0
        return output

    handle = dict(model.named_modules())[tapped].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("name", ALL_OWN)
def test_pruning_silences_the_neuron_and_nothing_else(name: str) -> None:
    images = torch.randn(4, 1, SIDE, SIDE)
    for index in range(len(find_own(ALL_OWN[name])[1])):
        model, layers = find_own(ALL_OWN[name])
        layer = layers[index]
        with torch.no_grad():
            with silenced(model, layer.tap("pre_activation"), 1):
                expected = model(images)
            prune_neurons(model, layer, torch.tensor([1]))
            torch.testing.assert_close(model(images), expected, msg=lambda text, x=layer: f"{x.name}: {text}")


@pytest.mark.parametrize("kind", [NiN, VGG11, ResNet18, AlexNet, MLP])
def test_pruning_a_built_in_network_silences_the_neurons_and_nothing_else(kind: type[Architecture]) -> None:
    model = build(kind, 32)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = torch.randn(3, 1, 32, 32)
    with torch.no_grad():
        for layer in find_layers(model, images[:1]):
            model.load_state_dict(state)
            with silenced(model, layer.tap("pre_activation"), 0), silenced(model, layer.tap("pre_activation"), 2):
                expected = model(images)
            prune_neurons(model, layer, torch.tensor([2, 0]))
            torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [NiN, VGG11, ResNet18, AlexNet, MLP])
def test_logits_no_longer_depend_on_a_pruned_neuron(kind: type[Architecture]) -> None:
    model = build(kind, 32)
    images = torch.randn(3, 1, 32, 32)
    pruned = [layer for layer in find_layers(model, images[:1]) if layer.consumers and layer.name != "conv1"]
    assert len(pruned) >= 2
    modules = dict(model.named_modules())
    with torch.no_grad():
        for layer in pruned:
            prune_neurons(model, layer, torch.tensor([1]))
            before = model(images)
            modules[layer.name].weight[1] = torch.randn_like(modules[layer.name].weight[1])  # type: ignore[index, operator]
            if layer.norm:
                modules[layer.norm].weight[1] = 3.0  # type: ignore[index, operator]
                modules[layer.norm].bias[1] = 2.0  # type: ignore[index, operator]
            assert torch.equal(model(images), before)


ZERO_AT_ZERO = ["ReLU", "LeakyReLU", "ELU", "PReLU", "Tanhshrink", "GELU", "SiLU"]


@pytest.mark.parametrize("name", [*ZERO_AT_ZERO, "Softplus"])
def test_only_an_activation_that_is_not_zero_at_zero_revives_a_pruned_neuron(name: str) -> None:
    act: Callable[[], nn.Module] = getattr(activations, name)().build
    model = shake(nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), act(), nn.Conv2d(4, 5, 3), act(), nn.Flatten(), nn.Linear(20, CLASSES)
    ))  # fmt: skip
    first, second = find_layers(model, torch.rand(1, 1, SIDE, SIDE))
    prune_neurons(model, first, torch.tensor([2]))
    prune_neurons(model, second, torch.tensor([3]))
    F.cross_entropy(model(torch.randn(8, 1, SIDE, SIDE)), torch.arange(8) % CLASSES).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    made = [grads[name][2] for name in ("0.weight", "0.bias", "1.weight", "1.bias")]
    made += [grads[name][3] for name in ("3.weight", "3.bias")]
    read = [grads["3.weight"][:, 2], grads["6.weight"][:, 3 * 4 : 4 * 4]]
    assert all(not grad.any() for grad in made)
    assert all(bool(grad.any()) == (name == "Softplus") for grad in read)
    assert grads["0.weight"][1].any()  # the others do learn


def test_pruned_residual_channels_can_return_through_their_norms_shift() -> None:
    model = ResNet18(width=0.1).build(ModelSpec(5, 1, 16, nn.ReLU)).eval()
    layers = {layer.name: layer for layer in find_layers(model, torch.rand(1, 1, 16, 16))}
    block = model.layer2[0]
    prune_neurons(model, layers["layer2.0.conv2"], torch.arange(len(block.bn2.bias)))
    F.cross_entropy(model(torch.randn(8, 1, 16, 16)), torch.arange(8) % 5).backward()
    assert not block.conv2.weight.grad.any()
    assert block.bn2.bias.grad.any()


@pytest.mark.parametrize("kind", [VGG11, ResNet18, AlexNet])
def test_pruning_zeroes_what_makes_and_what_reads_the_neurons_only(kind: type[Architecture]) -> None:
    model = build(kind, 32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layer = [x for x in find_layers(model, torch.rand(1, 1, 32, 32)) if x.consumers][-1]
    assert layer.consumers
    prune_neurons(model, layer, torch.tensor([1, 2]))
    expected = before
    for name in (f"{owner}.{part}" for owner in (layer.name, layer.norm) for part in ("weight", "bias")):
        if name in expected:
            expected[name][[1, 2]] = 0
    (consumer,) = layer.consumers
    expected[f"{consumer.name}.weight"][:, consumer.columns : 3 * consumer.columns] = 0
    assert all(torch.equal(expected[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "make", [lambda: build(ResNet18, 16), lambda: build(VGG11, 16), lambda: shake(DataDependent())]
)
def test_renewing_copies_the_given_rows_only(make: Callable[[], nn.Module]) -> None:
    model, fresh = make(), make()
    size = SIDE if isinstance(model, DataDependent) else 16
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    source = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    layer = find_layers(model, torch.rand(1, 1, size, size))[1]
    reinitialize_neurons(model, layer, torch.tensor([2, 0]), fresh)
    for name, tensor in model.state_dict().items():
        owner, part = name.rsplit(".", 1)
        renewed = owner in (layer.name, layer.norm) and part in ("weight", "bias")
        assert not renewed or not torch.equal(tensor, before[name])
        for row in (0, 2) if renewed else ():
            before[name][row] = source[name][row]
        assert torch.equal(tensor, before[name]), name
    assert all(torch.equal(source[name], tensor) for name, tensor in fresh.state_dict().items())
