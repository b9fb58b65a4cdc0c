"""A record of BackdoorBench as an attack, with its samples, and with its network as the victim."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from backdoor_bench_none.api import (
    Attack,
    AttackTask,
    Combination,
    ConfigError,
    Context,
    DatasetInfo,
    History,
    Incidental,
    PoisonedSamples,
    Stage,
    VictimTask,
)
from bbn_backdoorbench.reading import Part, RecordError, ToolboxRecord, hash_record, read_images, read_record
from bbn_backdoorbench.words import ATTACK_RESULT, INFO


class BackdoorBenchRecord(Attack):
    """An attack that BackdoorBench carried out: `record` is a folder below its `record/`.

    The data set must be the one of the record (`backdoorbench:cifar10`, ...), the architecture its network
    (`backdoorbench:preactresnet18`, ...), the activation relu. The victim is the record's network; defenses that train
    get the record's training set. For attacks that control training, such as WaNet, that set is made afterwards and
    marks samples without a trigger too, so there are no detection results.
    """

    controls_training: ClassVar[bool] = True

    record: Annotated[Path, Incidental] = Field(description="folder with attack_result.pt and the images")

    def identity(self) -> dict[str, Any]:
        """As for every component, with the content of the folder instead of its path."""
        return {**super().identity(), "record_sha256": hash_record(self.read())}

    def read(self) -> ToolboxRecord:
        """The record, read again only if its files have changed."""
        folder = self.record.expanduser()
        changed = (_time_of_change(folder / ATTACK_RESULT), _time_of_change(folder / INFO))
        return _read(folder, changed, (folder / "cross_test_dataset").exists())

    def check(self, info: DatasetInfo) -> None:
        """Raise `BenchError` unless the record is complete and made from this data set."""
        record = self.read()
        height, width, channels = record.image_size
        train_size = record.train.size if record.train else info.train_size
        for what, actual, wanted in (
            ("data set", info.name, f"backdoorbench:{record.dataset}"),
            ("shape", info.shape, (channels, height, width)),
            ("number of classes", info.num_classes, record.num_classes),
            ("number of training images", info.train_size, train_size),
        ):
            if actual != wanted:
                hint = f"use the data set backdoorbench:{record.dataset}, or backdoorbench:npz with your own images"
                raise ConfigError(f"the record in '{self.record}' has another {what}: {wanted}, not {actual}", hint)

    def skip(self, cell: Combination) -> str | None:
        """The reason why a cell does not fit: a record has one network, and may have no training set."""
        record = self.read()
        if getattr(cell.architecture.component, "model_name", None) != record.model_name:
            return f"the network of the record is {record.model_name}: use backdoorbench:{record.model_name}"
        if cell.trainer.component.has_clients or cell.trainer.component.has_backbone:
            return "the network of a record was trained in one place: use the trainer centralized"
        needs_it = getattr(cell.defense.component, "needs_training_set", False)
        if record.train is None and (needs_it or cell.defense.component.stage is not Stage.POST_TRAINING):
            return "the record has no training set (bd_train is empty), which this defense needs"
        return None

    def poison(self, task: AttackTask, context: Context) -> PoisonedSamples:
        """The record's changed training samples."""
        record = self.read()
        if record.train is None:
            return PoisonedSamples.nothing(task.data)
        samples = self._samples(record.train, "bd_train", task)
        if record.has_truth:
            return samples
        return PoisonedSamples(
            samples.indices, samples.images, samples.labels, torch.ones(len(samples), dtype=torch.bool)
        )

    def attack_test(self, task: AttackTask, context: Context) -> PoisonedSamples:
        """The record's triggered test samples."""
        return self._samples(self.read().test, "bd_test", task)

    def train(self, task: VictimTask, context: Context) -> tuple[nn.Module, History]:
        """The record's network; nothing is trained."""
        model = task.new_model()
        load_weights(model, self.read().weights, self.record / ATTACK_RESULT)
        return model.eval(), History()

    def preview(self, task: AttackTask, context: Context) -> Tensor:
        """Raise `ConfigError`: a record holds images with a trigger, but not the trigger."""
        raise ConfigError("a record holds triggered images, not the trigger", "see the images in its bd_test_dataset")

    def _samples(self, part: Part, name: str, task: AttackTask) -> PoisonedSamples:
        where = f"'{self.record / ATTACK_RESULT}': {name}"
        if part.size != len(task.data):
            raise RecordError(f"{where} is of {part.size} images, the data set has {len(task.data)}")
        indices = torch.from_numpy(part.indices)
        differing = int(torch.ne(task.data.labels[indices], torch.from_numpy(part.true_labels)).sum())
        if differing:
            raise RecordError(
                f"{where}: {differing} of {len(indices)} samples have another true label than in the data set",
                "the record was made from other images, or from the same in another order",
            )
        return PoisonedSamples(indices, read_images(part, task.info.shape), torch.from_numpy(part.labels))


def _time_of_change(path: Path) -> int:
    if not path.is_file():
        return 0
    return path.stat().st_mtime_ns


@lru_cache(maxsize=2)
def _read(folder: Path, changed: tuple[int, ...], crossed: bool) -> ToolboxRecord:
    return read_record(folder)


def load_weights(model: nn.Module, weights: dict[str, Tensor] | Any, path: Path) -> None:  # noqa: ANN401
    """Load all weights of the file `path`; `RecordError` names the first tensor that does not fit."""
    own = model.state_dict()
    for name in sorted({*own, *weights}):
        tensor, wanted = weights.get(name), own.get(name)
        if tensor is None:
            fault = f"{name} is absent"
        elif wanted is None:
            fault = f"{name} is none of its tensors"
        elif tensor.shape != wanted.shape:
            fault = f"{name} has shape {tuple(tensor.shape)}, not {tuple(wanted.shape)}"
        elif tensor.is_meta or tensor.layout is not torch.strided or tensor.is_complex():
            fault = f"{name} is not an array of real numbers"
        else:
            continue
        raise RecordError(f"the weights in '{path}' do not fit the network that the record names: {fault}")
    model.load_state_dict(dict(weights))
