"""Base of everything that is read from a benchmark file: a number is a finite number, not a truth value."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ValidationInfo, field_validator

#: a number as a text
NUMBER = re.compile(r"\s*[-+]?\d[\d_]*(\.\d*)?([eE][-+]?\d+)?\s*")
#: the types that are judged here; a field that accepts others judges its values itself
PLAIN = {int, float, bool, str, type(None)}


class Values(BaseModel):
    """Validated values; pydantic alone would take `true` for 1, infinity for a number, and "0-4" for -4."""

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_numbers(cls, value: object, info: ValidationInfo) -> object:
        types = _accepted(cls, str(info.field_name))
        if types & {int, float} and types <= PLAIN:
            for leaf in _leaves(value):
                _check_leaf(leaf, types)
        return value


def _check_leaf(leaf: object, types: frozenset[Any]) -> None:
    if isinstance(leaf, bool) and bool not in types:
        raise ValueError(f"{str(leaf).lower()} is a truth value, not a number")
    if isinstance(leaf, float) and not math.isfinite(leaf):
        raise ValueError(f"{leaf} is not a finite number")
    if isinstance(leaf, str) and not types & {str, bool} and not NUMBER.fullmatch(leaf):
        raise ValueError(f"'{leaf}' is not a number")


@cache
def _accepted(model: type[BaseModel], name: str) -> frozenset[Any]:
    """The types that a field accepts, also inside lists and mappings; a validator before it may read texts."""
    field = model.model_fields[name]
    return frozenset(_types(Annotated[field.annotation, None, *field.metadata]))


def _types(annotation: Any) -> Iterator[Any]:  # noqa: ANN401
    origin = get_origin(annotation)
    if origin is Literal:
        yield from map(type, get_args(annotation))
    elif origin is Annotated:
        inner, *metadata = get_args(annotation)
        yield from _types(inner)
        if any(isinstance(each, BeforeValidator) for each in metadata):
            yield str
    elif origin in (Union, UnionType) or (origin is not None and get_args(annotation)):
        for argument in get_args(annotation):
            yield from _types(argument)
    elif annotation is not Ellipsis:
        yield annotation


def _leaves(value: object) -> Iterator[object]:
    if isinstance(value, Mapping):
        for each in value.values():
            yield from _leaves(each)
    elif isinstance(value, list | tuple | set | frozenset):
        for each in value:
            yield from _leaves(each)
    else:
        yield value
