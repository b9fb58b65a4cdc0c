"""The record of one cell: counts, costs and their provenance."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator

from backdoor_bench_none.contracts.cell import Cell
from backdoor_bench_none.contracts.component import Choice, Component
from backdoor_bench_none.contracts.measures import Counts, Detection, Outcomes

Status = Literal["done", "failed", "timeout", "skipped"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Cost(_Part):
    """The cost of a stage.

    Wall-clock seconds, and the peak memory of its process (CPU) or of the device (CUDA) in bytes.
    """

    seconds: float = Field(ge=0, allow_inf_nan=False)
    peak_memory: int | None = Field(None, ge=0, le=2**53)


class AxisValue(_Part):
    """One component of a cell, with its parameters."""

    name: str
    label: str
    revision: int
    params: dict[str, Any]
    #: hashes of the files it reads
    content: dict[str, str] = {}


class Failure(_Part):
    """Why a cell has no results."""

    type: str
    message: str
    traceback: str | None = None


class Record(_Part):
    """All results of one cell; counts are stored, never shares."""

    schema_version: Literal[1] = Field(1, alias="schema")
    #: also the name of its file
    key: str = Field(pattern=r"^[0-9a-f]{2,64}$")
    title: str
    status: Status
    reason: str | None = None
    axes: dict[str, AxisValue]
    seed: int = Field(ge=-(2**63), lt=2**63)
    recipe: dict[str, Any]
    counts: Counts | None = None
    detection: Detection | None = None
    #: hits of every test image, where they were kept
    outcomes: Outcomes | None = None
    infected: bool | None = None
    #: whether the defense returned the victim as it was
    unchanged: bool = False
    clean_fraction: float = Field(0.0, ge=0, le=1, allow_inf_nan=False)
    metrics: dict[str, float | None] = {}
    extras: dict[str, Any] = {}
    #: triggers found in the network, by attacks that search it: each with its hits and total
    triggers: list[dict[str, Any]] = []
    #: mean training loss of the victim, per epoch; empty where the defense does not start from it
    victim_losses: list[Annotated[float, Field(allow_inf_nan=False)]] = []
    costs: dict[str, Cost] = {}
    defense_stage: str | None = None
    sees_ground_truth: bool = False
    #: the metadata of the data set, for which the data are not needed then
    dataset_info: dict[str, Any] | None = None
    #: keys of the stages behind this record, and the number of poisoned training samples
    upstream: dict[str, str | int | None] = {}
    provenance: dict[str, Any] = {}
    failure: Failure | None = None
    warnings: list[str] = []

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    @field_validator("metrics", "extras", "triggers", "dataset_info", mode="before")
    @classmethod
    def _finite(cls, values: object) -> object:
        """Replace numbers that are not finite by None, since JSON has no such numbers."""
        if isinstance(values, dict):
            return {name: cls._finite(value) for name, value in values.items()}
        if isinstance(values, list | tuple):
            return [cls._finite(value) for value in values]
        if isinstance(values, float) and not math.isfinite(values):
            return None
        return values

    @classmethod
    def of(cls, cell: Cell, key: str, status: Status, **values: Any) -> Self:
        """A record for `cell`, under its key."""
        axes = {axis: _axis_value(choice) for axis, choice in cell.choices.items()}
        return cls(
            key=key, title=cell.title, status=status, axes=axes, seed=cell.seed,
            recipe=cell.recipe.model_dump(mode="json"), dataset_info=asdict(cell.info),
            clean_fraction=cell.defense.component.clean_fraction, **values,
        )  # fmt: skip


def _axis_value(choice: Choice[Component]) -> AxisValue:
    identity = choice.component.identity()
    known = {name: identity.pop(name) for name in ("revision", "params")}
    return AxisValue(name=choice.name, label=choice.label, **known, content=identity)
