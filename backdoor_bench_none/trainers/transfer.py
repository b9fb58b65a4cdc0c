"""Transfer learning: a frozen, pretrained backbone and a new last layer."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
import torch.nn as nn
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file

from backdoor_bench_none.contracts.component import Incidental
from backdoor_bench_none.contracts.context import Context
from backdoor_bench_none.contracts.dataset import DatasetInfo
from backdoor_bench_none.contracts.network import logits_parameters, move
from backdoor_bench_none.contracts.trainer import FitTask, History, PretrainingTask, Trainer
from backdoor_bench_none.errors import ConfigError
from backdoor_bench_none.trainers.centralized import Centralized

if TYPE_CHECKING:
    from torch import Tensor


class Transfer(Trainer):
    """Trains only the last layer; the pretrained backbone stays frozen, including BatchNorm's statistics.

    The backbone is pretrained on the classes that the data set leaves out (`classes` of image_folder and imagenette),
    or on its clean images if it leaves out none; or it is read from `weights`, such as torchvision's AlexNet for
    ImageNet. Dropout stays active. Saha et al. train the last layer of AlexNet with `recipe: {epochs: 20, lr: 0.001,
    schedule: step, milestones: [11], batch_size: 256}`; features of other networks are smaller and need a larger rate.
    """

    paper: ClassVar[str] = "arXiv:1910.00033, section 4"
    has_backbone: ClassVar[bool] = True

    pretraining_epochs: int | None = Field(
        None, ge=1, description="epochs of the backbone's training; default: those of the data set and architecture"
    )
    weights: Annotated[Path | None, Incidental] = Field(
        None, description="state dictionary of the cell's architecture (.safetensors, or .pth with tensors only)"
    )

    def recipe(self) -> Mapping[str, Any]:
        """The recipe of the last layer: 20 epochs without augmentation."""
        return {"epochs": 20, "lr": 0.05, "augment": False}

    def check(self, info: DatasetInfo) -> None:
        """Raise `ConfigError` if the file of weights cannot be read."""
        if self.weights is not None:
            read_weights(self.weights)

    def identity(self) -> dict[str, Any]:
        """The revision and the parameters, and the sha256 of the file of weights."""
        if self.weights is None:
            return super().identity()
        return {**super().identity(), "weights_sha256": hashlib.sha256(_read_bytes(self.weights)).hexdigest()}

    def pretrain(self, task: PretrainingTask, context: Context) -> nn.Module:
        """The network of `weights`, or one trained on the images of `task.open()`."""
        if self.weights is not None:
            model = task.build(0)
            task.build.load_backbone(model, read_weights(self.weights))
            return model
        training = task.open()
        model = training.new_model()
        training.fit(model, context, epochs=self.pretraining_epochs or training.recipe.epochs)
        return model

    def fit(self, task: FitTask, context: Context) -> History:
        """Train the layers of `task.model` that make the logits, in place."""
        move(task.model, context.device)
        trained = {id(parameter) for parameter in logits_parameters(task.model, task.data.example())}
        frozen = [p for p in task.model.parameters() if p.requires_grad and id(p) not in trained]
        for parameter in frozen:
            parameter.requires_grad_(False)
        try:
            return Centralized().fit(replace(task, freeze_batchnorm=True), context)
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)


def read_weights(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a state dictionary's file; `ConfigError` if it is not one.

    Nothing but tensors is unpickled.
    """
    path = path.expanduser()
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, ValueError, EOFError, LookupError) as error:
        raise ConfigError(f"transfer: '{path}' cannot be read: {first_line(error)}") from error
    except Exception as error:  # pickle.UnpicklingError: weights_only refused something in the file
        raise ConfigError(
            f"transfer: '{path}' holds more than tensors, and is not unpickled: {first_line(error)}",
            "save model.state_dict()",
        ) from error
    if not isinstance(loaded, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in loaded.values()):
        raise ConfigError(f"transfer: '{path}' is not a state dictionary", "save model.state_dict()")
    return loaded


def _read_bytes(path: Path) -> bytes:
    try:
        return path.expanduser().read_bytes()
    except OSError as error:
        raise ConfigError(f"transfer: '{path}' cannot be read: {error.strerror}") from error


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type if it has no message."""
    return (str(error).splitlines() or [type(error).__name__])[0]
