"""The training recipe: the hyperparameters of training, and the named recipes of benchmark files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from pydantic import ConfigDict, Field

from backdoor_bench_none.contracts.values import Values
from backdoor_bench_none.seeds import canonical_json

Schedule = Literal["one_cycle", "step", "constant"]


class Recipe(Values):
    """The hyperparameters of training by SGD with momentum, or Adam, and a learning-rate schedule.

    `one_cycle` rises linearly to `lr` over the first `warmup` of all steps and falls linearly to zero. `step`
    multiplies by `gamma` at the start of each epoch in `milestones` (counted from 1, as in the paper's released code).
    `constant` stays at `lr`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(15, ge=1, description="passes over the training set")
    batch_size: int = Field(128, ge=1, description="images per step")
    drop_last: bool = Field(
        True, description="leave out an incomplete last batch of an epoch, unless it is the only one"
    )
    optimizer: Literal["sgd", "adam"] = Field("sgd", description="adam: betas 0.9 and 0.999; momentum has no effect")
    lr: float = Field(0.1, gt=0, description="highest learning rate")
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD momentum")
    nesterov: bool = Field(True, description="Nesterov's form of momentum")
    weight_decay: float = Field(5e-4, ge=0, description="L2 penalty")
    schedule: Schedule = Field("one_cycle", description="how the learning rate changes")
    warmup: float = Field(0.2, ge=0, lt=1, description="share of all steps over which one_cycle rises")
    milestones: tuple[int, ...] = Field((), description="epochs, counted from 1, at which step multiplies by gamma")
    gamma: float = Field(0.1, gt=0, le=1, description="factor of step")
    clip_norm: float | None = Field(None, gt=0, description="highest norm of the gradient, over all parameters")
    augment: bool = Field(True, description="crop and flip where the data set allows it")
    bias_lr_factor: float = Field(
        1.0,
        gt=0,
        description="learning rate of biases, relative to lr; other than 1 also frees biases from weight decay",
    )
    head_lr_factor: float = Field(
        1.0,
        gt=0,
        description="learning rate of the last convolution or linear layer, its bias included, relative to lr",
    )
    precision: Literal["auto", "float32"] = Field(
        "auto", description="auto: bfloat16, with eight significant bits, where the hardware supports it"
    )
    compile: bool = Field(
        False, description="torch.compile the network in plain training; worthwhile only in long runs on a GPU"
    )

    @cached_property
    def identity(self) -> str:
        """All hyperparameters, as canonical JSON."""
        return canonical_json(self.model_dump(mode="json"))

    def batch_sizes(self, samples: int) -> list[int]:
        """The sizes of an epoch's batches.

        A last batch of one sample joins the one before, since BatchNorm may reject it.
        """
        whole, rest = divmod(samples, self.batch_size)
        sizes = [self.batch_size] * whole
        if rest and (not self.drop_last or not whole):
            sizes.append(rest)
        if len(sizes) > 1 and sizes[-1] == 1:
            sizes[-2:] = [sizes[-2] + 1]
        return sizes

    def lr_at(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of step `step`, counted from 0."""
        if self.schedule == "constant":
            return self.lr
        if self.schedule == "step":
            epoch = step // steps_per_epoch + 1
            return float(self.lr * self.gamma ** sum(epoch >= milestone for milestone in self.milestones))
        total = self.epochs * steps_per_epoch
        rise = max(1, round(self.warmup * total))
        if step < rise:
            return self.lr * (step + 1) / rise
        return self.lr * (total - step) / (total - rise + 1)


@dataclass(frozen=True)
class NamedRecipe:
    """The content of a named recipe for one architecture and activation function."""

    #: fields of the recipe
    fields: Mapping[str, Any]
    #: parameters of the architecture that go with them, such as its initial weights
    params: Mapping[str, Any] = field(default_factory=dict)
    #: what deviates from the publication that the recipe is named after, and why; "" if nothing does
    deviation: str = ""


#: The paper's own recipe (released code): 200 epochs at 0.1, divided by 10 at the start of epochs 80 and 160.
PAPER: Mapping[str, Any] = {
    "epochs": 200, "batch_size": 128, "lr": 0.1, "momentum": 0.9, "nesterov": False, "weight_decay": 1e-4,
    "schedule": "step", "milestones": (80, 160), "clip_norm": None,
}  # fmt: skip
#: Names that `recipe:` accepts in a benchmark file.
NAMED_RECIPES = ("default", "paper")
