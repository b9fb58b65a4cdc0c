"""DP-SGD against a Python loop, Opacus, plain SGD and its own definition; the GroupNorm control."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bbn_defenses import dp_sgd
from bbn_defenses.dp_sgd import DPSGD, GroupNorm, default_chunk
from torch import Tensor, nn
from torch.nn import functional as F

from backdoor_bench_none.api import Batch, Context, ModelSpec
from backdoor_bench_none.models.resnet import ResNet18
from backdoor_bench_none.planning.plan import make_plan
from backdoor_bench_none.registry.components import Registry
from backdoor_bench_none.registry.plugins import Plugins
from backdoor_bench_none.results.store import Store
from backdoor_bench_none.run.stages import Stages

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Opacus says of its own imports
    from opacus import GradSampleModule
    from opacus.accountants import RDPAccountant
    from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

# Opacus' hooks fire on outputs whose inputs need no gradient, of which torch warns
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")

CPU = Context(torch.device("cpu"), 0)
Make = Callable[..., Any]
Gradients = dict[str, Tensor]


class Residual(nn.Module):
    """Convolutions with GroupNorm; in place where `inplace` says so, as torchvision's networks are."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = inplace
        self.stem, self.conv = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm, self.act1, self.act2 = nn.GroupNorm(2, 4), nn.ReLU(inplace), nn.ReLU(inplace)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.stem(x))
        out = self.norm(self.conv(x))
        if self.inplace:
            out += x
        else:
            out = out + x
        return self.head(self.act2(out).mean((2, 3)))


def make_network(kind: str = "residual") -> nn.Module:
    """The same weights for the same kind, whether in place or not."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        if kind == "linear":
            return nn.Sequential(nn.Flatten(), nn.Linear(72, 5), nn.Tanh(), nn.Linear(5, 3))
        return Residual(inplace=kind == "inplace")


def draw_batch(count: int = 11, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 2, 6, 6, generator=generator) * torch.linspace(0.1, 4, count)[:, None, None, None]
    return Batch(images, torch.randint(3, (count,), generator=generator), torch.arange(count))


def private_gradient(model: nn.Module, batch: Batch, seed: int = 0, **params: Any) -> Gradients:
    defense = DPSGD(**{"noise": 0.0, **params})
    defense.step(model, batch, CPU, torch.Generator().manual_seed(seed))
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def literal_gradient(model: nn.Module, batch: Batch, clip: float) -> Gradients:
    """The sum of clipped gradients over B, one sample and one parameter at a time."""
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for image, label in zip(batch.images, batch.labels, strict=True):
        model.zero_grad()
        F.cross_entropy(model(image[None]), label[None]).backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
        for name, p in model.named_parameters():
            sums[name] += p.grad * min(1.0, clip / norm)
    return {name: x / len(batch.labels) for name, x in sums.items()}


def assert_close(actual: Gradients, expected: Gradients, atol: float = 1e-6) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-5, atol=atol)


# Clipping.


@pytest.mark.parametrize("kind", ["linear", "residual", "inplace"])
@pytest.mark.parametrize("clip", [0.05, 1.0, 4.0])
@pytest.mark.parametrize("options", [{"method": "loop"}, {}, {"chunk": 1}, {"chunk": 3}, {"chunk": 100}], ids=str)
def test_a_step_without_noise_is_a_literal_loop(kind: str, clip: float, options: dict[str, Any]) -> None:
    batch = draw_batch()
    expected = literal_gradient(make_network(kind), batch, clip)
    assert_close(private_gradient(make_network(kind), batch, clip=clip, **options), expected)


@pytest.mark.parametrize("mode", ["hooks", "functorch", "ew"])
@pytest.mark.parametrize("clip", [0.05, 1.0])
def test_a_step_without_noise_is_opacus(mode: str, clip: float) -> None:
    batch, options = draw_batch(), {"noise_multiplier": 0.0, "max_grad_norm": clip, "expected_batch_size": 11}
    if mode == "ew":
        from opacus.grad_sample import GradSampleModuleExpandedWeights as Wrapped
    else:
        Wrapped = GradSampleModule  # noqa: N806
    force = {"force_functorch": True} if mode == "functorch" else {}
    model = Wrapped(make_network(), loss_reduction="sum" if mode != "ew" else "mean", **force)
    optimizer = DPOptimizer(torch.optim.SGD(model.parameters(), 0.1), loss_reduction="mean", **options)
    F.cross_entropy(model(batch.images), batch.labels, reduction="sum" if mode != "ew" else "mean").backward()
    optimizer.pre_step()
    expected = {name.removeprefix("_module."): p.grad for name, p in model.named_parameters()}
    assert_close(private_gradient(make_network(), batch, clip=clip), expected)


@pytest.mark.parametrize("clip", [0.05, 1.0])
def test_a_step_without_noise_is_opacus_ghost_clipping(clip: float) -> None:
    batch = draw_batch()  # contiguous: Opacus 1.6 measures norms of channels-last inputs wrongly
    model = GradSampleModuleFastGradientClipping(
        make_network(), max_grad_norm=clip, use_ghost_clipping=True, loss_reduction="mean"
    )
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(model.parameters(), 0.1), noise_multiplier=0.0, max_grad_norm=clip, expected_batch_size=11
    )
    criterion = DPLossFastGradientClipping(model, optimizer, nn.CrossEntropyLoss(reduction="mean"), "mean")
    criterion(model(batch.images), batch.labels).backward()
    optimizer.pre_step()
    expected = {name.removeprefix("_module."): p.grad for name, p in model.named_parameters()}
    assert_close(private_gradient(make_network(), batch, clip=clip), expected)


def test_the_layout_of_the_images_makes_no_difference() -> None:
    batch = draw_batch()
    last = replace(batch, images=batch.images.contiguous(memory_format=torch.channels_last))
    assert_close(private_gradient(make_network(), last, clip=0.1), private_gradient(make_network(), batch, clip=0.1))


@pytest.mark.parametrize("clip", [1e9, 1e30])
@pytest.mark.parametrize("unit", ["multiplier", "absolute"])
def test_without_noise_and_clipping_it_is_the_gradient_of_the_mean(clip: float, unit: str) -> None:
    model, batch = make_network(), draw_batch()
    F.cross_entropy(model(batch.images), batch.labels).backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    assert_close(private_gradient(make_network(), batch, clip=clip, noise_unit=unit), expected)


def test_a_run_without_noise_and_clipping_is_the_control(make_task: Make) -> None:
    tiny = make_task(epochs=1, momentum=0.0)
    private = DPSGD(clip=1e9, noise=0.0).run(tiny.task, CPU).model.state_dict()
    plain = GroupNorm().run(tiny.task, CPU).model.state_dict()
    for name in plain:
        torch.testing.assert_close(private[name], plain[name], rtol=1e-3, atol=1e-4)


def total_norm(gradients: Gradients) -> float:
    return math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))


@pytest.mark.parametrize("clip", [0.01, 1.0])
def test_no_samples_gradient_exceeds_the_clip(clip: float) -> None:
    batch = draw_batch(20)
    for index in range(20):
        alone = Batch(*(x[index : index + 1] for x in (batch.images, batch.labels, batch.indices)))
        whole = total_norm(private_gradient(make_network(), alone, clip=1e9))
        clipped = total_norm(private_gradient(make_network(), alone, clip=clip))
        assert clipped <= clip
        assert clipped == pytest.approx(min(whole, clip), rel=1e-3)
    assert total_norm(private_gradient(make_network(), batch, clip=clip)) <= clip


def test_a_clipped_sample_cannot_shout_louder(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = draw_batch()
    batch.labels[:] = torch.tensor([0, 1] * 5 + [2])  # the last sample alone has label 2
    before = private_gradient(make_network(), batch, clip=0.05)

    class Louder:
        @staticmethod
        def cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
            return F.cross_entropy(logits, label) * torch.where(label[0] == 2, 1000.0, 1.0)

    monkeypatch.setattr(dp_sgd, "F", Louder)
    assert_close(private_gradient(make_network(), batch, clip=0.05), before)
    unclipped = private_gradient(make_network(), batch, clip=1e9)
    assert total_norm(unclipped) > 10 * total_norm(before)  # the loss was really louder


@pytest.mark.parametrize("count", [1, 3, 8])
def test_the_divisor_is_the_size_of_the_batch_at_hand(count: int) -> None:
    batch = draw_batch(count)
    together = private_gradient(make_network(), batch, clip=0.1, chunk=2)
    rows = [Batch(*(x[i : i + 1] for x in (batch.images, batch.labels, batch.indices))) for i in range(count)]
    alone = [private_gradient(make_network(), row, clip=0.1) for row in rows]
    assert_close(together, {name: sum(g[name] for g in alone) / count for name in together})  # type: ignore[misc]


def test_a_short_last_batch_is_trained_on_with_its_own_divisor(
    make_task: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 150 samples in batches of 64 the last has 22."""
    sizes, step = [], DPSGD.step

    def spy(self: DPSGD, model: nn.Module, batch: Batch, context: Context, generator: torch.Generator) -> Tensor:
        sizes.append(len(batch.labels))
        return step(self, model, batch, context, generator)

    monkeypatch.setattr(DPSGD, "step", spy)
    DPSGD(epochs=1).run(make_task(weights={}, batch_size=64, drop_last=False).task, CPU)
    assert sizes == [64, 64, 22]


def test_the_loss_that_is_reported_is_the_mean_of_the_batch() -> None:
    model, batch = make_network(), draw_batch()
    loss = DPSGD(chunk=4).step(model, batch, CPU, torch.Generator())
    torch.testing.assert_close(loss, F.cross_entropy(model(batch.images), batch.labels).detach())


def test_frozen_parameters_get_no_gradient() -> None:
    model = make_network()
    model.stem.requires_grad_(False)
    DPSGD().step(model, draw_batch(), CPU, torch.Generator())
    assert model.stem.weight.grad is None
    assert model.head.weight.grad is not None


def test_dropout_works_in_one_batch() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(72, 3)).train()
    gradients = private_gradient(model, draw_batch(64), clip=1e9)
    assert all(torch.isfinite(g).all() for g in gradients.values())


# Noise.


@pytest.mark.parametrize(
    ("params", "deviation"),
    [({"clip": 4.0, "noise": 0.1}, 0.4), ({"clip": 1.0, "noise": 0.5}, 0.5),
     ({"clip": 4.0, "noise": 0.1, "noise_unit": "absolute"}, 0.1)],
)  # fmt: skip
def test_the_noise_has_the_deviation_that_was_asked_for(params: dict[str, Any], deviation: float) -> None:
    """Black images: the weights' own gradient is zero."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(400, 500))
    batch = Batch(torch.zeros(8, 1, 20, 20), torch.zeros(8, dtype=torch.int64), torch.arange(8))
    drawn = 8 * private_gradient(model, batch, chunk=3, **params)["1.weight"].double()
    assert drawn.numel() == 200_000
    assert drawn.std() == pytest.approx(deviation, rel=0.02)
    assert abs(drawn.mean()) < 4 * deviation / 200_000**0.5


def test_noise_is_fresh_in_every_step_and_the_same_for_a_seed() -> None:
    model, batch, defense = make_network("linear"), draw_batch(), DPSGD(noise=1.0)
    generator = torch.Generator().manual_seed(5)
    steps = []
    for _ in range(2):
        defense.step(model, batch, CPU, generator)
        steps.append(model[1].weight.grad)
    again = private_gradient(make_network("linear"), batch, seed=5, noise=1.0)["1.weight"]
    assert torch.equal(steps[0], again)
    assert not torch.equal(steps[0], steps[1])


def test_a_seed_determines_the_weights(make_task: Make) -> None:
    task = make_task(weights={}, epochs=1).task
    first, again, other = (DPSGD().run(task, replace(CPU, seed=seed)).model.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


# What it costs in privacy.


@pytest.mark.parametrize("params", [{}, {"clip": 4.0, "noise": 2.0}, {"clip": 2.0, "noise": 2.5, "delta": 1e-3}])
@pytest.mark.parametrize("unit", ["multiplier", "absolute"])
def test_epsilon_is_opacus_account(make_task: Make, params: dict[str, Any], unit: str) -> None:
    tiny = make_task(weights={}, trains=False, epochs=3)  # 3 epochs of 9 batches of 16 of 150
    defense = DPSGD(noise_unit=unit, **params)
    accountant = RDPAccountant()
    multiplier = defense.noise if unit == "multiplier" else defense.noise / defense.clip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(27):
            accountant.step(noise_multiplier=multiplier, sample_rate=16 / 150)
        expected = accountant.get_epsilon(defense.delta)
    extras = defense.run(tiny.task, CPU).extras
    assert extras == {"epsilon": pytest.approx(expected), "delta": defense.delta}
    assert math.isfinite(expected)


def test_epsilon_counts_the_epochs_and_batches_that_were_run(make_task: Make) -> None:
    task = make_task(weights={}, trains=False, epochs=3, batch_size=64, drop_last=False).task
    epsilon = DPSGD(epochs=7, noise=2.0).run(task, CPU).extras["epsilon"]
    assert epsilon == DPSGD(noise=2.0).epsilon(64 / 150, 7 * 3)
    assert epsilon != DPSGD(noise=2.0).epsilon(64 / 150, 3 * 3)


def test_without_noise_there_is_no_epsilon(make_task: Make) -> None:
    assert DPSGD(noise=0.0).run(make_task(weights={}, trains=False).task, CPU).extras["epsilon"] is None
    assert DPSGD(noise=0.0).epsilon(0.1, 10) is None


# The network and the recipe.


def test_batch_norm_is_replaced_by_groups_of_gcd_32(make_task: Make) -> None:
    spec = ModelSpec(10, 3, 16, nn.ReLU)
    for width, expected in ((0.75, {48: 16, 96: 32, 192: 32, 384: 32}), (0.1, {6: 2, 13: 1, 26: 2, 51: 1})):
        model = GroupNorm().adapt(ResNet18(width=width).build(spec))
        norms = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
        assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
        assert {norm.num_channels: norm.num_groups for norm in norms} == expected
        assert len(norms) == 20


def test_the_samples_of_a_batch_do_not_mix(make_task: Make) -> None:
    model = DPSGD().adapt(make_task(weights={}).task.new_model()).train()
    images = torch.randn(6, 1, 8, 8)
    torch.testing.assert_close(model(images)[:1], model(images[:1]), rtol=1e-4, atol=1e-5)


def test_the_convolutions_keep_their_initial_weights(make_task: Make) -> None:
    task = make_task(weights={}).task
    before, after = task.new_model(), GroupNorm().adapt(task.new_model())
    assert torch.equal(before.layer4[1].conv2.weight, after.layer4[1].conv2.weight)


def test_lr_and_epochs_are_its_own_and_gradients_are_not_clipped_once_more(make_task: Make) -> None:
    tiny = make_task(weights={}, trains=False, clip_norm=0.5, lr=0.3, epochs=9)
    DPSGD(lr=0.02, epochs=2).run(tiny.task, CPU)
    DPSGD().run(tiny.task, CPU)
    own, default = (call.recipe for call in tiny.calls)
    assert (own.lr, own.epochs, own.clip_norm) == (0.02, 2, None)
    assert (default.lr, default.epochs, default.clip_norm) == (0.3, 9, None)


@pytest.mark.parametrize("wrong", [{"clip": 0}, {"noise": -0.1}, {"delta": 0}, {"delta": 1}, {"chunk": 0}, {"lr": 0}])
def test_parameters_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DPSGD(**wrong)


BENCHMARK = """
version: 1
name: private
seeds: [1]
matrix:
  dataset: [digits]
  attack: [badnets]
  defense: [dp_sgd, {name: dp_sgd, params: {clip: 4.0, noise: 0.1}, as: dp_sgd_1}, group_norm]
  architecture: [{name: resnet18, params: {width: 0.05}, recipe: {epochs: 1}}]
"""


@pytest.mark.slow
def test_all_the_way_on_digits(tmp_path: Path) -> None:
    (tmp_path / "benchmark.yaml").write_text(BENCHMARK)
    store = Store(tmp_path / "results")
    store.create()
    plan = make_plan(tmp_path / "benchmark.yaml", Registry(Plugins(external=False)))
    records = {cell.defense.label: Stages(cell, store, CPU).evaluate() for cell in plan.cells}
    assert all(record.status == "done" and record.counts is not None for record in records.values())
    assert records["dp_sgd"].extras["epsilon"] < records["dp_sgd_1"].extras["epsilon"]
    assert "victim" not in records["dp_sgd"].costs
    assert records["dp_sgd"].warnings == []
    names = Stages(plan.cells[0], store, CPU).defense().tensors
    assert not any("running_mean" in name for name in names)


@pytest.mark.parametrize(("parameters", "samples"), [(1_000, 536_870), (11_000_000, 48), (60_000_000, 8), (10**9, 1)])
def test_per_sample_gradients_take_two_gigabytes_of_a_gpu_at_most(parameters: int, samples: int) -> None:
    sizes = [torch.empty(parameters, device="meta")]
    assert default_chunk(sizes, torch.device("cuda")) == samples
    assert default_chunk(sizes, torch.device("cpu")) == 16
