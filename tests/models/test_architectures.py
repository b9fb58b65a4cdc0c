"""Known parameter counts, shapes and values of the architectures and activations."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torchvision
from torch import nn

from backdoor_bench_none.contracts.architecture import Activation, Architecture, ModelSpec
from backdoor_bench_none.models import activations
from backdoor_bench_none.models.alexnet import AlexNet
from backdoor_bench_none.models.initial_weights import measure_spread
from backdoor_bench_none.models.mlp import MLP
from backdoor_bench_none.models.nin import NiN
from backdoor_bench_none.models.resnet import ResNet18
from backdoor_bench_none.models.vgg import VGG11, VGG16

ARCHITECTURES: tuple[type[Architecture], ...] = (NiN, VGG11, VGG16, ResNet18, AlexNet, MLP)
VALUES_AT_MINUS_1 = {
    "ReLU": 0.0,
    "LeakyReLU": -0.01,
    "ELU": math.exp(-1) - 1,
    "PReLU": -0.25,
    "Tanhshrink": math.tanh(1) - 1,
    "Softplus": math.log1p(math.exp(-1)),
    "GELU": -0.158655,
    "SiLU": -1 / (1 + math.e),
}
RECIPE_KEYS = {"lr", "momentum", "weight_decay", "warmup", "clip_norm"}


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def make_activation(name: str) -> Activation:
    made = getattr(activations, name)()
    assert isinstance(made, Activation)
    return made


def build(
    architecture: Architecture, size: int = 32, channels: int = 3, classes: int = 10, activation: str = "ReLU"
) -> nn.Module:
    return architecture.build(ModelSpec(classes, channels, size, make_activation(activation).build))


def count_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def count_published(architecture: Architecture, size: int) -> int:
    """Number of parameters without allocating them."""
    with torch.device("meta"):
        return count_parameters(build(architecture, size))


@pytest.mark.parametrize(
    ("architecture", "size", "expected"),
    [
        (NiN(), 32, 966_986),
        (VGG11(), 32, 9_225_610),
        (VGG16(), 32, 14_719_818),
        (ResNet18(), 28, 11_173_962),
        (ResNet18(), 32, 11_173_962),
        (ResNet18(), 64, 11_173_962),
        (ResNet18(), 96, 11_181_642),
        (ResNet18(), 224, 11_181_642),
        (AlexNet(), 224, 57_044_810),
        (MLP(), 28, 3 * 28 * 28 * 128 + 128 + 128 * 128 + 128 + 128 * 10 + 10),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Architecture) else None,
)
def test_parameter_counts_are_the_published_ones(architecture: Architecture, size: int, expected: int) -> None:
    assert count_published(architecture, size) == expected


@pytest.mark.parametrize(
    ("architecture", "reference"),
    [(AlexNet(), torchvision.models.alexnet), (ResNet18(), torchvision.models.resnet18)],
    ids=["alexnet", "resnet18"],
)
def test_parameter_shapes_at_224_are_torchvisions(architecture: Architecture, reference: type[nn.Module]) -> None:
    with torch.device("meta"):
        expected = [tuple(p.shape) for p in reference(num_classes=10).parameters()]
        actual = [tuple(p.shape) for p in build(architecture, 224).parameters()]
    assert sorted(actual) == sorted(expected)


def test_resnet_has_torchvisions_parameter_names() -> None:
    with torch.device("meta"):
        expected = set(torchvision.models.resnet18(num_classes=10).state_dict())
        actual = set(build(ResNet18(), 224).state_dict())
    assert actual == expected


@pytest.mark.parametrize("size", [16, 28, 32, 64, 96, 224])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_logits_have_one_column_per_class(kind: type[Architecture], channels: int, size: int) -> None:
    network = build(kind(width=0.05), size, channels, classes=7).eval()
    with torch.no_grad():
        logits = network(torch.randn(2, channels, size, size))
    assert logits.shape == (2, 7)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("size", [17, 31, 50, 65, 100, 223])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_odd_sizes_work(kind: type[Architecture], size: int) -> None:
    network = build(kind(width=0.02), size, 1).eval()
    with torch.no_grad():
        assert network(torch.randn(1, 1, size, size)).shape == (1, 10)


@pytest.mark.parametrize("kind", [NiN, VGG11, VGG16, ResNet18, AlexNet])
def test_half_width_has_about_a_quarter_of_the_parameters(kind: type[Architecture]) -> None:
    ratio = count_published(kind(width=0.5), 32) / count_published(kind(), 32)
    assert 0.24 < ratio < 0.27


def test_width_and_depth_of_the_mlp() -> None:
    network = build(MLP(width=0.5, hidden=200, depth=5), 28, 1)
    shapes = [tuple(m.weight.shape) for m in network.modules() if isinstance(m, nn.Linear)]
    assert shapes == [(100, 784), (100, 100), (100, 100), (100, 100), (100, 100), (10, 100)]


def test_width_multiplies_every_hidden_layer_of_nin() -> None:
    network = build(NiN(width=0.25), 32, 1)
    outputs = [m.out_channels for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert outputs == [48, 40, 24, 48, 48, 48, 48, 48, 10]


def test_nin_logits_are_never_negative_with_relu() -> None:
    network = build(NiN(width=0.1)).eval()
    with torch.no_grad():
        assert network(torch.randn(16, 3, 32, 32)).min() >= 0
        assert network(-10 * torch.ones(1, 3, 32, 32)).min() >= 0


@pytest.mark.parametrize("activation", ["ReLU", "ELU", "Tanhshrink", "Softplus"])
@pytest.mark.parametrize("seed", [0, 1])
def test_no_logit_of_nin_is_dead_at_the_start(activation: str, seed: int) -> None:
    torch.manual_seed(seed)
    network = build(NiN(width=0.25), activation=activation).train()
    logits = network(torch.randn(16, 3, 32, 32))
    bias = [m for m in network.modules() if isinstance(m, nn.Conv2d)][-1].bias
    (gradient,) = torch.autograd.grad(logits.sum(), [bias])
    assert (gradient > 0.1).all()


def test_released_initialisation_of_nin() -> None:
    network = build(NiN(init="released"))
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    for convolution in convolutions:
        assert convolution.weight.std().item() == pytest.approx(0.05, rel=0.1)
        assert convolution.bias is not None
        assert 0 < convolution.bias.abs().max().item() < 0.01


def test_released_initialisation_of_vgg() -> None:
    network = build(VGG11(init="released", width=0.5))
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            expected = math.sqrt(2 / (9 * module.out_channels))
            assert module.weight.std().item() == pytest.approx(expected, rel=0.1)
            assert module.bias is not None
            assert not module.bias.any()
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.01, rel=0.1)


def measure_pre_activations(network: nn.Module) -> list[float]:
    spreads: list[float] = []
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _module, _args, output: spreads.append(output.std().item()))
    # Neighbouring pixels agree, as in photographs.
    images = nn.functional.interpolate(torch.randn(8, 3, 4, 4), size=32, mode="nearest")
    with torch.no_grad():
        network(images)
    return spreads


@pytest.mark.parametrize("activation", [name for name in VALUES_AT_MINUS_1 if name != "Tanhshrink"])
def test_calibrated_weights_keep_signals_through_thirteen_layers(activation: str) -> None:
    spreads = measure_pre_activations(build(VGG16(width=0.25), activation=activation))
    assert len(spreads) == 13
    assert all(1 < spread < 10 for spread in spreads)


def test_calibrated_weights_keep_signals_of_tanhshrink_longer_than_the_released_ones() -> None:
    calibrated = measure_pre_activations(build(VGG16(width=0.25), activation="Tanhshrink"))
    released = measure_pre_activations(build(VGG16(width=0.25, init="released"), activation="Tanhshrink"))
    assert calibrated[4] > 1
    assert released[4] < 0.01


def test_calibrated_weights_sum_to_zero_after_the_first_layer() -> None:
    first, *others = [m.weight for m in build(MLP(depth=3), 16).modules() if isinstance(m, nn.Linear)]
    assert first.sum(1).abs().max() > 0.1
    for weight in others:
        assert weight.sum(1).abs().max() < 1e-4


def test_spread_of_relu_of_normal_values() -> None:
    assert measure_spread(nn.ReLU, 3.0) == pytest.approx(3 * math.sqrt(0.5 - 0.5 / math.pi), rel=1e-3)


@pytest.mark.parametrize("size", [28, 96])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_fx_traces_every_network(kind: type[Architecture], size: int) -> None:
    network = build(kind(width=0.02), size, 1).eval()
    traced = torch.fx.symbolic_trace(network)
    images = torch.randn(2, 1, size, size)
    with torch.no_grad():
        assert torch.equal(traced(images), network(images))
    nodes = [node for node in traced.graph.nodes if node.op in ("call_function", "call_method")]
    functions = {getattr(node.target, "__name__", node.target) for node in nodes}
    # the last two are of models/convolution.py, which torch's own tracer looks into
    assert functions == ({"add", "conv2d", "getitem"} if kind is ResNet18 else set())


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_place_has_an_activation_of_its_own(kind: type[Architecture]) -> None:
    made: list[nn.Module] = []

    def make() -> nn.Module:
        made.append(nn.ReLU())
        return made[-1]

    network = kind(width=0.02).build(ModelSpec(10, 3, 32, make))
    fired: list[nn.Module] = []
    for module in network.modules():
        if module not in made:
            continue
        module.register_forward_hook(lambda module, _args, _output: fired.append(module))
    network.eval()(torch.randn(1, 3, 32, 32))
    assert [id(m) for m in fired] == list(dict.fromkeys(id(m) for m in fired))
    assert len(fired) == {NiN: 9, VGG11: 8, VGG16: 13, ResNet18: 17, AlexNet: 7, MLP: 2}[kind]
    assert not any(getattr(m, "inplace", False) for m in network.modules())


def test_prelu_adds_one_slope_per_place() -> None:
    for kind, places in ((NiN, 9), (VGG16, 13), (ResNet18, 17)):
        assert count_parameters(build(kind(width=0.02), activation="PReLU")) == (
            count_parameters(build(kind(width=0.02))) + places
        )


@pytest.mark.parametrize("name", VALUES_AT_MINUS_1)
def test_activation_values(name: str) -> None:
    module = make_activation(name).build()
    inputs = torch.tensor([-1.0])
    assert module(inputs).item() == pytest.approx(VALUES_AT_MINUS_1[name], abs=1e-5)
    assert inputs.item() == -1.0
    assert make_activation(name).build() is not module


def test_activation_parameters_reach_the_module() -> None:
    minus_1 = torch.tensor(-1.0)
    assert activations.LeakyReLU(negative_slope=0.5).build()(minus_1).item() == pytest.approx(-0.5)
    assert activations.ELU(alpha=2).build()(minus_1).item() == pytest.approx(2 * (math.exp(-1) - 1))
    assert activations.PReLU(init=0.5).build()(minus_1.reshape(1)).item() == pytest.approx(-0.5)
    assert activations.Softplus(beta=2).build()(minus_1).item() == pytest.approx(math.log1p(math.exp(-2)) / 2)
    assert activations.Softplus(threshold=1).build()(torch.tensor(2.0)).item() == 2.0


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_equal_seeds_give_equal_weights(kind: type[Architecture]) -> None:
    networks = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        networks.append(build(kind(width=0.05), 16).state_dict())
    first, again, other = networks
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("activation", VALUES_AT_MINUS_1)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_one_step_reaches_every_parameter(kind: type[Architecture], activation: str) -> None:
    network = build(kind(width=0.05), 16, activation=activation).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    images, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    loss = nn.functional.cross_entropy(network(images), labels)
    loss.backward()
    optimizer.step()
    assert math.isfinite(loss.item())
    for parameter in network.parameters():
        assert parameter.grad is not None
        assert torch.isfinite(parameter).all()


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_recipes_have_known_keys(kind: type[Architecture]) -> None:
    recipe = kind().recipe("mnist")
    assert set(recipe) <= RECIPE_KEYS
    assert all(value > 0 for value in recipe.values())


def test_parameters_are_described_and_bounded() -> None:
    for component in (*ARCHITECTURES, *(type(make_activation(name)) for name in VALUES_AT_MINUS_1)):
        assert component.paper
        for field in component.model_fields.values():
            assert field.description
    with pytest.raises(ValueError, match="greater than 0"):
        VGG11(width=0)
