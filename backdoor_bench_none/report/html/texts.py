"""Makes third-party texts and numbers fit to be shown; they are escaped for HTML or JSON afterwards."""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Hashable
from typing import Any, Generic, TypeVar

from backdoor_bench_none.results.metrics import Metric

#: the most characters of a label, of any other line, and of a traceback
LABEL, LINE, LONG = 120, 1000, 4000
#: numbers from this on are shown with an exponent
HUGE = 1e9
T = TypeVar("T", bound=Hashable)


def clean_line(value: object, length: int = LINE) -> str:
    """One line of at most `length` characters; control characters, and those that change the direction of text, become
    a replacement character.
    """
    text = str(value)
    flat = " ".join(map(_clean, text[: 4 * length].split()))  # bounded, since a hostile text may be huge
    if len(flat) <= length and len(text) <= 4 * length:
        return flat
    return f"{flat[: length - 1]}…"


def clean_lines(text: str, length: int = LONG) -> str:
    """The text as `clean_line` shows it, but with its line breaks; of a long text the end is kept."""
    if len(text) > length:
        text = f"…{text[1 - length :]}"
    return "\n".join(map(_clean, text.replace("\t", "    ").splitlines()))


def _clean(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(map(_as_visible, text))


def _as_visible(character: str) -> str:
    is_control = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
    return "�" if is_control else character


def clean_value(value: object) -> str:
    """A parameter or another value as a line: texts unchanged, other values as JSON."""
    if isinstance(value, str):
        return clean_line(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    return clean_line(json.dumps(value, ensure_ascii=False, default=str))


def finite(value: float | None) -> float | None:
    """`value`, or None where it is not a finite number."""
    if value is None:
        return None
    try:
        if math.isfinite(value):
            return value
    except OverflowError:  # an integer that no float can hold
        pass
    return None


def show_number(value: float | None, metric: Metric) -> str:
    """A number as its metric shows it; from `HUGE` on with an exponent, and a dash where there is no finite number."""
    number = finite(value)
    if number is None:
        return "–"
    text = metric.show(number)
    if abs(number * metric.scale) >= HUGE:
        text = f"{number * metric.scale:.3g}"
    if not text.strip("-0."):  # a zero
        return text.removeprefix("-")
    return text


class Pool(Generic[T]):
    """Values that are stored once and referred to by number."""

    def __init__(self) -> None:
        self._numbers: dict[T, int] = {}

    def add(self, value: T) -> int:
        """Store a value unless it is known, and return its number."""
        return self._numbers.setdefault(value, len(self._numbers))

    def numbers(self) -> dict[T, int]:
        """The number of each value."""
        return dict(self._numbers)

    def values(self) -> list[Any]:
        """All values, by number."""
        return list(self._numbers)
