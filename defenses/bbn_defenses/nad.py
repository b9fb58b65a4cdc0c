"""Neural attention distillation (Li et al., 2021): the network learns the attention of a fine-tuned copy of itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from pydantic import Field

from backdoor_bench_none.api import (
    Batch,
    Combination,
    Context,
    Defense,
    DefenseResult,
    DefenseTask,
    Loss,
    Stage,
    cross_entropy,
    find_layers,
    record_outputs,
)

if TYPE_CHECKING:
    from torch import Tensor

#: Positions of the maps for which the authors chose their betas: 32x32, 16x16 and 8x8.
PLACES = (1024, 256, 64)


class NAD(Defense):
    """Fine-tunes a teacher on the clean images, then the network, drawn to the teacher's attention maps.

    Maps of the last three blocks are compared. A block ends with the last activation of a resolution, before pooling:
    the stages of a ResNet, the blocks of a VGG or NiN. Its map is the channel sum of squares, divided by its L2 norm;
    the loss is the mean square difference, as in the authors' code. A mean over fewer positions is larger, so `betas`
    are scaled by the number of positions over that of the authors' maps: a sample's maps weigh the same at every
    resolution. The published augmentation by cutout is left out. The control is `fine_tune`, which is this with all
    `betas` 0.
    """

    paper: ClassVar[str] = "arXiv:2101.05930"
    stage: ClassVar[Stage] = Stage.POST_TRAINING
    starts_from_victim: ClassVar[bool] = True

    clean_fraction: float = Field(
        0.05, gt=0, lt=1, description="share of the training set granted as trusted clean images"
    )
    betas: tuple[float, float, float] = Field(
        (500.0, 1000.0, 1000.0),
        description="weights of the attention loss of the last three blocks, for maps of 32x32, 16x16 and 8x8",
    )
    teacher_epochs: int = Field(10, ge=1, description="passes of the teacher over the clean images")
    epochs: int = Field(20, ge=1, description="passes of the student over the clean images")
    batch_size: int = Field(64, ge=1, description="images per step")
    lr: float | None = Field(
        None,
        gt=0,
        description="learning rate of the first two epochs, a tenth of it after; default: the recipe's highest",
    )
    layers: tuple[str, ...] = Field(
        (), max_length=3, description="modules whose output maps are compared; default: found automatically"
    )

    def skip(self, cell: Combination) -> str | None:
        """A network without convolutions has no attention map."""
        if cell.architecture.name == "mlp":
            return "nad: a network without convolutions has no attention map"
        return None

    def run(self, task: DefenseTask, context: Context) -> DefenseResult:
        """The student."""
        teacher, student = task.victim(), task.victim()
        layers = self._chosen_layers(student, task, context)
        self._fit(teacher, task, context.derive("teacher"), self.teacher_epochs, cross_entropy)
        teacher.requires_grad_(False)
        named = {name: name for name in layers}
        betas = self.betas[-len(layers) :]
        with record_outputs(teacher, named) as taught, record_outputs(student, named) as learned:

            def loss(model: nn.Module, batch: Batch) -> Tensor:
                with torch.no_grad():
                    teacher(batch.images)
                value = cross_entropy(model, batch)
                for beta, places, name in zip(betas, PLACES[-len(layers) :], layers, strict=True):
                    scale = learned[name][0, 0].numel() / places
                    value = value + beta * scale * attention_loss(learned[name], taught[name])
                return value

            self._fit(student, task, context, self.epochs, loss)
        return DefenseResult(student, extras={"attention_layers": list(layers)})

    def _fit(self, model: nn.Module, task: DefenseTask, context: Context, epochs: int, loss: Loss) -> None:
        schedule: dict[str, Any] = {
            "schedule": "step",
            "milestones": (3,),
            "gamma": 0.1,
            "lr": self.lr or task.recipe.lr,
        }
        options: dict[str, Any] = {"epochs": epochs, "batch_size": self.batch_size, "weight_decay": 1e-4, **schedule}
        task.fit(model, context, data=task.clean, loss=loss, **options)

    def _chosen_layers(self, model: nn.Module, task: DefenseTask, context: Context) -> tuple[str, ...]:
        """The modules to compare, checked to have informative attention maps."""
        assert task.clean is not None
        images = task.training_data(task.clean.take(torch.arange(min(8, len(task.clean)))), context)
        batch = images.pixels.normalize(images.images.images)
        layers = self.layers or find_blocks(model.eval(), batch)
        with record_outputs(model, {name: name for name in layers}) as outputs, torch.no_grad():
            model(batch)
        for name in layers:
            require_attention(name, outputs[name])
        return tuple(layers)


def find_blocks(model: nn.Module, batch: Tensor) -> tuple[str, ...]:
    """The last hidden activations of the last three resolutions of at least 2x2."""
    names = dict.fromkeys(layer.activation for layer in find_layers(model, batch[:1]) if layer.activation)
    with record_outputs(model, {name: name for name in names}) as outputs, torch.no_grad():
        model(batch)
    last = {
        outputs[name].shape[2:]: name for name in names if outputs[name].ndim == 4 and outputs[name][0, 0].numel() >= 4
    }
    if not last:
        raise ValueError("nad: the network has no map of at least 2x2 behind an activation; name modules in 'layers'")
    return tuple(last.values())[-3:]


def require_attention(name: str, output: Tensor) -> None:
    """Raise `ValueError` for a map on which attention is constant, and so its loss and gradient zero."""
    if output.ndim != 4 or output[0, 0].numel() < 4:
        raise ValueError(
            f"nad: the output of '{name}' is {tuple(output.shape[1:])}; attention needs maps of at least 2x2"
        )
    energy = output.float().square().sum(1).flatten(1)
    if bool((energy.std(1) <= 1e-6 * energy.mean(1)).all()):
        raise ValueError(
            f"nad: the output of '{name}' is constant over its map; its attention loss would always be zero"
        )


def attention(features: Tensor) -> Tensor:
    """Features (B, C, H, W) -> maps (B, H * W) of L2 norm 1: the sum over channels of squares."""
    energy = features.float().square().sum(1).flatten(1)
    norm: Tensor = torch.linalg.vector_norm(energy, dim=1, keepdim=True)
    return energy / (norm + 1e-6)


def attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean over samples and positions of the squared difference of two attention maps."""
    return F.mse_loss(attention(student), attention(teacher))
