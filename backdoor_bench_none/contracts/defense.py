"""What a defense is, what it is given, and what it returns: the threat model, as types."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from backdoor_bench_none.contracts.component import Component
from backdoor_bench_none.contracts.dataset import ImageSet
from backdoor_bench_none.contracts.task import TrainingTask
from backdoor_bench_none.errors import PluginError

if TYPE_CHECKING:
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
    """What a defender has: untrusted training data, the trusted images it asked for, and the means to train.

    There is no ground truth of what is poisoned in here, no trigger and no test set.
    """

    #: trusted images: int(clean_fraction * N) of them, none poisoned; None for a defense that asks for none
    clean: ImageSet | None
    #: None unless the defense declares `starts_from_victim`; call `victim` for a copy to work on
    victim_network: nn.Module | None = field(default=None, repr=False)

    def victim(self) -> nn.Module:
        """The network trained on `train` by the cell's recipe without a defense, in eval mode, on the device.

        It is trained once for all defenses of a seed; only a defense that declares `starts_from_victim` gets it.
        """
        if self.victim_network is None:
            raise PluginError("this defense asks for the victim without saying so", "set starts_from_victim = True")
        return copy.deepcopy(self.victim_network)


@dataclass(frozen=True)
class DefenseResult:
    """What a defense returns. `flagged` (N,) bool and `scores` (N,) float,
    higher is more suspicious, index the original training set.
    """

    model: nn.Module
    flagged: Tensor | None = None
    scores: Tensor | None = None
    #: whether the defense says that the training set or the network is attacked
    infected: bool | None = None
    #: numbers and texts for the record
    extras: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class OracleTask(DefenseTask):
    """What a defense that declares `sees_ground_truth` is given: an upper bound, never a competitor.

    The clean training set, the samples of it that were changed, the test set and its triggered samples are on the CPU.
    """

    #: which training samples are poisoned (N,) bool
    poisoned: Tensor
    original: ImageSet
    poisoned_samples: PoisonedSamples
    test: ImageSet
    triggered_samples: PoisonedSamples


class Defense(Component):
    """Base of all defenses: write `run`.

    `stage` says when it acts. `starts_from_victim` says that it begins with the ordinary training of the network; core
    trains that network once for all defenses that do, and adds its seconds to the cost unless the defense is a repair
    (`POST_TRAINING`).
    """

    stage: ClassVar[Stage]
    starts_from_victim: ClassVar[bool] = False
    #: whether it is an upper bound that is told which samples are poisoned; every table says so
    sees_ground_truth: ClassVar[bool] = False
    #: what `run` returns besides the model
    returns: ClassVar[tuple[Literal["flagged", "scores", "infected"], ...]] = ()

    clean_fraction: float = Field(
        0.0, ge=0, le=0, description="share of the training set granted as trusted clean images"
    )

    @classmethod
    def facts(cls) -> Mapping[str, str]:
        """Its stage, what it starts from, and what it returns."""
        start = "the undefended training" if cls.starts_from_victim else "initial weights"
        clean = cls.model_fields["clean_fraction"].default
        return {
            "stage": cls.stage,
            "starts from": start,
            "clean data": f"{clean:.0%} of the training set, by default" if clean else "none",
            "returns": ", ".join(("model", *cls.returns)),
            **({"beware": "it is told which samples are poisoned"} if cls.sees_ground_truth else {}),
        }

    def adapt(self, model: nn.Module) -> nn.Module:
        """The structure of the networks this defense returns, made of one of the cell's; the same by default."""
        return model

    def run(self, task: DefenseTask, context: Context) -> DefenseResult:
        """Return a model, in eval mode or not, and what was found out on the way."""
        raise NotImplementedError
