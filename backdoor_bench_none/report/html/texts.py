"""Texts and numbers of strangers, made fit to be shown; escaping them for HTML or JSON comes after."""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Hashable
from typing import Any, Generic, TypeVar

from backdoor_bench_none.results.metrics import Metric

#: characters of a label, of any other line, and of a traceback
LABEL, LINE, LONG = 120, 1000, 4000
#: from here on numbers are shown with an exponent
HUGE = 1e9
T = TypeVar("T", bound=Hashable)


def clean_line(value: object, length: int = LINE) -> str:
    """One line of at most `length` characters; control characters, and those that turn the direction of text, become
    a replacement character.
    """
    text = str(value)
    flat = " ".join(map(_clean, text[: 4 * length].split()))
    return flat if len(flat) <= length and len(text) <= 4 * length else f"{flat[: length - 1]}…"


def clean_lines(text: str, length: int = LONG) -> str:
    """As `clean_line`, with its line breaks; of a long text the end is kept."""
    kept = text if len(text) <= length else f"…{text[1 - length :]}"
    return "\n".join(_clean(line) for line in kept.replace("\t", "    ").splitlines())


def _clean(text: str) -> str:
    return text if text.isprintable() else "".join("�" if _is_control(c) else c for c in text)


def _is_control(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def clean_value(value: object) -> str:
    """A parameter or the like: texts as they are, everything else as JSON."""
    if isinstance(value, str):
        return clean_line(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    return clean_line(json.dumps(value, ensure_ascii=False, default=str))


def finite(value: float | None) -> float | None:
    """`value`, unless it is not a finite number."""
    try:
        return value if value is not None and math.isfinite(value) else None
    except OverflowError:
        return None


def show_number(value: float | None, metric: Metric) -> str:
    """As the metric shows it; with an exponent where that would fill the page, and a dash where there is no number."""
    if (number := finite(value)) is None:
        return "–"
    text = f"{number * metric.scale:.3g}" if abs(number * metric.scale) >= HUGE else metric.show(number)
    return text.removeprefix("-") if not text.strip("-0.") else text


class Pool(Generic[T]):
    """Values that stand once and are called by their number."""

    def __init__(self) -> None:
        self._numbers: dict[T, int] = {}

    def add(self, value: T) -> int:
        """Its number."""
        return self._numbers.setdefault(value, len(self._numbers))

    def values(self) -> list[Any]:
        """All of them, by number."""
        return list(self._numbers)
