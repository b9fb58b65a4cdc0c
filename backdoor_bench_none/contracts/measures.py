"""Measurements of a finished network, as counts.

This module does not need torch.
"""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Count(BaseModel):
    """A number of hits out of a total."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    hits: int = Field(ge=0)
    total: int = Field(gt=0, le=2**40)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.hits > self.total:
            raise ValueError(f"{self.hits} hits of {self.total}")
        return self

    @property
    def rate(self) -> float:
        """The share, 0 to 1."""
        return self.hits / self.total


class Counts(BaseModel):
    """The counts behind benign accuracy (BA), attack success rate (ASR) and robust accuracy (RA).

    BA: clean test images classified as their label. ASR: triggered images classified as the attacker's label. RA:
    triggered images classified as their true label. ASR and RA count the test samples whose label the attack would
    change, and are None where there is no trigger.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    benign_accuracy: Count
    attack_success_rate: Count | None
    robust_accuracy: Count | None


class Detection(BaseModel):
    """The training samples that a defense flagged, compared with the poisoned ones.

    AUROC needs scores and samples of both kinds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    true_positive: int = Field(ge=0, le=2**40)
    false_positive: int = Field(ge=0, le=2**40)
    true_negative: int = Field(ge=0, le=2**40)
    false_negative: int = Field(ge=0, le=2**40)
    auroc: float | None = Field(ge=0, le=1, allow_inf_nan=False)
    #: the highest share of poisoned samples found by a threshold that flags at most 1 % of the benign ones
    tpr_at_1_fpr: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)

    @property
    def tpr(self) -> float | None:
        """The share of poisoned samples that were flagged."""
        return _share(self.true_positive, self.false_negative)

    @property
    def fpr(self) -> float | None:
        """The share of benign samples that were flagged."""
        return _share(self.false_positive, self.true_negative)


def _share(part: int, rest: int) -> float | None:
    return part / (part + rest) if part + rest else None


class Outcomes(BaseModel):
    """Whether each test image was a hit, in the order of the test set, as packed bits (`statistics.unpack_outcomes`).

    McNemar's test uses them to compare two defenses on the same images.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: clean test images classified as their label
    benign: str
    #: triggered images classified as the attacker's label; None where there is no trigger
    attacked: str | None


def defense_effectiveness(before: tuple[float, float], after: tuple[float, float]) -> float:
    """DER = (max(0, dASR) - max(0, dBA) + 1) / 2 in [0, 1]: the reduction of ASR less the loss of BA.

    `before` and `after` are (BA, ASR) of the undefended and of the defended network, as fractions of 1. The formula is
    that of BackdoorBench's documentation; its code adds the BA term in places.
    """
    gain, loss = max(0.0, before[1] - after[1]), max(0.0, before[0] - after[0])
    return (gain - loss + 1) / 2
