"""The contract kit on the real record and on the toolbox's networks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from backdoor_bench_none.api import Cell, Component, ModelSpec
from backdoor_bench_none.testing import parametrize_contracts
from backdoor_bench_none.testing.bench import Bench
from backdoor_bench_none.testing.checks import run_check
from backdoor_bench_none.testing.contracts import checks_for
from bbn_backdoorbench import networks
from bbn_backdoorbench.attack import BackdoorBenchRecord
from bbn_backdoorbench.datasets import Arrays


class RecordBench(Bench):
    """Cells with the clean images and the network of a record."""

    def __init__(self, images: Path) -> None:
        super().__init__()
        self.images = images

    def cell(self, **under_test: Component) -> Cell:
        given: dict[str, Component] = {"dataset": Arrays(path=self.images), "architecture": networks.SqueezeNet10()}
        return super().cell(**{**given, **under_test})


def test_the_real_record_keeps_the_contract_of_attacks(real_record: Path, real_npz: Path) -> None:
    """But for previews: a record holds triggered images, and no trigger to show on others."""
    attack, bench = BackdoorBenchRecord(record=real_record), RecordBench(real_npz)
    verdicts = [run_check(check, attack, bench) for check in checks_for(attack)]
    assert len(verdicts) == 18
    failed = {verdict.check: verdict.reason for verdict in verdicts if verdict.reason}
    assert failed.keys() == {"preview", "inputs_unchanged"}
    assert all("a record holds triggered images, not the trigger" in str(reason) for reason in failed.values())


@parametrize_contracts(
    [networks.SqueezeNet10(), networks.MobileNetV3Large(), networks.ShuffleNetV2(), networks.ResNet18()],
    expected_failures={
        "logits": "they take colour images",
        "activation_used": "their activation functions are their own",
    },
)  # fmt: skip
def test_contract(contract: object) -> None:
    contract()  # type: ignore[operator]


def norm(x: torch.Tensor, weights: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    mean, var, scale, shift = (weights[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(x, mean, var, scale, shift)


@pytest.mark.parametrize("side", [32, 64])
def test_preactresnet18_computes_what_its_weights_say(side: int) -> None:
    """Written again from the weights alone: activation before convolution, the shortcut's input activated too."""
    torch.manual_seed(0)
    network = networks.PreActResNet18().build(ModelSpec(10, 3, 32, nn.ReLU))
    images = torch.rand(4, 3, side, side)
    with torch.no_grad():
        network.train()(images)  # so that the norms have something to do
        weights = network.eval().state_dict()
        x = F.conv2d(images, weights["conv1.weight"], padding=1)
        for stage, first_stride in ((1, 1), (2, 2), (3, 2), (4, 2)):
            for block, stride in ((0, first_stride), (1, 1)):
                name = f"layer{stage}.{block}"
                active = F.relu(norm(x, weights, f"{name}.bn1"))
                shortcut = weights.get(f"{name}.shortcut.0.weight")
                kept = x if shortcut is None else F.conv2d(active, shortcut, stride=stride)
                y = F.conv2d(active, weights[f"{name}.conv1.weight"], stride=stride, padding=1)
                y = F.relu(norm(y, weights, f"{name}.bn2"))
                x = F.conv2d(y, weights[f"{name}.conv2.weight"], padding=1) + kept
        expected = F.linear(x.mean((2, 3)), weights["linear.weight"], weights["linear.bias"])
        assert torch.allclose(network(images), expected, rtol=1e-4, atol=1e-5)
