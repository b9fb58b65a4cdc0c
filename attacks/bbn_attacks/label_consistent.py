"""Label-consistent attack (Turner et al., 2019): images of the target class are made hard to learn, then stamped."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from pydantic import Field

from backdoor_bench_none.api import (
    Architecture,
    AttackTask,
    Batch,
    CleanLabelAttack,
    Context,
    Crafter,
    DatasetInfo,
    ImageSet,
    Pixels,
    ResNet18,
    TrainingTask,
    Trigger,
    check_learned,
    triggers,
)

if TYPE_CHECKING:
    from torch import Tensor

Norm = Literal["linf", "l2"]
#: side of the pattern in pixels
SIDE = 3
#: images perturbed at once
CRAFT_BATCH = 250


class RobustCrafter(Crafter):
    """A ResNet18 trained on adversarial images of the clean training set (PGD-AT, Madry et al., 2018)."""

    paper: ClassVar[str] = "arXiv:1706.06083"

    width: float = Field(1.0, gt=0, le=4, description="factor on the number of channels of every hidden layer")
    epochs: int | None = Field(None, ge=1, description="epochs; default: those of the data set's recipe")
    epsilon: float = Field(8.0, ge=0, le=255, description="Linf bound in levels of 0..255; 0 is plain training")
    step: float = Field(2.0, gt=0, le=255, description="length of a step, in levels")
    steps: int = Field(10, ge=1, description="steps of PGD for each batch")

    def architecture(self) -> Architecture:
        """ResNet18 of `width`."""
        return ResNet18(width=self.width)

    def train(self, task: TrainingTask, context: Context) -> nn.Module:
        """The network trained on the worst images that PGD finds around each batch.

        BatchNorm is in eval mode while PGD searches.
        """
        model = task.new_model()
        pixels = Pixels.of(task.info, context.device)

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            levels = (batch.images - pixels.shift) / pixels.scale
            model.eval()
            harder = pgd(model, levels, batch.labels, pixels, "linf", self.epsilon, self.step, self.steps, context)
            model.train()
            return F.cross_entropy(model(to_input(harder, pixels)), batch.labels)

        history = task.fit(model, context, loss=loss, epochs=self.epochs or task.recipe.epochs)
        check_learned(history, task.info.num_classes)
        return model


class LabelConsistent(CleanLabelAttack):
    """Makes target-class images hard to learn by PGD and stamps the trigger on top; no label changes.

    PGD raises their loss on an adversarially trained network. Test images have the trigger alone, at full strength.

    `class_rate` is a share of the target class. The paper's 5 % of CIFAR-10's 5,000 images are 250, half a percent of
    the data; BackdoorBench counts the whole set. The authors released finished images only (their `inf_16` or
    `two_1200`, bounds on the scale 0..255); NONE uses the latter. Their other method, interpolation in a GAN's latent
    space, is left out. The four corners survive crops and flips: one corner is always left.
    """

    revision: ClassVar[int] = 2
    paper: ClassVar[str] = "arXiv:1912.02771"

    norm: Norm = Field("linf", description="norm of the perturbation")
    epsilon: float | None = Field(
        None, ge=0, description="bound of the perturbation in levels of 0..255; default: 8 for linf, 1200 for l2"
    )
    steps: int = Field(100, ge=0, description="steps of PGD, each 1.5 * epsilon / steps long")
    corners: Literal["all", "bottom_right"] = Field("all", description="positions of the 3x3 black and white pattern")
    amplitude: float | None = Field(
        None,
        gt=0,
        le=1,
        description="training: 255 * amplitude is added to white pixels and taken from black; default: overwrite",
    )
    crafter: RobustCrafter = Field(RobustCrafter(), description="the adversarially trained network")

    def crafted_with(self) -> Crafter:
        """The adversarially trained network; attacks that differ in anything else share it."""
        return self.crafter

    @property
    def bound(self) -> float:
        """The bound of the perturbation, in levels."""
        if self.epsilon is not None:
            return self.epsilon
        return {"linf": 8.0, "l2": 1200.0}[self.norm]

    def check_trigger(self, info: DatasetInfo) -> None:
        """Check that the pattern is no larger than the images."""
        triggers.check_fits(info.shape, SIDE)

    def trigger(self, info: DatasetInfo) -> Trigger:
        """The 3x3 pattern bottom right, or in all corners: mirrored on the left, the same top and bottom."""
        tile, shape = triggers.label_consistent_tile(SIDE), info.shape
        placed = [triggers.place(shape, tile, -1, -1)]
        if self.corners == "all":
            mirrored = tile.flip(-1)
            placed += [
                triggers.place(shape, mirrored, 0, 0),
                triggers.place(shape, tile, 0, -1),
                triggers.place(shape, mirrored, -1, 0),
            ]
        return Trigger(sum_of([p.mask for p in placed]), sum_of([p.pattern for p in placed]))

    def craft(self, chosen: ImageSet, indices: Tensor, task: AttackTask, context: Context) -> Tensor:
        """The chosen images, perturbed, rounded and stamped."""
        assert task.network is not None
        network = task.network
        pixels = Pixels.of(task.info, context.device)
        step = 1.5 * self.bound / max(1, self.steps)
        harder = []
        for start in range(0, len(indices), CRAFT_BATCH):
            part = chosen.take(torch.arange(start, min(start + CRAFT_BATCH, len(indices)))).to(context.device)
            perturbed = pgd(
                network, part.images.float(), part.labels, pixels, self.norm, self.bound, step, self.steps, context
            )
            harder.append(round_within(perturbed, part.images, self.norm, self.bound).cpu())
            context.progress(start + len(part), len(indices))
            context.check_deadline()
        return self.overlay(torch.cat(harder), task.info)

    def overlay(self, images: Tensor, info: DatasetInfo) -> Tensor:
        """`images` (N, C, H, W) uint8 with the trigger of training, of `amplitude`."""
        trigger = self.trigger(info)
        if self.amplitude is None:
            return trigger.apply(images)
        signs = trigger.mask * (2 * trigger.pattern - 1)
        return (images + (255 * self.amplitude * signs)).round().clamp(0, 255).to(torch.uint8)


def sum_of(tensors: list[Tensor]) -> Tensor:
    """The sum of triggers that do not overlap; at most 1 where they do, as on tiny images."""
    return torch.stack(tensors).sum(0).clamp(max=1)


def to_input(levels: Tensor, pixels: Pixels) -> Tensor:
    """Images (N, C, H, W) float in 0..255 as networks see them."""
    return torch.addcmul(pixels.shift, levels, pixels.scale)


def pgd(
    model: nn.Module,
    levels: Tensor,
    labels: Tensor,
    pixels: Pixels,
    norm: Norm,
    epsilon: float,
    step: float,
    steps: int,
    context: Context,
) -> Tensor:
    """Untargeted projected gradient ascent on the cross entropy of `levels` (N, C, H, W) float in 0..255.

    It starts from the images themselves, and steps along the sign (linf) or along the normalised gradient (l2),
    projected to the ball of `epsilon` levels and to 0..255. `model` is in eval mode and is left as it is.
    """
    perturbed = levels.clone()
    if epsilon <= 0:
        return perturbed.detach()
    for _ in range(steps):
        perturbed.requires_grad_(True)
        with context.autocast():
            loss = F.cross_entropy(model(to_input(perturbed, pixels)), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, perturbed)
        perturbed = project(perturbed.detach() + step * direction(gradient, norm), levels, norm, epsilon)
    return perturbed.detach()


def direction(gradient: Tensor, norm: Norm) -> Tensor:
    """The steepest step of length 1: the sign, or the gradient over its norm; 0 where the gradient is 0."""
    if norm == "linf":
        return gradient.sign()
    # squares of small float32 numbers underflow to 0, so the largest is scaled to 1 first
    largest = gradient.abs().amax(dim=(1, 2, 3), keepdim=True)
    scaled = gradient / largest.clamp(min=torch.finfo(gradient.dtype).tiny)
    return scaled / lengths(scaled).clamp(min=1e-30)


def project(levels: Tensor, centre: Tensor, norm: Norm, epsilon: float) -> Tensor:
    """`levels` within `epsilon` of `centre` and within 0..255; the second bound does not break the first."""
    if norm == "linf":
        delta = (levels - centre).clamp(-epsilon, epsilon)
    else:
        delta = levels - centre
        delta = delta * (epsilon / lengths(delta).clamp(min=1e-30)).clamp(max=1)
    return (centre + delta).clamp(0, 255)


def round_within(perturbed: Tensor, images: Tensor, norm: Norm, epsilon: float) -> Tensor:
    """`perturbed` in whole levels, uint8; rounding does not leave the Linf ball around `images` (N, C, H, W) uint8."""
    delta = perturbed.round() - images
    if norm == "linf":
        delta = delta.clamp(-math.floor(epsilon), math.floor(epsilon))
    return (images + delta).to(torch.uint8)


def lengths(vectors: Tensor) -> Tensor:
    """The L2 norm of each of (N, C, H, W), as (N, 1, 1, 1)."""
    return vectors.square().sum(dim=(1, 2, 3), keepdim=True).sqrt()
