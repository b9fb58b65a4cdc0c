"""Hidden trigger attack (Saha et al., 2020): images of one class with the features of triggered images of another."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from pydantic import Field

from backdoor_bench_none.api import (
    AttackTask,
    CleanLabelAttack,
    ConfigError,
    Context,
    DatasetInfo,
    FeatureTap,
    ImageSet,
    Pixels,
    PlacedTiles,
    PoisonedSamples,
    Trigger,
    derive_seed,
    draw_indices,
    triggers,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

#: poisons optimised together, and paired among each other
CRAFT_BATCH = 100
#: steps between two looks from the host at whether the pairs are close enough; each waits for the device
LOOK_EVERY = 50
#: seed of the patch: the same on training and test images
PATCH_SEED = 13


class HiddenTrigger(CleanLabelAttack):
    """Moves images of the target class until their features meet those of source-class images with a patch.

    The features are those of the victim's frozen backbone, and images are moved by at most `epsilon` levels. The patch
    itself is in no training image; at test time it is stamped on images of the source class at a random position, and
    only they count for ASR.

    Pairs are matched anew in every iteration, nearest first, each image once; the authors' code does not strike out
    matched rows and columns, so that images repeat. The poisons replace the images they are made from (the authors add
    them to others). Their pair, theater curtain (n04418357) to plunger (n03970156), is `{name: image_folder, params:
    {classes: [n04418357, n03970156]}}` of ImageNet, with source 0 and target 1 in the order of `classes`, architecture
    alexnet and `{name: transfer, params: {weights: alexnet.pth}}`; on other data this is a surrogate. `rule: gradient`
    with lr 0.01 is theirs, for AlexNet's features; `sign` suits features of any scale.
    """

    revision: ClassVar[int] = 2
    paper: ClassVar[str] = "arXiv:1910.00033"
    needs_backbone: ClassVar[bool] = True

    source: Annotated[int, Field(ge=0)] | str | None = Field(
        None, description="class whose triggered images get `target`, as its label or its name; default: target + 1"
    )
    class_rate: float = Field(0.25, gt=0, le=1, description="share of the target class that is poisoned")
    size: int | None = Field(
        None, ge=1, le=224, description="side of the patch in pixels; default: 30 of 224, in proportion"
    )
    epsilon: float = Field(16.0, ge=0, le=255, description="Linf bound of the perturbation, in levels of 0..255")
    steps: int = Field(5000, ge=0, description="highest number of steps")
    lr: float = Field(0.01, gt=0, description="length of a step on the scale 0..1, halved every `halve_every` steps")
    halve_every: int = Field(1000, ge=1, description="steps after which the step is halved")
    rule: Literal["gradient", "sign"] = Field("gradient", description="step along the gradient, or along its sign")
    stop_at: float = Field(10.0, ge=0, description="stop once the squared distance of every pair is at most this")

    def resolve(self, info: DatasetInfo) -> Self:
        """Fill in the target, the source and the size of the patch."""
        resolved = super().resolve(info)
        source, size = self.source, self.size
        if source is None:
            source = (resolved.target_label + 1) % info.num_classes
        if size is None:
            size = max(1, round(info.shape[1] * 30 / 224))
        return resolved.model_copy(update={"source": info.label_of(source, "source"), "size": size})

    def check(self, info: DatasetInfo) -> None:
        """Check also that source and target are two different classes."""
        if self.source == self.target:
            raise ConfigError(f"hidden_trigger: source and target are both class {self.target}", "choose two classes")
        if self.source is not None:
            info.label_of(self.source, "source")
        super().check(info)

    @property
    def source_label(self) -> int:
        """The label of the source; `ValueError` if it is a name that `resolve` has not seen."""
        if isinstance(self.source, str):
            raise ValueError(f"the class '{self.source}' has no label before `resolve`")
        return self.source or 0

    def tile(self, info: DatasetInfo) -> Tensor:
        """The patch (C, size, size): 4x4 random colours, enlarged smoothly."""
        colours = triggers.noise((info.shape[0], 4, 4), PATCH_SEED)[None]
        size = self.size or 1
        return F.interpolate(colours, size=(size, size), mode="bilinear", align_corners=True)[0].clamp(0, 1)

    def trigger(self, info: DatasetInfo) -> Trigger:
        """The patch bottom right."""
        return triggers.place(info.shape, self.tile(info), -1, -1)

    def trigger_each(self, info: DatasetInfo, indices: Tensor, seed: int) -> PlacedTiles:
        """The patch at a separate position for each sample."""
        rows, columns = triggers.random_places(info.shape, self.size or 1, indices, seed)
        return triggers.PlacedTiles(info.shape, self.tile(info), rows, columns)

    def craft(self, chosen: ImageSet, indices: Tensor, task: AttackTask, context: Context) -> Tensor:
        """The chosen images, optimised in feature space and truncated to whole levels, without a patch."""
        assert task.network is not None
        of_source = torch.nonzero(task.data.labels == self.source_label).flatten()
        hint = "the source class has too few images; lower class_rate"
        if len(of_source) < len(indices):
            raise ConfigError(f"hidden_trigger: {len(indices)} pairs, but {len(of_source)} source images", hint)
        sources = draw_indices(of_source, len(indices), derive_seed(context.seed, "sources"))
        patched = self.stamp(task.data.images[sources], sources, task.info, derive_seed(context.seed, "place"))
        crafted = []
        for start in range(0, len(indices), CRAFT_BATCH):
            part = slice(start, start + CRAFT_BATCH)
            crafted.append(self.optimise(task.network, chosen.images[part], patched[part], task, context))
            context.progress(min(start + CRAFT_BATCH, len(indices)), len(indices))
        return torch.cat(crafted)

    def optimise(
        self, network: nn.Module, images: Tensor, patched: Tensor, task: AttackTask, context: Context
    ) -> Tensor:
        """Move `images` towards `patched` (both (k, C, H, W) uint8) in feature space; returns uint8."""
        pixels = Pixels.of(task.info, context.device)
        start = images.to(context.device).float() / 255
        with FeatureTap(network, pixels.normalize(images[:1].to(context.device))) as tap:
            with torch.no_grad():
                wanted = tap(pixels.normalize(patched.to(context.device)))
            poisons = start.clone()
            look_every = 1 if start.device.type == "cpu" else LOOK_EVERY
            for step in range(self.steps):
                poisons.requires_grad_(True)
                features = tap(torch.addcmul(pixels.shift, poisons * 255, pixels.scale))
                partners = wanted[pair_greedily(torch.cdist(features.detach(), wanted))]
                distances = (features - partners).square().sum(1)
                # the poisons move no more from the first such step on, whenever the host notices
                is_close = distances.detach().max() <= self.stop_at
                if step % look_every == 0 and bool(is_close):
                    break
                (gradient,) = torch.autograd.grad(distances.sum(), poisons)
                if self.rule == "sign":
                    gradient = gradient.sign()
                before = poisons.detach()
                poisons = before - self.lr * 0.5 ** (step // self.halve_every) * gradient
                poisons = (start + (poisons - start).clamp(-self.epsilon / 255, self.epsilon / 255)).clamp(0, 1)
                poisons = torch.where(is_close, before, poisons)
                context.check_deadline()
        # whole levels, rounded towards the original image, so that the bound holds
        levels = (poisons.detach() - start) * 255
        whole = math.floor(self.epsilon)
        levels = (levels + 1e-3 * levels.sign()).trunc().clamp(-whole, whole)  # 15.9999 is 16, but not above the bound
        return (start * 255 + levels).round().clamp(0, 255).to(torch.uint8).cpu()

    def attack_test(self, task: AttackTask, context: Context) -> PoisonedSamples:
        """The images of the source class, patched."""
        indices = torch.nonzero(task.data.labels == self.source_label).flatten()
        images = self.stamp(task.data.images[indices], indices, task.info, derive_seed(context.seed, "place"))
        return PoisonedSamples(indices, images, torch.full_like(indices, self.target_label))


def pair_greedily(distances: Tensor) -> Tensor:
    """A separate column (n,) int64 for each row of `distances` (n, n).

    The nearest pair is matched first, then the nearest of those left.
    """
    if distances.is_cuda:
        return _pair_on_device(distances)
    left: NDArray[np.float32] = distances.float().numpy().copy()
    columns = np.empty(len(left), dtype=np.int64)
    for _ in range(len(left)):
        row, column = divmod(int(left.argmin()), left.shape[1])
        columns[row] = column
        left[row, :] = np.inf
        left[:, column] = np.inf
    return torch.from_numpy(columns)


def _pair_on_device(distances: Tensor) -> Tensor:
    """`pair_greedily` without a wait for the host, which costs more than the idle steps of the device."""
    left = distances.float().clone()
    count = len(left)
    columns = torch.empty(count, dtype=torch.int64, device=left.device)
    for _ in range(count):
        nearest = left.argmin()
        row, column = nearest[None] // count, nearest[None] % count  # (1,), which index without being read
        columns[row] = column
        left[row, :] = math.inf
        left[:, column] = math.inf
    return columns
