"""What single methods of BackdoorBench need, skip or return, on a stand-in checkout that speaks their files."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from standins import MODEL, Said
from torch.nn import functional as F

from backdoor_bench_none.api import BenchError, ModelSpec, Record, Store
from bbn_backdoorbench.networks import MobileNetV3Large, PreActResNet18
from bbn_backdoorbench.toolbox import NPD

Bbn = Callable[..., Said]
Write = Callable[..., Path]
Evaluate = Callable[..., dict[str, Record]]
SPEC = ModelSpec(10, 3, 32, torch.nn.ReLU)


def defense(script: str, params: str = "{}") -> str:
    return f'{{name: "backdoorbench:{script}", params: {params}, as: method}}'


def returned(record: Record) -> dict[str, torch.Tensor]:
    """The weights of the network that a defense returned."""
    artifact = Store(Path("results")).load_artifact("defense", str(record.upstream["defense"]))
    assert artifact is not None
    return {name[6:]: tensor for name, tensor in artifact.tensors.items() if name.startswith("model.")}


@pytest.fixture
def network() -> torch.nn.Module:
    """An untrained preactresnet18 of the toolbox."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return PreActResNet18().build(SPEC).eval()


@pytest.fixture
def preact_benchmark(network: torch.nn.Module, write_record: Write, write_benchmark: Write) -> Callable[[str], Path]:
    """Writes a benchmark of one defense on a record of that network."""

    def write(one: str) -> Path:
        record = write_record(lambda raw: raw.update(model_name="preactresnet18", model=network.state_dict()))
        return write_benchmark(record, defense=one, architecture='"backdoorbench:preactresnet18"')

    return write


@pytest.fixture
def mobile_benchmark(write_record: Write, write_benchmark: Write) -> Callable[[str], Path]:
    """Writes a benchmark of one defense on a record of the cheapest network for which ep and bnp have code."""

    def write(one: str) -> Path:
        weights = MobileNetV3Large().build(SPEC).state_dict()
        record = write_record(lambda raw: raw.update(model_name="mobilenet_v3_large", model=weights))
        return write_benchmark(record, defense=one, architecture='"backdoorbench:mobilenet_v3_large"')

    return write


@pytest.mark.parametrize(
    ("script", "networks"),
    [
        ("anp", "preactresnet18, vgg19_bn, densenet161, mobilenet_v3_large, efficientnet_b3, convnext_tiny"),
        ("bnp", "preactresnet18, vgg19_bn, densenet161, mobilenet_v3_large, efficientnet_b3, convnext_tiny"),
        ("ep", "preactresnet18, vgg19_bn, densenet161, mobilenet_v3_large, efficientnet_b3, convnext_tiny"),
        ("rnp", "preactresnet18, vgg19, vgg19_bn"),
        ("npd", "preactresnet18"),
        ("nad", "preactresnet18, vgg19, vgg19_bn, densenet161, mobilenet_v3_large, efficientnet_b3, convnext_tiny, "
                "resnet18"),
    ],
)  # fmt: skip
def test_a_method_without_code_for_the_network_is_skipped_in_the_plan(
    script: str, networks: str, write_record: Write, write_benchmark: Write, bbn: Bbn
) -> None:
    said = bbn("plan", write_benchmark(write_record(), defense=defense(script)))
    assert said.code == 0, said.err
    assert f"skipped     1: BackdoorBench's {script} has no code for {MODEL}, only for {networks}\n" in said.out


@pytest.mark.parametrize("script", ["anp", "bnp", "ep", "rnp", "npd", "nad", "ac", "spectral", "ft"])
def test_a_method_with_code_for_the_network_is_planned(
    script: str, preact_benchmark: Callable[[str], Path], bbn: Bbn
) -> None:
    said = bbn("plan", preact_benchmark(defense(script)))
    assert said.code == 0, said.err
    assert "skipped" not in said.out
    assert "to do       1 cell" in said.out


def test_a_network_of_ours_is_skipped_in_the_plan(write_benchmark: Write, bbn: Bbn) -> None:
    attack = "{name: badnets, params: {trigger_kind: static, poison_rate: 0.2}}"
    mlp = "{name: mlp, params: {hidden: 8, depth: 1}}"
    said = bbn("plan", write_benchmark(attack=attack, defense=defense("ft"), architecture=mlp))
    assert "skipped     1: BackdoorBench's ft needs a network and a data set of BackdoorBench" in said.out


@pytest.mark.slow
def test_ep_takes_no_clean_data_and_finds_its_moved_package(
    checkout: Callable[..., Path], mobile_benchmark: Callable[[str], Path], evaluate: Evaluate
) -> None:
    """The stand-in's package imports itself as that of the toolbox does, by the name of a folder that is not there."""
    package = checkout("ep", "ep") / "utils" / "defense_utils" / "dde" / "dde_model"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("class Norm: pass\nfrom .conv_dde import *\n")
    (package / "conv_dde.py").write_text("from defense.dde import dde_model\nclass Convolution(dde_model.Norm): pass\n")
    record = evaluate(mobile_benchmark(defense("ep")))["method"]
    assert record.status == "done"
    assert record.clean_fraction == 0


def test_ep_refuses_a_share_of_clean_data(preact_benchmark: Callable[[str], Path], bbn: Bbn) -> None:
    said = bbn("plan", preact_benchmark(defense("ep", "{clean_fraction: 0.05}")))
    assert said.code == 2
    assert "clean_fraction" in said.err


@pytest.mark.slow
def test_bnp_is_given_its_share_of_clean_data(
    checkout: Callable[..., Path], mobile_benchmark: Callable[[str], Path], evaluate: Evaluate
) -> None:
    checkout("bnp", "bnp")
    record = evaluate(mobile_benchmark(defense("bnp")))["method"]
    assert (record.status, record.clean_fraction) == ("done", 0.05)


def test_a_method_that_returns_the_victim_says_so(
    checkout: Callable[..., Path],
    real_record: Path,
    real_npz: Path,
    write_benchmark: Write,
    evaluate: Evaluate,
    bbn: Bbn,
) -> None:
    """On the record of an unmodified BackdoorBench, whose network has 118 of 297 clean test images right."""
    checkout("the victim", "nc")
    path = write_benchmark(real_record, images=real_npz, defense=defense("nc"))
    record = evaluate(path)["method"]
    assert record.counts is not None
    assert record.counts.benign_accuracy.hits == 118
    assert record.extras["result"] == "returned network equals the victim"
    assert "returned network equals the victim" in bbn("results", "show", record.key).out


@pytest.mark.slow
def test_a_method_that_changes_the_network_has_no_such_note(
    checkout: Callable[..., Path], write_record: Write, write_benchmark: Write, evaluate: Evaluate
) -> None:
    checkout("fine", "nc")
    assert evaluate(write_benchmark(write_record(), defense=defense("nc")))["method"].extras == {}


@pytest.mark.slow
def test_the_masks_that_fp_leaves_are_applied(
    checkout: Callable[..., Path],
    weights: dict[str, torch.Tensor],
    write_record: Write,
    write_benchmark: Write,
    evaluate: Evaluate,
) -> None:
    checkout("masks", "fp")
    record = evaluate(write_benchmark(write_record(), defense=defense("fp")))["method"]
    pruned = returned(record)["classifier.1.weight"]
    assert torch.equal(pruned[:, 1::2], weights["classifier.1.weight"][:, 1::2])
    assert not pruned[:, ::2].any()


@pytest.mark.slow
def test_the_layer_of_npd_is_put_into_the_victim(
    checkout: Callable[..., Path],
    network: torch.nn.Module,
    preact_benchmark: Callable[[str], Path],
    evaluate: Evaluate,
) -> None:
    """The network computes what the victim does where a hook changes the input of the target layer."""
    checkout("the victim and a layer", "npd")
    record = evaluate(preact_benchmark(defense("npd")))["method"]
    assert record.extras["result"] == "defense_result.pt holds the victim; the layer of plug_layer.pt is put into it"
    defended = NPD().adapt(PreActResNet18().build(SPEC)).eval()
    defended.load_state_dict(returned(record))
    with torch.random.fork_rng():
        # in the stand-in's order
        torch.manual_seed(1)
        scale, shift, mean, variance = (torch.rand(512) for _ in range(4))
        weight = torch.randn(512, 512, 1, 1) / 10
        images = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        before = network(images)
        network.get_submodule("layer4.1.conv1").register_forward_pre_hook(
            lambda _, inputs: F.batch_norm(F.conv2d(inputs[0], weight), mean, variance + 0.5, scale, shift)
        )
        assert torch.allclose(defended(images), network(images), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(defended(images), before, rtol=0.1)


@pytest.mark.slow
def test_npd_without_its_layer_has_no_result(
    checkout: Callable[..., Path], preact_benchmark: Callable[[str], Path], evaluate: Evaluate
) -> None:
    """Where the numbers of the victim would be reported as its own."""
    checkout("the victim", "npd")
    with pytest.raises(BenchError, match=r"defense/npd\.py ended without writing plug_layer\.pt"):
        evaluate(preact_benchmark(defense("npd")))


@pytest.mark.parametrize(
    ("params", "fault"),
    [
        ("{plug: mlp}", "plug"),
        ("{options: {model_name: onlyconv}}", "model_name is not an option here: use the parameter plug"),
        ("{options: {use_residual: 'yes'}}", "use_residual is not an option here"),
    ],
)
def test_layers_of_npd_that_are_not_rebuilt_are_refused_in_the_file(
    params: str, fault: str, preact_benchmark: Callable[[str], Path], bbn: Bbn
) -> None:
    said = bbn("plan", preact_benchmark(defense("npd", params)))
    assert said.code == 2
    assert fault in said.err
    assert "benchmark.yaml:" in said.err


def test_a_layer_that_is_not_there_is_named_before_anything_is_started(
    preact_benchmark: Callable[[str], Path], evaluate: Evaluate
) -> None:
    """There is not even a checkout here, which would be the first thing to miss."""
    with pytest.raises(BenchError, match=r"the network has no convolution layer9\.conv1 for NPD"):
        evaluate(preact_benchmark(defense("npd", "{target_layer: layer9.conv1}")))


def test_i_bau_is_refused_on_a_cpu_before_anything_is_started(
    write_record: Write, write_benchmark: Write, evaluate: Evaluate
) -> None:
    """As above."""
    with pytest.raises(BenchError, match=r"BackdoorBench's i-bau runs on CUDA only") as fault:
        evaluate(write_benchmark(write_record(), defense=defense("i-bau")))
    assert "--device cuda" in str(fault.value.hint)


@pytest.mark.slow
def test_a_package_that_a_script_lacks_is_named_with_where_to_put_it(
    checkout: Callable[..., Path], write_record: Write, write_benchmark: Write, evaluate: Evaluate
) -> None:
    checkout("lacks a package")
    with pytest.raises(BenchError, match="No module named 'pkg_resources_of_old'") as fault:
        evaluate(write_benchmark(write_record(), defense=defense("ft")))
    assert "BBN_BACKDOORBENCH_PYTHON" in str(fault.value.hint)


def test_the_shim_brings_back_what_numpy_and_torch_removed(bbn: Bbn, tmp_path: Path) -> None:
    """For scripts that the user starts too, such as attack/wanet.py, which draws plots with np.infty."""
    said = bbn("backdoorbench", "shim")
    assert said.code == 0
    environment: dict[str, Any] = {**os.environ, "PYTHONPATH": said.out.strip()}
    code = (
        "import numpy as np, torch; assert np.infty > 0 and np.float(3) == 3\n"
        "assert iter(torch.utils.data.DataLoader([7])).next() == 7"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
