"""The toolbox's networks, by its names."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from backdoor_bench_none.api import ModelSpec
from backdoor_bench_none.testing import parametrize_contracts
from bbn_backdoorbench import networks
from bbn_backdoorbench.words import MODELS

SPEC = ModelSpec(10, 3, 32, nn.ReLU)


@pytest.mark.parametrize("name", MODELS)
def test_a_name_is_torchvisions_network(name: str) -> None:
    component = getattr(networks, MODELS[name])()
    assert component.model_name == name
    if name == "preactresnet18":
        return
    with torch.device("meta"):
        ours = component.build(SPEC).state_dict()
        theirs = torchvision.models.get_model(name, weights=None, num_classes=10).state_dict()
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}


def test_preactresnet18() -> None:
    """Two blocks a stage: a first of widths v to w and a second of w to w, two norms and two 3x3 convolutions each, and
    a 1x1 shortcut where v differs from w.
    """
    network = networks.PreActResNet18().build(SPEC)
    count = 3 * 64 * 9 + 512 * 10 + 10
    for v, w in ((64, 64), (64, 128), (128, 256), (256, 512)):
        count += 2 * v + 9 * v * w + 2 * w + 9 * w * w  # the first block
        count += 2 * w + 9 * w * w + 2 * w + 9 * w * w  # the second
        count += v * w * (v != w)
    assert sum(p.numel() for p in network.parameters()) == count == 11_171_146
    names = set(network.state_dict())
    assert {"conv1.weight", "layer1.0.bn1.running_mean", "layer2.0.shortcut.0.weight", "linear.bias"} <= names
    assert not any(name.startswith("layer1.0.shortcut") for name in names)
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert network(torch.zeros(2, 3, 64, 64)).shape == (2, 10)


@parametrize_contracts(
    [networks.PreActResNet18()],
    expected_failures={
        "logits": "it takes colour images",
        "activation_used": "its activation functions are its own",
    },
)  # fmt: skip
def test_contract(contract: object) -> None:
    contract()  # type: ignore[operator]
