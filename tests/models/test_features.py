"""What the last layer sees, and reading the outputs of modules."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from backdoor_bench_none.api import Context, ModelSpec
from backdoor_bench_none.contracts.architecture import Architecture
from backdoor_bench_none.contracts.network import Pixels
from backdoor_bench_none.inspection import features as features_module
from backdoor_bench_none.inspection.features import collect_features
from backdoor_bench_none.inspection.hooks import record_outputs
from backdoor_bench_none.models.alexnet import AlexNet
from backdoor_bench_none.models.mlp import MLP
from backdoor_bench_none.models.nin import NiN
from backdoor_bench_none.models.resnet import ResNet18
from backdoor_bench_none.models.vgg import VGG11, VGG16

CPU = Context(torch.device("cpu"), 0)
PIXELS = Pixels(torch.tensor([[[1 / 255]]]), torch.tensor([[[0.0]]]), 4, True)
IMAGES = torch.randint(0, 256, (20, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def build(architecture: Architecture) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return architecture.build(ModelSpec(10, 1, 16, nn.ReLU))


@pytest.mark.parametrize(
    "architecture", [ResNet18(width=0.1), VGG11(width=0.1), VGG16(width=0.1), AlexNet(width=0.05), MLP(hidden=9)]
)
def test_the_head_makes_the_logits_of_the_features(architecture: Architecture) -> None:
    model = build(architecture).eval()
    features = collect_features(model, IMAGES, PIXELS, CPU)
    head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    assert features.dtype == torch.float32
    assert not features.requires_grad
    torch.testing.assert_close(head(features), model(IMAGES / 255), rtol=1e-4, atol=1e-5)


def test_a_map_is_averaged_over_its_places() -> None:
    """NiN ends in a 1x1 convolution; its features are the mean of what that reads."""
    model = build(NiN(width=0.1)).eval()
    with torch.no_grad():
        maps = model.features[:20](IMAGES / 255)
    assert isinstance(model.features[20], nn.Conv2d)
    assert maps.ndim == 4
    torch.testing.assert_close(collect_features(model, IMAGES, PIXELS, CPU), maps.mean((2, 3)), rtol=1e-4, atol=1e-5)


def test_it_is_in_eval_mode_without_augmentation_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(AlexNet(width=0.05)).train()  # it has dropout
    features = collect_features(model, IMAGES, PIXELS, CPU)
    assert not model.training
    assert torch.equal(features, collect_features(model, IMAGES, PIXELS, CPU))
    order = torch.randperm(20)
    torch.testing.assert_close(collect_features(model, IMAGES[order], PIXELS, CPU), features[order])
    monkeypatch.setattr(
        features_module, "iterate_normalized", partial(features_module.iterate_normalized, batch_size=3)
    )
    torch.testing.assert_close(collect_features(model, IMAGES, PIXELS, CPU), features)


def test_no_hook_is_left_even_by_a_failure() -> None:
    model = build(MLP(hidden=9))
    collect_features(model, IMAGES, PIXELS, CPU)
    with pytest.raises(RuntimeError):
        collect_features(model, IMAGES[:, :, :8], PIXELS, CPU)
    assert not any(module._forward_pre_hooks for module in model.modules())


class InPlace(nn.Module):
    """Overwrites what its head reads."""

    def __init__(self) -> None:
        super().__init__()
        self.flatten, self.head = nn.Flatten(), nn.Linear(256, 3)

    def forward(self, x: Tensor) -> Tensor:
        flat = self.flatten(x)
        logits: Tensor = self.head(flat)
        flat.zero_()
        return logits


def test_features_are_kept_though_they_are_overwritten_later() -> None:
    features = collect_features(InPlace(), IMAGES, PIXELS, CPU)
    torch.testing.assert_close(features, IMAGES.flatten(1) / 255)


class HeadFirst(nn.Module):
    """A user's network that defines its head before its body."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.flatten, self.body, self.act = nn.Linear(7, 3), nn.Flatten(), nn.Linear(256, 7), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.act(self.body(self.flatten(x))))
        return logits


class Auxiliary(nn.Module):
    """A user's network whose last layer is only used in training."""

    def __init__(self) -> None:
        super().__init__()
        self.flatten, self.body, self.head, self.aux = nn.Flatten(), nn.Linear(256, 7), nn.Linear(7, 3), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(self.flatten(x)).relu())
        return logits


@pytest.mark.parametrize("kind", [HeadFirst, Auxiliary])
def test_the_last_layer_is_the_one_that_makes_the_logits_not_the_one_defined_last(kind: type[nn.Module]) -> None:
    model = kind().eval()
    assert collect_features(model, IMAGES, PIXELS, CPU).shape == (20, 7)


# record_outputs


def test_outputs_are_recorded_under_their_keys_by_every_pass() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    with record_outputs(model, {"first": "0", "again": "0", "last": "1"}) as outputs:
        for x in torch.randn(2, 4, 2):
            expected = model(x)
            assert torch.equal(outputs["last"], expected)
            assert torch.equal(outputs["first"], outputs["again"])
    assert outputs.keys() == {"first", "again", "last"}
    model(torch.randn(4, 2))
    assert torch.equal(outputs["last"], expected)


def test_outputs_are_reduced_before_they_are_overwritten() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(inplace=True))
    x = torch.randn(50, 2)
    with record_outputs(model, {"0": "0"}, lambda module, output: output.amin(0)) as outputs:
        model(x)
    assert torch.equal(outputs["0"], model[0](x).amin(0))
    assert (outputs["0"] < 0).all()


def test_unknown_modules_are_named() -> None:
    model = nn.Sequential(nn.Linear(2, 3))
    with pytest.raises(ValueError, match=r"no module \['1'\]; it has: 0"), record_outputs(model, {"x": "1"}):
        pass
    assert not model[0]._forward_hooks
