"""The schema of a benchmark file."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field

from backdoor_bench_none.contracts.values import Values

#: the path of a value in the file
Location = tuple[str | int, ...]
Fault = tuple[Location, str]

DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([smhd])")
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGTkmgt])(?:i?B)?")
BYTES = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
#: no process that has imported torch works with fewer bytes
LEAST_MEMORY = 256 * 2**20
SEED = re.compile(r"[-+]?\d[\d_]*")
#: bytes that file systems allow in one part of a path
LONGEST_PART = 255


class _Strict(Values):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


def parse_seconds(value: object) -> object:
    """The seconds of a text such as 90s, 30m or 2h; other values as they are."""
    if isinstance(value, str):
        match = DURATION.fullmatch(value.strip())
        if match is None:
            raise ValueError(f"'{value}' is not a duration such as 90s, 30m or 2h")
        return float(match[1]) * SECONDS[match[2]]
    return value


def parse_bytes(value: object) -> object:
    """The bytes of a text such as 500M, 4G or 4GiB; other values as they are."""
    if isinstance(value, str):
        match = SIZE.fullmatch(value.strip())
        if match is None:
            raise ValueError(f"'{value}' is not a size such as 500M, 4G or 4GiB")
        return int(float(match[1]) * BYTES[match[2].upper()])
    return value


def _enough(value: int) -> int:
    if value < LEAST_MEMORY:
        raise ValueError(f"{value:,} bytes are less than a process needs to start; write a unit, as in 16G")
    return value


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


def _seed(value: object) -> object:
    if isinstance(value, str) and not SEED.fullmatch(value):
        raise ValueError(f"'{value}' is no seed; several stand in a list, such as [0, 1, 2]")
    return value


def _one_line(name: str) -> str:
    if "\n" in name or "\t" in name:
        raise ValueError("a name is one line, without tabs")
    return name


def _usable(path: Path) -> Path:
    longest = max((len(os.fsencode(part)) for part in path.parts), default=0)
    if longest > LONGEST_PART:
        raise ValueError(f"a part of the path has {longest} bytes; {LONGEST_PART} are allowed")
    return path


def _named(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


def _name_or_mapping(value: object) -> object:
    if value is None or isinstance(value, str | dict):
        return value
    raise ValueError("a recipe is a name or a mapping")


def _checked_recipe(params: dict[str, Any]) -> dict[str, Any]:
    _name_or_mapping(params.get("recipe"))
    return params


def _flatten(value: object) -> object:
    """Turn `{name: local, slots: 2}` into name and params; executors are written without a `params` level."""
    if isinstance(value, dict) and "name" in value and "params" not in value:
        return {"name": value["name"], "params": {k: v for k, v in value.items() if k != "name"}}
    return _named(value)


OneLine = Annotated[str, AfterValidator(_one_line)]


class Entry(_Strict):
    """One value of an axis: a name, or a mapping with parameters.

    `sweep` makes one entry per combination of its values.
    """

    name: OneLine
    params: dict[str, Any] = {}
    sweep: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}
    label: OneLine | None = Field(None, alias="as")
    recipe: Annotated[str | dict[str, Any] | None, BeforeValidator(_name_or_mapping)] = None


AnEntry = Annotated[Entry, BeforeValidator(_named)]
Entries = Annotated[list[AnEntry], BeforeValidator(_listed), Field(min_length=1)]
Seed = Annotated[int, BeforeValidator(_seed), Field(ge=-(2**63), lt=2**63)]
Names = Annotated[list[str], BeforeValidator(_listed)]


class Matrix(_Strict):
    """The axes that are crossed."""

    dataset: Entries = [Entry(name="digits")]
    attack: Entries
    defense: Entries
    architecture: Entries
    activation: Entries = [Entry(name="relu")]
    trainer: Entries = [Entry(name="centralized")]


class Exclude(_Strict):
    """Cells to leave out: those that match every axis given, by label or name."""

    dataset: Names | None = None
    attack: Names | None = None
    defense: Names | None = None
    architecture: Names | None = None
    activation: Names | None = None
    trainer: Names | None = None
    seed: Annotated[list[Seed], BeforeValidator(_listed)] | None = None
    because: str | None = None


class Budget(_Strict):
    """Limits for each stage of a cell: seconds, and bytes that its process may allocate (Linux, not with CUDA)."""

    cell_timeout: Annotated[float, BeforeValidator(parse_seconds), Field(gt=0)] | None = None
    memory: Annotated[int, BeforeValidator(parse_bytes), Field(gt=0), AfterValidator(_enough)] | None = None


class Config(_Strict):
    """The contents of a benchmark file."""

    version: Literal[1]
    name: OneLine = Field(min_length=1)
    seeds: Annotated[list[Seed], BeforeValidator(_listed), Field(min_length=1)] = [0]
    results: Annotated[Path, AfterValidator(_usable)] = Path("results")
    matrix: Matrix
    include: list[Matrix] = []
    exclude: list[Exclude] = []
    defaults: dict[str, dict[str, Annotated[dict[str, Any], AfterValidator(_checked_recipe)]]] = {}
    metrics: list[AnEntry] = []
    budget: Budget = Budget()
    executor: Annotated[Entry, BeforeValidator(_flatten)] = Entry(name="local")
