"""Natural Trojans (ABS, Liu et al., 2019): nothing is planted; a trigger is reverse-engineered from each network."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
import torch.nn as nn
from pydantic import Field

from backdoor_bench_none.api import (
    Attack,
    ConfigError,
    Context,
    DatasetInfo,
    FoundTriggers,
    ImageSet,
    Pixels,
    SearchTask,
    find_layers,
    inference_batch,
    record_outputs,
)

if TYPE_CHECKING:
    from torch import Tensor

#: multiples of a neuron's largest value that it is set to, besides 0 (three of the four of the released code work)
ELEVATIONS = (0.5, 1.0)
#: a network that gives more than this share of clean images one label is not searched
CONSTANT = 0.99
#: a mask is on where it is larger than this (m ** 2 > 0.01 in the released code)
ON = 0.1


@dataclass(frozen=True)
class Candidate:
    """A neuron that drives images to a label when it is set high.

    Candidates are ranked by `lead`, the smallest lead of the label over the runner-up.
    """

    neuron: int
    label: int
    lead: float


class Natural(Attack):
    """Searches every finished network, defended or not, for small patches that drive all classes to one label.

    Neurons of the last hidden layer that favour one label when they are set high are candidates; for each, mask and
    pattern of a patch are optimised to make the neuron and the label's logit large, once per area of Table 2. ASR is
    the REASR of all areas taken together; for areas without a trigger no image counts as a hit.

    NONE's code differs: it draws the search images from the test set, adds patterns to normalised pixels (so that they
    stay in 114..177) and swaps red and blue when it saves them. Here training images are searched, patterns span
    0..255, colours stay, the best candidate is chosen on training images, and at most 1.2 times the area is kept.
    """

    paper: ClassVar[str] = "NONE, Table 2; doi:10.1145/3319535.3363216"
    poisons: ClassVar[bool] = False
    searches: ClassVar[bool] = True

    areas: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        (0.02, 0.04, 0.06, 0.08, 0.10, 0.12), min_length=1, description="areas of the patch, as shares of the image"
    )
    max_candidates: int = Field(10, ge=1, description="highest number of neurons to search from, one for each label")
    agreement: float = Field(
        0.9, gt=0, le=1, description="share of the images on which a candidate's label must gain most"
    )
    sampled_per_class: int = Field(20, ge=1, description="images of each class to find candidates with")
    searched_per_class: int = Field(24, ge=1, description="images of each class to optimise on, and to choose with")
    epochs: int = Field(50, ge=1, description="passes over the search images for each candidate and area")
    batch_size: int = Field(80, ge=1, description="images per step")
    lr: float = Field(0.1, gt=0, description="Adam's learning rate")

    def check(self, info: DatasetInfo) -> None:
        """Check that every area is at least one pixel."""
        pixels = info.shape[1] * info.shape[2]
        if min(self.areas) * pixels < 1:
            raise ConfigError(
                f"natural: an area of {min(self.areas):g} is less than one of the {pixels} pixels of {info.name}",
                f"use at least {1 / pixels:.2g}",
            )

    def find_triggers(self, task: SearchTask, context: Context) -> FoundTriggers:
        """One trigger for each area, or none, with facts about the search."""
        sampled = take_of_each_class(task.train, task.info.num_classes, 0, self.sampled_per_class)
        per_class = self.searched_per_class
        searched, chooser = (
            take_of_each_class(task.train, task.info.num_classes, start, per_class) for start in (0, per_class)
        )
        search = _Search(self, task, context)
        predicted = task.predict(sampled.images, context).argmax(1)
        if int(predicted.bincount().max()) > CONSTANT * len(predicted):
            return self._nothing(task.info, "the network gives nearly all images one label")
        candidates = search.find_candidates(sampled)
        if not candidates:
            return self._nothing(task.info, "no neuron favours one label on enough images")
        results = []
        for index, area in enumerate(self.areas):
            results.append(search.best_trigger(candidates, area, searched, chooser))
            context.progress(index + 1, len(self.areas))
        masks, patterns, labels, facts = zip(*results, strict=True)
        return FoundTriggers(torch.stack(masks), torch.stack(patterns), torch.tensor(labels), facts)

    def _nothing(self, info: DatasetInfo, why: str) -> FoundTriggers:
        count = len(self.areas)
        facts = tuple({"area": area, "note": why} for area in self.areas)
        empty = torch.zeros(count, 1, *info.shape[1:])
        return FoundTriggers(empty, torch.zeros(count, *info.shape), torch.full((count,), -1), facts)


class _Search:
    """The trigger search in one network."""

    def __init__(self, attack: Natural, task: SearchTask, context: Context) -> None:
        self.attack, self.task, self.context = attack, task, context
        self.model = task.model.eval().requires_grad_(False)
        self.pixels = Pixels.of(task.info, context.device)
        layers = find_layers(self.model, self.pixels.normalize(task.train.images[:1].to(context.device)))
        if not layers:
            raise ConfigError("natural: the network has no hidden convolution or linear layer to search")
        self.layer = layers[-1]
        self.tap = self.layer.tap("pre_activation")

    # candidates

    def find_candidates(self, sampled: ImageSet) -> list[Candidate]:
        """The best neuron of each label, the best labels first; without gradients."""
        with torch.no_grad():
            return self._find_candidates(sampled)

    def _find_candidates(self, sampled: ImageSet) -> list[Candidate]:
        images = self.pixels.normalize(sampled.images.to(self.context.device))
        labels = sampled.labels.to(self.context.device)
        with record_outputs(self.model, {"layer": self.tap}) as seen:
            self.model(images[:1])
            neurons = seen["layer"].shape[1]
            highest = self._highest(images, seen)
        per_pass = max(1, inference_batch(images) // len(images))
        still = self._logits_with(images, torch.arange(neurons), highest, 0.0, per_pass)  # (neurons, N, K)
        gains = torch.full_like(still, -math.inf)
        for elevation in ELEVATIONS:
            raised = self._logits_with(images, torch.arange(neurons), highest, elevation, per_pass)
            gains = torch.maximum(gains, raised - still)
        top = gains.topk(2, dim=2)
        favourite, lead = top.indices[:, :, 0], top.values[:, :, 0] - top.values[:, :, 1]  # (neurons, N)
        best: dict[int, Candidate] = {}
        for candidate in agreeing_neurons(favourite, lead, labels, highest > 0, still.shape[2], self.attack.agreement):
            label = candidate.label
            if label not in best or candidate.lead > best[label].lead:
                best[label] = candidate
        return sorted(best.values(), key=lambda candidate: -candidate.lead)[: self.attack.max_candidates]

    def _highest(self, images: Tensor, seen: dict[str, Tensor]) -> Tensor:
        """The largest value of each neuron (neurons,) over `images`."""
        maxima = []
        for part in torch.split(images, inference_batch(images)):
            self.model(part)
            values = seen["layer"].clone()
            if values.ndim > 2:
                values = values.flatten(2).amax(2)
            maxima.append(values)
        return torch.cat(maxima).amax(0)

    def _logits_with(self, images: Tensor, neurons: Tensor, highest: Tensor, elevation: float, per_pass: int) -> Tensor:
        """Logits (neurons, N, K) with each neuron in turn set to `elevation` times its largest value, everywhere."""
        logits = []
        for chosen in torch.split(neurons, per_pass):
            with set_neurons(self.model, self.tap, chosen, elevation * highest[chosen], len(images)):
                output = self.model(images.repeat(len(chosen), *[1] * (images.ndim - 1)))
            logits.append(output.float().unflatten(0, (len(chosen), len(images))))
            self.context.check_deadline()
        return torch.cat(logits)

    # triggers

    def best_trigger(
        self, candidates: list[Candidate], area: float, searched: ImageSet, chooser: ImageSet
    ) -> tuple[Tensor, Tensor, int, dict[str, object]]:
        """Mask (1, H, W), pattern (C, H, W) and label of the candidate that drives most images of `chooser`."""
        best: tuple[float, Tensor, Tensor, int, Candidate] | None = None
        for candidate in candidates:
            mask, pattern, label = self.optimise(candidate, area, searched)
            share = self._share(mask, pattern, label, chooser)
            if best is None or share > best[0]:
                best = (share, mask, pattern, label, candidate)
            if label == candidate.label:  # as in the released code: the label is found, other neurons add little
                break
        assert best is not None
        share, mask, pattern, label, candidate = best
        fact = {
            "area": area, "label": label, "mask_pixels": int(mask.sum()), "neuron": candidate.neuron,
            "layer": self.layer.name, "sampled_label": candidate.label, "share_on_training_images": share,
        }  # fmt: skip
        return mask, pattern, label, fact

    def optimise(self, candidate: Candidate, area: float, searched: ImageSet) -> tuple[Tensor, Tensor, int]:
        """A binary mask, a pattern of whole levels, and the label most images get with it."""
        attack, device = self.attack, self.context.device
        channels, height, width = self.task.info.shape
        size = area * height * width
        generator = self.context.generator("pattern", candidate.neuron, area)
        delta = (torch.rand(channels, height, width, generator=generator) * 2 - 1).to(device).requires_grad_(True)
        raw_mask = initial_mask(height, width, size).to(device).requires_grad_(True)
        optimizer = torch.optim.Adam([delta, raw_mask], lr=attack.lr)
        images = searched.images.to(device)
        for epoch in range(attack.epochs):
            weight = 1.0 if epoch < attack.epochs / 2 else 3.0
            agreed = []
            order = torch.randperm(len(images), generator=self.context.generator("order", epoch)).to(device)
            for chosen in torch.split(order, attack.batch_size):
                loss, predicted = self._loss(candidate, delta, raw_mask, images[chosen], size, weight)
                agreed.append(predicted)
                if epoch:  # the first pass does not step, as in the released code
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
            self.context.check_deadline()
            if epoch and count_most_frequent(torch.cat(agreed)) > 0.99 * len(images):
                break
        mask = binary_mask(squash(raw_mask.detach()), size)
        pattern = (squash(delta.detach()) * 255).round() / 255
        stamped = self._stamp(mask, pattern, images)
        label = int(self.task.predict(stamped, self.context).argmax(1).bincount().argmax())
        return mask.cpu(), pattern.cpu(), label

    def _loss(
        self, candidate: Candidate, delta: Tensor, raw_mask: Tensor, images: Tensor, size: float, weight: float
    ) -> tuple[Tensor, Tensor]:
        """The loss and the predicted labels (B,).

        It is low where the neuron and the label's logit are large, and other neurons and the mask small.
        """
        mask = squash(raw_mask)
        levels = (1 - mask) * images + mask * squash(delta) * 255
        with record_outputs(self.model, {"layer": self.tap}, lambda module, output: output.clone()) as seen:
            logits = self.model(torch.addcmul(self.pixels.shift, levels, self.pixels.scale))
        before = after = seen["layer"]
        if self.layer.activation_module is not None:
            after = self.layer.activation_module(before)
        neuron, others = candidate.neuron, before.shape[1] - 1
        value = before[:, neuron].sum() + after[:, neuron].sum()
        rest = (before.sum() + after.sum() - value) / max(1, others)
        loss = -value + 1e-4 * rest + mask_penalty(mask, size) * mask.sum() - weight * logits[:, candidate.label].sum()
        return loss, logits.detach().argmax(1)

    def _share(self, mask: Tensor, pattern: Tensor, label: int, chooser: ImageSet) -> float:
        others = chooser.images[chooser.labels != label].to(self.context.device)
        if not len(others):
            return 0.0
        stamped = self._stamp(mask.to(others.device), pattern.to(others.device), others)
        return float((self.task.predict(stamped, self.context).argmax(1) == label).float().mean())

    def _stamp(self, mask: Tensor, pattern: Tensor, images: Tensor) -> Tensor:
        return torch.where(mask.bool(), (pattern * 255).round().to(torch.uint8), images)


def take_of_each_class(data: ImageSet, num_classes: int, start: int, count: int) -> ImageSet:
    """The images `start` to `start + count` of each class, in order; fewer where a class has fewer."""
    indices = [torch.nonzero(data.labels == label).flatten()[start : start + count] for label in range(num_classes)]
    return data.take(torch.cat(indices))


def agreeing_neurons(
    favourite: Tensor, lead: Tensor, labels: Tensor, alive: Tensor, num_classes: int, agreement: float
) -> Iterator[Candidate]:
    """The neurons, in order, that are `alive` (neurons,) bool and favour one label on a share `agreement` of images.

    `favourite` and `lead` (neurons, N) are the label that gains most and its lead over the next; `labels` (N,) are the
    images' own. All neurons are looked at in one go, since each look from the host would wait for the device.
    """
    votes = torch.stack([(favourite == label).sum(1) for label in range(num_classes)], 1)
    chosen = votes.argmax(1)  # (neurons,)
    agrees = (favourite == chosen[:, None]) & (lead > 0)
    share = agrees.float().mean(1)
    smallest = torch.where(agrees, lead, -lead).masked_fill(labels == chosen[:, None], math.inf).amin(1)
    smallest = torch.where(smallest.isposinf(), 0.0, smallest)  # no image is of another class
    columns = (alive.tolist(), chosen.tolist(), share.tolist(), smallest.tolist())
    for neuron, (is_alive, label, agreeing, least) in enumerate(zip(*columns, strict=True)):
        if is_alive and agreeing >= agreement:
            yield Candidate(neuron, label, least)


def count_most_frequent(labels: Tensor) -> int:
    """How often the most frequent of `labels` (N,) occurs."""
    ordered = labels.sort().values
    return int((torch.searchsorted(ordered, ordered, right=True) - torch.searchsorted(ordered, ordered)).max())


def mask_penalty(mask: Tensor, size: float) -> Tensor:
    """The weight () of the sum of `mask`: 0.01, 50 if it is on at more than `size` pixels, 100 at 1.2 times as many.

    It stays on the device, so that no step waits for the host.
    """
    on = (mask > 0.01).sum()
    # whole numbers on both sides: a limit of 28.999999999999996 would be 29 in float32
    weight = torch.where(on > math.floor(size), 50.0, 0.01)
    return torch.where(on > math.floor(1.2 * size), 100.0, weight)


def squash(raw: Tensor) -> Tensor:
    """tanh / 2 + 1 / 2, which maps any number to (0, 1)."""
    return raw.tanh() / 2 + 0.5


def initial_mask(height: int, width: int, size: float) -> Tensor:
    """The mask's parameters (1, H, W): 2 in a square of side int(0.8 sqrt(size)) from the centre on, -4 elsewhere."""
    side = max(1, int(0.8 * math.sqrt(size)))
    raw = torch.full((1, height, width), -4.0)
    raw[:, height // 2 : height // 2 + side, width // 2 : width // 2 + side] = 2.0
    return raw


def binary_mask(mask: Tensor, size: float) -> Tensor:
    """1 where `mask` (1, H, W) is larger than 0.1, on at most 1.2 * `size` pixels, those of its largest values."""
    limit = max(1, int(1.2 * size))
    kept = torch.zeros_like(mask).flatten()
    kept[mask.flatten().topk(min(limit, mask.numel())).indices] = 1.0
    return torch.where(mask > ON, kept.view_as(mask), 0.0)


@contextmanager
def set_neurons(model: nn.Module, name: str, neurons: Tensor, values: Tensor, images: int) -> Iterator[None]:
    """Set neurons of module `name` to fixed values, everywhere in their maps, inside this block.

    In a batch of len(neurons) * `images` samples, the k-th group of `images` has neuron `neurons[k]` at `values[k]`.
    """

    def replace(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        changed = output.clone()
        rows = torch.arange(len(output), device=output.device)
        which = neurons.to(output.device).repeat_interleave(images)
        levels = values.to(output.device, output.dtype).repeat_interleave(images)
        changed[rows, which] = levels.view(-1, *[1] * (output.ndim - 2))
        return changed

    handle = dict(model.named_modules())[name].register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()
