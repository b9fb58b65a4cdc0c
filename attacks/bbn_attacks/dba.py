"""DBA (Xie et al., 2020): each malicious client plants its own part of a trigger in federated learning."""

from __future__ import annotations

from itertools import product
from typing import ClassVar, Self

import torch
import torch.nn as nn
from pydantic import Field

from backdoor_bench_none.api import (
    AttackTask,
    ConfigError,
    Context,
    DatasetInfo,
    FitTask,
    History,
    PoisonedSamples,
    StampAttack,
    Trainer,
    Trigger,
    VictimTask,
    check_learned,
    derive_seed,
    draw_indices,
    triggers,
)

#: clients train in batches of this size, to which `poisoned_per_batch` refers
LOCAL_BATCH = 64


class DBA(StampAttack):
    """The first `attackers` clients stamp one of four white bars each, and train longer; their networks are not scaled.

    Bars are those of the authors' code: on grey images 1x4 pixels in rows 0 and 3, on colour images 1x6 in rows 0 and
    4; the test images have all four. Their code poisons the first 20 (MNIST) or 5 (CIFAR) images of every batch of 64;
    here as many of each client's images are poisoned once, so that detection has a ground truth. The other numbers are
    theirs too; the paper (section 8.8) only says 10 clients, 4 of them malicious. While a defense trains, all clients
    follow its protocol: malicious ones train like the others, on what is left of their poison.
    """

    paper: ClassVar[str] = "Xie et al., ICLR 2020"
    controls_training: ClassVar[bool] = True
    needs_clients: ClassVar[bool] = True

    attackers: int = Field(4, ge=0, description="number of malicious clients")
    poisoned_per_batch: int | None = Field(
        None, ge=1, le=LOCAL_BATCH, description="of every 64 images of a malicious client; default: 20 grey, 5 colour"
    )
    malicious_epochs: int | None = Field(
        None, ge=1, description="epochs of a malicious client in each round; default: 10 on grey images, 6 on colour"
    )
    malicious_lr: float = Field(0.05, gt=0, description="learning rate of malicious clients")

    def resolve(self, info: DatasetInfo) -> Self:
        """Fill in the authors' target, 2, and their numbers for grey or colour images."""
        poisoned, epochs = (20, 10) if info.shape[0] == 1 else (5, 6)
        attack = self
        if self.target is None:
            attack = self.model_copy(update={"target": min(2, info.num_classes - 1)})
        numbers = {
            "poisoned_per_batch": self.poisoned_per_batch or poisoned,
            "malicious_epochs": self.malicious_epochs or epochs,
        }
        return super(DBA, attack).resolve(info).model_copy(update=numbers)

    def check_trainer(self, trainer: Trainer) -> None:
        """Raise `ConfigError` if there are fewer clients than attackers."""
        clients = getattr(trainer, "clients", None)
        if trainer.has_clients and clients is not None and self.attackers > clients:
            raise ConfigError(f"dba: {self.attackers} attackers among {clients} clients", "lower attackers")

    def bars(self, info: DatasetInfo) -> list[Trigger]:
        """The four local triggers; together they are the global one."""
        length, gap, below = (4, 2, 3) if info.shape[0] == 1 else (6, 3, 4)
        bar = torch.ones(1, 1, length)
        positions = product((0, below), (0, length + gap))
        return [triggers.place(info.shape, bar, row, column) for row, column in positions]

    def trigger(self, info: DatasetInfo) -> Trigger:
        """All four bars."""
        bars = self.bars(info)
        mask, pattern = (torch.stack([getattr(bar, name) for bar in bars]).sum(0) for name in ("mask", "pattern"))
        return Trigger(mask, pattern)

    def poison(self, task: AttackTask, context: Context) -> PoisonedSamples:
        """Each malicious client's samples with its bar."""
        assert task.clients is not None
        bars, parts = self.bars(task.info), []
        for client in range(self.attackers):
            held = torch.nonzero(task.clients == client).flatten()
            count = poison_count(len(held), self.poisoned_per_batch or 0)
            indices = draw_indices(held, count, derive_seed(context.seed, "select", client))
            chosen = task.data.take(indices)
            images = bars[client % len(bars)].apply(chosen.images)
            parts.append(PoisonedSamples(indices, images, self.relabel(chosen.labels, task.info.num_classes)))
        if not parts:
            return PoisonedSamples.nothing(task.data)
        return join(parts)

    def train(self, task: VictimTask, context: Context) -> tuple[nn.Module, History]:
        """Federated training in which malicious clients train longer."""
        model = task.new_model()
        local = {"epochs": self.malicious_epochs, "lr": self.malicious_lr}
        data = task.training_data(None, context)
        fitting = FitTask(model, data, task.recipe, local=dict.fromkeys(range(self.attackers), local))
        history = task.trainer.fit(fitting, context)
        check_learned(history, task.info.num_classes)
        return model, history


def poison_count(samples: int, per_batch: int) -> int:
    """How many of a client's samples are poisoned: `per_batch` of each batch of 64, at most all of a shorter one."""
    whole, rest = divmod(samples, LOCAL_BATCH)
    return whole * per_batch + min(per_batch, rest)


def join(parts: list[PoisonedSamples]) -> PoisonedSamples:
    """The union of several sets of samples, in the order of their indices."""
    indices, order = torch.cat([part.indices for part in parts]).sort()
    images, labels = (torch.cat([getattr(part, name) for part in parts])[order] for name in ("images", "labels"))
    return PoisonedSamples(indices, images, labels)
