"""Base class, input and result of defenses.

The types enforce the threat model: a task object holds only what its reader may know.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch.nn as nn
from pydantic import Field

from backdoor_bench_none.contracts.component import Component
from backdoor_bench_none.contracts.dataset import ImageSet
from backdoor_bench_none.contracts.task import TrainingTask
from backdoor_bench_none.errors import PluginError, TrainingError

if TYPE_CHECKING:
    from torch import Tensor

    from backdoor_bench_none.contracts.attack import PoisonedSamples
    from backdoor_bench_none.contracts.context import Context


class Stage(StrEnum):
    """When a defense acts."""

    #: filters or changes the training set, then trains
    PRE_TRAINING = "pre_training"
    #: changes how a network is trained
    IN_TRAINING = "in_training"
    #: repairs a finished network
    POST_TRAINING = "post_training"


@dataclass(frozen=True, kw_only=True)
class DefenseTask(TrainingTask):
    """The input of a defender: untrusted training data, the trusted images it requests, and the means to train.

    It holds no ground truth about poisoned samples, no trigger and no test set.
    """

    #: trusted images: int(clean_fraction * N) of them, none poisoned; None for a defense that requests none
    clean: ImageSet | None
    #: None unless the defense declares `starts_from_victim`; call `victim` for a copy to work on
    victim_network: nn.Module | None = field(default=None, repr=False)

    def victim(self) -> nn.Module:
        """The network trained on `train` by the cell's recipe without a defense, in eval mode, on the device.

        It is trained once for all defenses of a seed, and available only to defenses that declare `starts_from_victim`.
        """
        if self.victim_network is None:
            raise PluginError("this defense uses the victim without declaring it", "set starts_from_victim = True")
        try:
            return copy.deepcopy(self.victim_network)
        except (TypeError, AttributeError, RuntimeError) as error:
            hint = "keep what cannot be copied, such as generators and locks, out of the network"
            raise TrainingError(f"the network cannot be copied: {error}", hint) from error


@dataclass(frozen=True)
class DefenseResult:
    """What a defense returns: the defended model, and what it detected.

    `flagged` (N,) bool and `scores` (N,) float, where higher is more suspicious, index the original training set.
    """

    model: nn.Module
    flagged: Tensor | None = None
    scores: Tensor | None = None
    #: whether the defense considers the training set or the network attacked
    infected: bool | None = None
    #: numbers and texts for the record
    extras: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class OracleTask(DefenseTask):
    """The input of a defense that declares `sees_ground_truth`: an upper bound, never a competitor.

    The clean training set, its changed samples, the test set and its triggered samples are on the CPU.
    """

    #: which training samples are poisoned (N,) bool
    poisoned: Tensor
    original: ImageSet
    poisoned_samples: PoisonedSamples
    test: ImageSet
    triggered_samples: PoisonedSamples


class Defense(Component):
    """Base of all defenses; subclasses implement `run`.

    `stage` says when the defense acts. `starts_from_victim` says that it starts from the ordinary training of the
    network; that network is trained once for all such defenses, and its seconds are added to the cost unless the
    defense is a repair (`POST_TRAINING`).
    """

    stage: ClassVar[Stage]
    starts_from_victim: ClassVar[bool] = False
    #: whether it is an upper bound that knows which samples are poisoned; every table marks it
    sees_ground_truth: ClassVar[bool] = False
    #: whether the victim itself is a right result, as of a detector; every table marks it, `bbn check` refuses others
    may_return_victim: ClassVar[bool] = False
    #: what `run` returns besides the model
    returns: ClassVar[tuple[Literal["flagged", "scores", "infected"], ...]] = ()

    clean_fraction: float = Field(
        0.0, ge=0, le=0, description="share of the training set granted as trusted clean images"
    )

    @classmethod
    def facts(cls) -> Mapping[str, str]:
        """The stage of the defense, what it starts from, and what it returns."""
        start = "the undefended training" if cls.starts_from_victim else "initial weights"
        clean, fraction = "none", cls.model_fields["clean_fraction"].default
        if fraction:
            clean = f"{fraction:.0%} of the training set, by default"
        returned = ", ".join(("model", *cls.returns))
        facts = {"stage": str(cls.stage), "starts from": start, "clean data": clean, "returns": returned}
        if cls.sees_ground_truth:
            facts["caution"] = "it is told which samples are poisoned"
        return facts

    def adapt(self, model: nn.Module) -> nn.Module:
        """The structure of the returned networks, built from one of the cell's; `model` itself by default."""
        return model

    def run(self, task: DefenseTask, context: Context) -> DefenseResult:
        """The defended model, in train or eval mode, and what the defense detected."""
        raise NotImplementedError
