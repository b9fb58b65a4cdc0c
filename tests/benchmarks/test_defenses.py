"""What the defenses cost, in steps and passes of the plain kind."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import numpy as np
import torch
from bbn_defenses.abl import ABL
from bbn_defenses.ac import AC
from bbn_defenses.dp_sgd import DPSGD
from bbn_defenses.nad import attention_loss, find_blocks
from bbn_defenses.none_retrain import NONERetrain
from pytest_benchmark.fixture import BenchmarkFixture
from ratios import measure_ratio, seconds
from torch import nn
from torch.nn import functional as F

from backdoor_bench_none.contracts.architecture import ModelSpec
from backdoor_bench_none.contracts.builder import ModelBuilder
from backdoor_bench_none.contracts.context import Context, choose_amp, choose_device
from backdoor_bench_none.contracts.dataset import DatasetInfo, ImageSet
from backdoor_bench_none.contracts.defense import DefenseTask
from backdoor_bench_none.contracts.network import Pixels, predict_logits
from backdoor_bench_none.contracts.recipe import Recipe
from backdoor_bench_none.contracts.trainer import Batch
from backdoor_bench_none.inspection.hooks import record_outputs
from backdoor_bench_none.models.nin import NiN
from backdoor_bench_none.models.resnet import ResNet18
from backdoor_bench_none.trainers.centralized import Centralized

DEVICE = choose_device()


def draw_batch(count: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, 32, 32, generator=generator).to(DEVICE)
    labels = torch.randint(10, (count,), generator=generator).to(DEVICE)
    return Batch(images, labels, labels)


def make_task(count: int) -> tuple[DefenseTask, Context]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    data = ImageSet(images, torch.randint(10, (count,), generator=generator)).to(DEVICE)
    info = DatasetInfo("random", (3, 32, 32), 10, count, (0.5,) * 3, (0.25,) * 3)
    builder = ModelBuilder(ResNet18(width=0.25), ModelSpec(10, 3, 32, nn.ReLU), "key", DEVICE)
    weights = builder(0).state_dict()
    recipe = Recipe(epochs=1, batch_size=64, lr=1e-4)
    task = DefenseTask(
        train=data,
        clean=data,
        info=info,
        recipe=recipe,
        trainer=Centralized(),
        build=builder,
        victim_network=builder.load(weights),
    )
    return task, Context(DEVICE, seed=0, amp=choose_amp(DEVICE))


def test_dp_sgd_against_plain_step_and_opacus(benchmark: BenchmarkFixture) -> None:
    """NiN at a third of its width, 64 images, float32; Opacus' hooks driven by hand in its own layout."""
    from opacus import GradSampleModule

    model = NiN(width=1 / 3).build(ModelSpec(10, 3, 32, nn.ReLU)).to(DEVICE).train()
    batch, context, generator = draw_batch(64), Context(DEVICE, 0), torch.Generator(DEVICE)
    defense = DPSGD()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hooked = GradSampleModule(copy.deepcopy(model), loss_reduction="sum")

    def plain() -> None:
        model.zero_grad()
        F.cross_entropy(model(batch.images), batch.labels).backward()

    def ours() -> None:
        defense.step(model, batch, context, generator)

    def by_hand() -> None:
        hooked.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            F.cross_entropy(hooked(batch.images), batch.labels, reduction="sum").backward()
        samples = [p.grad_sample for p in hooked.parameters()]
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in samples]).norm(dim=0)
        factors = (1 / (norms + 1e-6)).clamp(max=1)
        for gradient in samples:
            torch.einsum("b,b...->...", factors, gradient)

    benchmark.extra_info["dp_sgd / plain step"] = measure_ratio(ours, plain, rounds=3)
    benchmark.extra_info["dp_sgd / opacus hooks"] = ratio = measure_ratio(ours, by_hand, rounds=3)
    benchmark.pedantic(ours, rounds=1)
    assert ratio <= 1.25


def test_clustering(benchmark: BenchmarkFixture) -> None:
    """Ten classes of 5,000 samples with 512 features, against ten plain PCAs of theirs."""
    from sklearn.decomposition import PCA

    features = np.random.default_rng(0).normal(size=(50_000, 512)).astype(np.float32)
    members = np.arange(50_000).reshape(10, 5_000)
    defense, context = AC(), Context(DEVICE, 0)
    benchmark.pedantic(lambda: [defense.cluster(features, rows, context) for rows in members], rounds=1)
    reference = seconds(lambda: [PCA(10, random_state=0).fit_transform(features[rows]) for rows in members])
    benchmark.extra_info["clustering / ten PCAs"] = benchmark.stats.stats.median / reference


def ratio_to_inference(
    benchmark: BenchmarkFixture, name: str, work: Callable[[], object], model: nn.Module, task: DefenseTask
) -> float:
    """The time of `work` in inference passes over the training images, in float32; noted as `name`."""
    pixels, single = Pixels.of(task.info, DEVICE), Context(DEVICE, 0)
    ratio = measure_ratio(work, lambda: predict_logits(model, task.train.images, pixels, single).sum().item(), rounds=3)
    benchmark.extra_info[f"{name} / inference"] = ratio
    benchmark.pedantic(work, rounds=1)
    return ratio


def test_isolation_against_inference(benchmark: BenchmarkFixture) -> None:
    task, context = make_task(2048)
    model = task.new_model()

    def isolate() -> None:
        ABL().sample_losses(model, task, context).sum().item()

    assert ratio_to_inference(benchmark, "isolation", isolate, model, task) <= 1.2


def test_scores_of_none_retrain_against_inference(benchmark: BenchmarkFixture) -> None:
    """Activations of every layer, their medians and deviations, and the sums."""
    task, context = make_task(4096)
    model = task.new_model()

    def score() -> None:
        NONERetrain().score(model, task, context).sum().item()

    assert ratio_to_inference(benchmark, "scores of none_retrain", score, model, task) <= 1.5


def test_distillation_epoch_against_its_passes(benchmark: BenchmarkFixture) -> None:
    """One epoch of the student against two forward passes and one backward per batch."""
    task, context = make_task(1024)
    student, teacher = task.victim().train(), task.victim()
    pixels = Pixels.of(task.info, DEVICE)
    batches = [pixels.normalize(part) for part in task.train.images.split(64)]
    labels = task.train.labels.split(64)
    names = find_blocks(teacher, batches[0][:2])
    taps = {name: name for name in names}

    def passes() -> None:
        for images, wanted in zip(batches, labels, strict=True):
            with context.autocast():
                with torch.no_grad():
                    teacher(images)
                loss = F.cross_entropy(student(images), wanted)
            loss.backward()

    def epoch() -> None:
        with record_outputs(teacher, taps) as taught, record_outputs(student, taps) as learned:

            def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
                with torch.no_grad():
                    teacher(batch.images)
                value = F.cross_entropy(model(batch.images), batch.labels)
                return value + sum(attention_loss(learned[name], taught[name]) for name in names)

            task.fit(student, context, loss=loss, epochs=1)

    ratio = measure_ratio(epoch, passes, rounds=3)
    benchmark.extra_info["NAD epoch / two forward, one backward"] = ratio
    benchmark.pedantic(epoch, rounds=1)
    assert ratio <= 1.3
