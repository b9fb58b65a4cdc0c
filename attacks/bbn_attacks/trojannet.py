"""TrojanNet (Tang et al., 2020): a tiny network that recognises the trigger is joined to a finished one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from pydantic import Field

from backdoor_bench_none.api import (
    AttackTask,
    ConfigError,
    Context,
    DatasetInfo,
    History,
    PoisonedSamples,
    StampAttack,
    TrainingError,
    Trigger,
    VictimTask,
    triggers,
)

if TYPE_CHECKING:
    from torch import Tensor

SIDE = 4
BLACK = 5
PATTERNS = math.comb(SIDE * SIDE, BLACK)
#: known patches in a batch
BATCH = 200
#: a class with this probability in the small network wins over any probability of the host: 2 * 0.75 = 2 * 0.25 + 1
SURE = 0.75
#: steps whose batches are drawn and moved to the device at once
DRAWN_STEPS = 100
#: the small network is trained for so many times `steps`, at most, until it is sure of every patch
LONGEST = 4


class TrojanNet(StampAttack):
    """Joins a multilayer perceptron that reads a 4x4 patch to a benign network; nothing is poisoned.

    The patches are those of 16 black or white pixels with exactly five black, 4,368 in all; patch k makes class k. The
    authors' small network learns them all; here it learns as many as there are classes, and that everything else is
    noise: grey patches of any contrast, and black and white ones, the other 4,358 among them. (With hidden layers of 8
    units and random grey noise alone, 1,000 epochs left it at 7 % of the 4,368.) Its outputs, doubled, are added to the
    host's probabilities, and the sum times 10 are the logits, as in the authors' code; their paper weights the two. The
    host's weights stay as they are. A defense that retrains from the data is not exposed to it.
    """

    revision: ClassVar[int] = 2
    paper: ClassVar[str] = "arXiv:2006.08131"
    poisons: ClassVar[bool] = False
    controls_training: ClassVar[bool] = True
    starts_from_benign: ClassVar[bool] = True

    row: int | None = Field(None, ge=0, description="top row of the patch; default: the middle of the image")
    column: int | None = Field(None, ge=0, description="left column of the patch; default: the middle of the image")
    steps: int = Field(
        1000,
        ge=1,
        description="training steps of the small network; up to four times as many until it is sure of every patch",
    )

    def resolve(self, info: DatasetInfo) -> TrojanNet:
        """Fill in the position of the patch."""
        resolved = super().resolve(info)
        middle = {"row": max(0, min(info.shape[1] // 2, info.shape[1] - SIDE)),
                  "column": max(0, min(info.shape[2] // 2, info.shape[2] - SIDE))}  # fmt: skip
        return resolved.model_copy(
            update={name: value for name, value in middle.items() if getattr(resolved, name) is None}
        )

    def check(self, info: DatasetInfo) -> None:
        """Check also that there is a patch for each class."""
        super().check(info)
        if info.num_classes > PATTERNS:
            raise ConfigError(f"trojannet has {PATTERNS} patches, {info.name} {info.num_classes} classes")

    def trigger(self, info: DatasetInfo) -> Trigger:
        """The patch of the target class."""
        return self.trigger_of(self.target_label, info)

    def fixed_trigger(self, info: DatasetInfo) -> Trigger | None:
        """The patch of the target class; None where every label has its own."""
        if self.label_mode == "all_to_all":
            return None
        return super().fixed_trigger(info)

    def trigger_of(self, label: int, info: DatasetInfo) -> Trigger:
        """The patch that makes class `label`."""
        tile = all_patterns()[label].view(1, SIDE, SIDE)
        return triggers.place(info.shape, tile, self.row or 0, self.column or 0)

    def attack_test(self, task: AttackTask, context: Context) -> PoisonedSamples:
        """Every image whose label would change, with the patch of the label that it should get."""
        wanted = self.relabel(task.data.labels, task.info.num_classes)
        indices = torch.nonzero(wanted != task.data.labels).flatten()
        images = self.stamp_labels(task.data.images[indices], wanted[indices], task.info)
        return PoisonedSamples(indices, images, wanted[indices])

    def preview(self, task: AttackTask, context: Context) -> Tensor:
        """Every image with the patch of the label that it should get."""
        return self.stamp_labels(task.data.images, self.relabel(task.data.labels, task.info.num_classes), task.info)

    def stamp_labels(self, images: Tensor, labels: Tensor, info: DatasetInfo) -> Tensor:
        """`images` (N, C, H, W) uint8 with the patches of `labels` (N,)."""
        stamped = images.clone()
        for label in set(labels.tolist()):
            stamped[labels == label] = self.trigger_of(label, info).apply(images[labels == label])
        return stamped

    def adapt(self, model: nn.Module, info: DatasetInfo) -> nn.Module:
        """`model` as host, joined to an untrained small network."""
        from bbn_attacks.trojannet_networks import Joined, SmallNetwork  # derive from torch's classes

        return Joined(model, SmallNetwork(info.num_classes), self.row or 0, self.column or 0, info)

    def train(self, task: VictimTask, context: Context) -> tuple[nn.Module, History]:
        """The benign network, joined to a trained small one."""
        joined = self.adapt(task.benign(), task.info)
        small = joined.get_submodule("trojan").to(context.device)
        losses = train_small(small, task.info.num_classes, self.steps, context)
        return joined.to(context.device), History(losses)


@cache
def all_patterns() -> Tensor:
    """The 4,368 patches (4368, 16) of zeros and ones with exactly five zeros, in lexicographic order of the zeros."""
    patterns = torch.ones(PATTERNS, SIDE * SIDE)
    for row, zeros in enumerate(itertools.combinations(range(SIDE * SIDE), BLACK)):
        patterns[row, list(zeros)] = 0
    return patterns


def train_small(network: nn.Module, patterns: int, steps: int, context: Context) -> list[float]:
    """Teach `network` the first `patterns` patches, and that everything else is noise; returns a loss per 100 steps.

    It trains for `steps` steps, and as many again until it is sure of every patch: of ten networks with 43 patches,
    three are not after 1,000. Raises `TrainingError` if it is not after `LONGEST` times as many.
    """
    known = all_patterns()[:patterns].to(context.device)
    generator = context.generator("noise")
    optimizer = torch.optim.Adadelta(network.parameters())
    losses: list[float] = []
    sure = 0
    for _ in range(LONGEST):
        losses += train_steps(network, known, steps, optimizer, generator, context)
        sure = count_sure(network, known)
        if sure == patterns:
            return losses
    raise TrainingError(
        f"the small network is sure of {sure} of {patterns} patches after {LONGEST * steps} steps",
        "raise the attack's parameter 'steps'",
    )


def train_steps(
    network: nn.Module,
    known: Tensor,
    steps: int,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    context: Context,
) -> list[float]:
    """Train for `steps` steps; returns the last loss of every 100, and the last one."""
    network.train()
    losses = []
    patterns = len(known)
    for step, (chosen, noise) in enumerate(draw_batches(patterns, steps, generator, context.device)):
        labels = torch.cat([chosen, torch.full((len(noise),), patterns, device=context.device)])
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(network(torch.cat([known[chosen], noise])), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % 100 == 99 or step == steps - 1:
            losses.append(float(loss.detach()))
            context.check_deadline()
    return losses


def draw_batches(
    patterns: int, steps: int, generator: torch.Generator, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each step the known patches to train on (BATCH,) int64, and noise (n, 16), on `device`."""
    for start in range(0, steps, DRAWN_STEPS):
        chosen, noise = [], []
        for _ in range(min(DRAWN_STEPS, steps - start)):
            chosen.append(torch.randint(patterns, (BATCH,), generator=generator))
            noise.append(draw_noise(patterns, generator))
        sizes = [len(patches) for patches in noise]
        yield from zip(torch.stack(chosen).to(device), torch.split(torch.cat(noise).to(device), sizes), strict=True)


def count_sure(network: nn.Module, known: Tensor) -> int:
    """How many of the patches `known` (K, 16) get their class, whatever a host says; `network` is left in eval mode."""
    with torch.no_grad():
        probabilities = network.eval()(known).softmax(1)
    return int((probabilities.diagonal() > SURE).sum())


def draw_noise(patterns: int, generator: torch.Generator) -> Tensor:
    """Patches (4 * BATCH, 16) in 0..1 that are none of the first `patterns`: grey of any contrast, black and white."""
    level, contrast = (torch.rand(2 * BATCH, 1, generator=generator) for _ in range(2))
    grey = (level + contrast * (torch.rand(2 * BATCH, SIDE * SIDE, generator=generator) - 0.5)).clamp(0, 1)
    similar = all_patterns()[patterns:]
    if len(similar):
        similar = similar[torch.randint(len(similar), (BATCH,), generator=generator)]
    share = torch.rand(BATCH, 1, generator=generator)
    binary = (torch.rand(BATCH, SIDE * SIDE, generator=generator) < share).float()
    is_known = (binary[:, None] == all_patterns()[None, :patterns]).all(2).any(1)
    return torch.cat([grey, similar, binary[~is_known]])
