"""The training loop: schedule, determinism, samples, augmentation, failures, parameter groups."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from statistics import median

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import Normalize

from backdoor_bench_none.api import Batch, Context, DatasetInfo, FitTask, History, ImageSet, Loss, Recipe, TrainingData
from backdoor_bench_none.api import cross_entropy as plain_loss
from backdoor_bench_none.contracts import network
from backdoor_bench_none.contracts.network import Pixels, predict_logits
from backdoor_bench_none.contracts.trainer import check_learned
from backdoor_bench_none.errors import DeadlineError, TrainingError
from backdoor_bench_none.models.nin import NiN
from backdoor_bench_none.models.resnet import ResNet18
from backdoor_bench_none.trainers.centralized import Centralized

CPU = Context(torch.device("cpu"), 7)
INFO = DatasetInfo("toy", (1, 8, 8), 3, 50, (0.4,), (0.3,))
CONSTANT = Recipe(epochs=1, batch_size=10, lr=0.05, momentum=0, nesterov=False, weight_decay=0, schedule="constant")


def draw_data(count: int = 50, info: DatasetInfo = INFO) -> TrainingData:
    """Noise in which the label is a bright row."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 100, (count, *info.shape), generator=generator, dtype=torch.uint8)
    labels = torch.arange(count) % info.num_classes
    images[torch.arange(count), :, labels] += 150
    return TrainingData.of(ImageSet(images, labels), info, CPU.device)


def build(seed: int = 0, channels: int = 1, dropout: float = 0.0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(channels, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Dropout(dropout),
            nn.Linear(6 * 36, 3),
        )  # fmt: skip


def fit(
    model: nn.Module, recipe: Recipe = CONSTANT, context: Context = CPU, data: TrainingData | None = None,
    **options: object,
) -> History:  # fmt: skip
    task = FitTask(model, data or draw_data(), recipe, **options)  # type: ignore[arg-type]
    return Centralized().fit(task, context)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in model.state_dict().values()])


class Spy:
    """A loss that writes down the indices, labels and images of every batch."""

    def __init__(self, loss: Loss = plain_loss) -> None:
        self.loss, self.batches = loss, list[Batch]()

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        self.batches.append(batch)
        return self.loss(model, batch)

    @property
    def indices(self) -> list[list[int]]:
        return [batch.indices.tolist() for batch in self.batches]


# The schedule.


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"schedule": "constant"}, [1, 1, 1, 1, 1, 1, 1, 1]),
        ({"schedule": "step", "milestones": (2, 4)}, [1, 1, 0.1, 0.1, 0.1, 0.1, 0.01, 0.01]),
        ({"schedule": "step", "milestones": (1,), "gamma": 0.5}, [0.5] * 8),
        ({"schedule": "one_cycle", "warmup": 0.5}, [0.25, 0.5, 0.75, 1, 0.8, 0.6, 0.4, 0.2]),
        ({"schedule": "one_cycle", "warmup": 0}, [1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
    ],
)
def test_every_step_has_the_schedules_learning_rate(
    changes: dict[str, object], expected: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    step = torch.optim.SGD.step

    def spy(self: torch.optim.SGD, *args: object) -> object:
        seen.append(self.param_groups[0]["lr"])
        return step(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.optim.SGD, "step", spy)
    fit(build(), Recipe(**{**CONSTANT.model_dump(), "epochs": 4, "batch_size": 25, "lr": 1e-3, **changes}))
    assert seen == pytest.approx([1e-3 * value for value in expected])


def test_a_step_moves_by_lr_times_the_gradient() -> None:
    model, data = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), draw_data(10)
    before = model[1].weight.detach().clone()
    F.cross_entropy(model(data.pixels.normalize(data.images.images)), data.images.labels).backward()
    gradient = model[1].weight.grad.clone()
    fit(model, CONSTANT, data=data)
    torch.testing.assert_close(model[1].weight.detach(), before - 0.05 * gradient)


@pytest.mark.parametrize("rates", [(1, 2), (79, 80), (159, 160)])
def test_the_papers_recipe_divides_at_the_start_of_epochs_80_and_160(rates: tuple[int, int]) -> None:
    recipe = Recipe(**ResNet18().named_recipe("paper", "relu").fields)
    last, first = (recipe.lr_at((epoch - 1) * 391, 391) for epoch in rates)
    assert first / last == pytest.approx(1.0 if rates == (1, 2) else 0.1)
    assert recipe.lr_at((rates[1] - 1) * 391 - 1, 391) == last


# Determinism.


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_seed_determines_every_weight(dropout: float) -> None:
    runs = []
    for state in (1, 2):  # whatever the global generator's state is
        torch.manual_seed(state)
        model = build(dropout=dropout)
        fit(model, CONSTANT.model_copy(update={"epochs": 2}), data=draw_data(info=replace(INFO, crop_padding=1)))
        runs.append(weights(model))
    assert torch.equal(*runs)


def test_another_seed_gives_other_weights() -> None:
    models = [build(), build()]
    for seed, model in enumerate(models):
        fit(model, context=replace(CPU, seed=seed))
    assert not torch.equal(weights(models[0]), weights(models[1]))


def test_another_seed_draws_other_dropout_masks() -> None:
    models = [build(dropout=0.5), build(dropout=0.5)]
    for seed, model in enumerate(models):  # one batch of all samples: only dropout is drawn
        fit(model, CONSTANT.model_copy(update={"batch_size": 50}), context=replace(CPU, seed=seed))
    assert not torch.allclose(weights(models[0]), weights(models[1]))


def test_the_global_generator_is_left_as_found() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    fit(build(dropout=0.5))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_global_generator_is_left_as_found_by_a_failure() -> None:
    before = torch.get_rng_state()
    with pytest.raises(TrainingError):
        fit(build(dropout=0.5), loss=lambda model, batch: model(batch.images).sum() * float("nan"))
    assert torch.equal(torch.get_rng_state(), before)


# Which samples.


def test_only_kept_samples_are_trained_on() -> None:
    spy, keep = Spy(), torch.tensor([3, 8, 21, 22, 40, 49, 11])
    fit(build(), CONSTANT.model_copy(update={"epochs": 3, "batch_size": 3}), keep=keep, loss=spy)
    assert [len(batch) for batch in spy.indices] == [3] * 6
    assert set(itertools.chain(*spy.indices)) <= set(keep.tolist())
    for epoch in (spy.indices[:2], spy.indices[2:4], spy.indices[4:]):
        assert len(set(itertools.chain(*epoch))) == 6
    assert spy.indices[:2] != spy.indices[2:4]  # a new order every epoch


def test_a_batch_has_the_labels_and_images_of_its_indices() -> None:
    spy, data = Spy(), draw_data()
    fit(build(), data=data, loss=spy)
    for batch in spy.batches:
        assert torch.equal(batch.labels, data.images.labels[batch.indices])
        assert torch.equal(batch.images, data.pixels.normalize(data.images.images[batch.indices]))


@pytest.mark.parametrize(
    ("count", "drop_last", "sizes"),
    [(7, True, [7]), (10, True, [10]), (25, True, [10, 10]), (25, False, [10, 10, 5]), (20, False, [10, 10])],
)
def test_an_incomplete_batch_is_left_out_unless_it_is_the_only_one(
    count: int, drop_last: bool, sizes: list[int]
) -> None:
    spy, model = Spy(), build()
    before = weights(model)
    history = fit(model, CONSTANT.model_copy(update={"drop_last": drop_last}), data=draw_data(count), loss=spy)
    assert [len(batch) for batch in spy.indices] == sizes
    assert not torch.equal(weights(model), before)
    assert len(history.losses) == 1


def test_history_log_and_progress_tell_of_every_epoch() -> None:
    logged: list[tuple[str, float, int]] = []
    counted: list[tuple[int, int]] = []
    values: list[float] = []

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        value = plain_loss(model, batch)
        values.append(value.item())
        return value

    context = replace(CPU, log=lambda *x: logged.append(x), progress=lambda *x: counted.append(x))
    history = fit(build(), CONSTANT.model_copy(update={"epochs": 2, "batch_size": 25}), context, loss=loss)
    assert history.losses == pytest.approx([sum(values[:2]) / 2, sum(values[2:]) / 2])
    assert logged == [("loss", history.losses[0], 0), ("loss", history.losses[1], 1)]
    assert counted == [(1, 2), (2, 2)]


def test_the_model_learns_and_ends_in_eval_mode() -> None:
    accuracies, data = [], draw_data()
    for seed in range(5):
        model = build(seed)
        history = fit(model, CONSTANT.model_copy(update={"epochs": 8}), replace(CPU, seed=seed), data)
        check_learned(history, 3)
        assert not any(module.training for module in model.modules())
        logits = predict_logits(model, data.images.images, data.pixels, CPU)
        accuracies.append(float((logits.argmax(1) == data.images.labels).float().mean()))
    assert median(accuracies) > 0.95  # measured: 1.0 for every seed


# Pixels.


@pytest.mark.parametrize("channels", [1, 3])
def test_normalisation_is_torchvisions(channels: int) -> None:
    mean, std = (0.49, 0.48, 0.44)[:channels], (0.2, 0.19, 0.3)[:channels]
    images = torch.arange(256, dtype=torch.uint8).reshape(-1, 1, 8, 8).repeat(1, channels, 1, 1)
    normalized = Pixels.of(replace(INFO, mean=mean, std=std), CPU.device).normalize(images)
    assert normalized.dtype == torch.float32
    torch.testing.assert_close(normalized, Normalize(mean, std)(images / 255), rtol=1e-5, atol=1e-6, check_stride=False)


def crops(image: Tensor, padding: int, flip: bool) -> set[bytes]:
    """Every crop of the zero-padded image, and its mirror images."""
    side = image.shape[-1]
    padded = F.pad(image, (padding,) * 4)
    cropped = [
        padded[:, top : top + side, left : left + side]
        for top in range(2 * padding + 1)
        for left in range(2 * padding + 1)
    ]
    return {crop.numpy().tobytes() for x in cropped for crop in ([x, x.flip(-1)] if flip else [x])}


def draw_augmented(images: Tensor, padding: int, flip: bool) -> Tensor:
    """What a training step sees of uint8 `images`, in their order, with the normalisation undone."""
    info = replace(INFO, mean=(0.0,) * images.shape[1], std=(1.0,) * images.shape[1], crop_padding=padding, flip=flip)
    data = TrainingData.of(ImageSet(images, torch.zeros(len(images), dtype=torch.int64)), info, CPU.device)
    spy = Spy()
    recipe = CONSTANT.model_copy(update={"batch_size": len(images)})
    fit(nn.Sequential(nn.Flatten(), nn.Linear(images[0].numel(), 3)), recipe, data=data, loss=spy)
    (batch,) = spy.batches
    return (batch.images[batch.indices.argsort()] * 255).round().to(torch.uint8).contiguous()


@pytest.mark.parametrize(
    ("padding", "flip", "channels", "reachable"),
    [(4, True, 1, 162), (4, False, 1, 81), (0, True, 3, 2), (2, True, 3, 50)],
)
def test_augmented_images_are_exactly_the_reachable_ones(
    padding: int, flip: bool, channels: int, reachable: int
) -> None:
    image = torch.arange(64 * channels, dtype=torch.uint8).reshape(channels, 8, 8) + 1
    candidates = crops(image, padding, flip)
    assert len(candidates) == reachable
    drawn = draw_augmented(image.repeat(3000, 1, 1, 1), padding, flip)
    assert {x.numpy().tobytes() for x in drawn} == candidates


def test_each_image_is_augmented_from_itself() -> None:
    images = torch.randint(1, 256, (40, 3, 8, 8), dtype=torch.uint8)
    for image, drawn in zip(images, draw_augmented(images, 4, flip=True), strict=True):
        assert drawn.numpy().tobytes() in crops(image, 4, flip=True)


def test_half_of_the_images_are_flipped() -> None:
    images = torch.arange(8, dtype=torch.uint8).repeat(2000, 1, 8, 1)
    drawn = draw_augmented(images, 0, flip=True)
    assert (drawn[:, 0, 0, 0] == 7).float().mean() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(("bears", "recipe"), [(False, True), (True, False)])
def test_no_augmentation_unless_data_and_recipe_want_it(bears: bool, recipe: bool) -> None:
    spy = Spy()
    data = draw_data(info=replace(INFO, crop_padding=4 * bears, flip=bears))
    fit(build(), CONSTANT.model_copy(update={"augment": recipe}), data=data, loss=spy)
    for batch in spy.batches:
        assert torch.equal(batch.images, data.pixels.normalize(data.images.images[batch.indices]))


def test_augmentation_differs_between_epochs_and_leaves_the_data_alone() -> None:
    spy = Spy()
    data = draw_data(10, replace(INFO, crop_padding=4, flip=True))
    before = data.images.images.clone()
    fit(build(), CONSTANT.model_copy(update={"epochs": 2}), data=data, loss=spy)
    first, second = (batch.images[batch.indices.argsort()] for batch in spy.batches)
    assert not torch.equal(first, second)
    assert torch.equal(data.images.images, before)


@pytest.mark.parametrize("channels", [1, 3])
def test_training_works_on_grey_and_coloured_images(channels: int) -> None:
    mean, std = (0.4,) * channels, (0.3,) * channels
    data = draw_data(info=replace(INFO, shape=(channels, 8, 8), mean=mean, std=std, flip=True))
    ratios = []
    for seed in range(5):
        model, context = build(seed, channels=channels), replace(CPU, seed=seed)
        losses = fit(model, CONSTANT.model_copy(update={"epochs": 3}), context, data).losses
        ratios.append(losses[-1] / losses[0])
    assert median(ratios) < 0.5  # measured: 0.07 to 0.18, medians 0.11 (grey) and 0.07


# Failures.


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_an_error(value: float) -> None:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return plain_loss(model, batch) * (value if 0 in batch.indices else 1.0)

    with pytest.raises(TrainingError, match="epoch 1"):
        fit(build(), CONSTANT.model_copy(update={"epochs": 2}), loss=loss)


@pytest.mark.parametrize(("last", "learned"), [(1.0986, False), (1.09, False), (9.0, False), (1.07, True), (0.1, True)])
def test_the_loss_of_guessing_is_an_error(last: float, learned: bool) -> None:
    history = History([0.5, last])
    if learned:
        check_learned(history, 3)
    else:
        with pytest.raises(TrainingError, match="chance"):
            check_learned(history, 3)


def test_a_passed_deadline_stops_training_after_the_epoch() -> None:
    counted: list[int] = []
    context = replace(CPU, deadline=time.monotonic() - 1, progress=lambda done, total: counted.append(done))
    with pytest.raises(DeadlineError):
        fit(build(), CONSTANT.model_copy(update={"epochs": 5}), context)
    assert counted == [1]


def test_a_deadline_ahead_does_nothing() -> None:
    fit(build(), context=replace(CPU, deadline=time.monotonic() + 3600))


def test_a_network_without_a_layer_has_no_head_to_train_at_another_rate() -> None:
    with pytest.raises(TrainingError, match="no convolution"):
        fit(nn.Sequential(nn.Flatten(), nn.PReLU()), CONSTANT.model_copy(update={"head_lr_factor": 0.1}))


# Predicting.


@pytest.mark.parametrize("grad", [True, False])
def test_predicting_is_in_eval_mode_and_leaves_the_grad_mode_as_found(grad: bool) -> None:
    model, data = build(dropout=0.9).train(), draw_data()
    statistics = model[1].running_mean.clone()
    with torch.set_grad_enabled(grad):
        logits = predict_logits(model, data.images.images, data.pixels, CPU)
        assert torch.is_grad_enabled() == grad
    expected = model.eval()(data.pixels.normalize(data.images.images))
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected.detach())
    assert torch.equal(model[1].running_mean, statistics)


@pytest.mark.parametrize("batch_size", [1, 7, 50])
def test_predictions_do_not_depend_on_the_batch_size(batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = build(), draw_data()
    expected = predict_logits(model, data.images.images, data.pixels, CPU)
    split = network.iterate_normalized
    monkeypatch.setattr(network, "iterate_normalized", lambda images, pixels: split(images, pixels, batch_size))
    torch.testing.assert_close(predict_logits(model, data.images.images, data.pixels, CPU), expected)


def test_more_images_than_fit_one_batch_are_predicted_in_order() -> None:
    images = torch.arange(1300).remainder(251).to(torch.uint8)[:, None, None, None].expand(-1, 1, 8, 8)
    pixels = Pixels.of(replace(INFO, mean=(0.0,), std=(1.0,)), CPU.device)
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    means = predict_logits(model, images, pixels, CPU)
    torch.testing.assert_close(means[:, 0], images[:, 0, 0, 0] / 255)


# Frozen norms, clipping, parameter groups.


@pytest.mark.parametrize("frozen", [True, False])
def test_freezing_batch_norm_keeps_its_statistics_and_trains_its_scale(frozen: bool) -> None:
    model = build()
    norm = model[1]
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    fit(model, CONSTANT.model_copy(update={"epochs": 2}), freeze_batchnorm=frozen)
    changed = {name for name, tensor in norm.state_dict().items() if not torch.equal(before[name], tensor)}
    assert changed == {"weight", "bias"} | (set() if frozen else {"running_mean", "running_var", "num_batches_tracked"})


def test_freezing_batch_norm_leaves_dropout_on() -> None:
    modes: list[tuple[bool, bool]] = []

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        modes.append((model[1].training, model[4].training))
        return plain_loss(model, batch)

    fit(build(dropout=0.5), loss=loss, freeze_batchnorm=True)
    assert set(modes) == {(False, True)}


@pytest.mark.parametrize("clip", [1e-3, 0.5])
def test_clipping_bounds_the_update(clip: float) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    before = weights(model)
    fit(model, CONSTANT.model_copy(update={"clip_norm": clip}), data=draw_data(10),
        loss=lambda model, batch: 1000 * plain_loss(model, batch))  # fmt: skip
    assert (weights(model) - before).norm() == pytest.approx(0.05 * clip, rel=1e-3)


def test_a_small_gradient_is_not_clipped() -> None:
    models = [nn.Sequential(nn.Flatten(), nn.Linear(64, 3)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, clip in zip(models, (None, 1e6), strict=True):
        fit(model, CONSTANT.model_copy(update={"clip_norm": clip}), data=draw_data(10))
    assert torch.equal(weights(models[0]), weights(models[1]))


class Hand(nn.Module):
    """A hidden layer and a head, all parameters 2; the loss below gives every one the gradient 1."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Conv2d(1, 2, 1), nn.Linear(2, 3)
        for parameter in self.parameters():
            nn.init.constant_(parameter, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.hidden(x).mean((2, 3)))
        return logits


def one_step(**changes: object) -> dict[str, float]:
    """How much one step lowers each parameter, for lr 0.1."""
    model = Hand()
    recipe = Recipe(**{**CONSTANT.model_dump(), "lr": 0.1, **changes})
    fit(model, recipe, data=draw_data(10), loss=lambda model, batch: sum(p.sum() for p in model.parameters()))
    for parameter in model.parameters():
        assert bool((parameter == parameter.flatten()[0]).all())
    return {name: 2.0 - parameter.detach().flatten()[0].item() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (0.1, 0.1, 0.1, 0.1)),
        ({"weight_decay": 0.5}, (0.2, 0.2, 0.2, 0.2)),
        ({"bias_lr_factor": 2.0, "weight_decay": 0.5}, (0.2, 0.2, 0.2, 0.2)),
        ({"bias_lr_factor": 3.0, "weight_decay": 0.5}, (0.2, 0.3, 0.2, 0.3)),
        ({"head_lr_factor": 0.1, "weight_decay": 0.5}, (0.2, 0.2, 0.02, 0.02)),
    ],
)
def test_parameter_groups(changes: dict[str, object], expected: tuple[float, ...]) -> None:
    steps = one_step(**changes)
    assert tuple(steps) == ("hidden.weight", "hidden.bias", "head.weight", "head.bias")
    assert tuple(steps.values()) == pytest.approx(expected, abs=1e-5)


def test_parameter_groups_of_the_papers_recipe_for_nin() -> None:
    """Released code: weights 1 x lr and decay 1e-4, biases 2 x lr
    without decay; the last layer 0.1 x lr, weight and bias.
    """
    recipe = {**NiN().named_recipe("paper", "relu").fields, "epochs": 1, "batch_size": 10, "weight_decay": 0.5}
    assert (recipe["momentum"], NiN().named_recipe("paper", "relu").fields["weight_decay"]) == (0.95, 1e-4)
    expected = {"hidden.weight": 0.2, "hidden.bias": 0.2, "head.weight": 0.02, "head.bias": 0.01}
    assert one_step(**recipe) == pytest.approx(expected, abs=1e-5)


def test_momentum_and_nesterov_reach_the_optimizer() -> None:
    steps = {}
    for nesterov in (False, True):
        model = Hand()
        changes = {"momentum": 0.5, "nesterov": nesterov, "epochs": 2, "lr": 0.1}
        fit(model, CONSTANT.model_copy(update=changes), data=draw_data(10),
            loss=lambda model, batch: sum(p.sum() for p in model.parameters()))  # fmt: skip
        steps[nesterov] = 2.0 - model.head.bias[0].item()
    assert steps == pytest.approx({False: 0.1 * (1 + 1.5), True: 0.1 * (1.5 + 1.75)})


def test_a_frozen_parameter_stays() -> None:
    model = build()
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    fit(model, CONSTANT.model_copy(update={"weight_decay": 0.1}))
    assert torch.equal(model[0].weight, before)
