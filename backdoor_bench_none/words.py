"""Wording shared by messages."""

from __future__ import annotations

#: nouns whose plural is not the singular with an s
IRREGULAR = {"index": "indices", "entry": "entries", "memory": "memories"}


def plural(word: str, count: int) -> str:
    """`count` and `word`, in the singular for one and in the plural otherwise: `plural("seed", 2)` is "2 seeds"."""
    if count == 1:
        return f"1 {word}"
    return f"{count:,} {many(word)}"


def many(word: str) -> str:
    """The plural of a noun phrase, formed on its last word: "poisoned set" gives "poisoned sets"."""
    start, space, last = word.rpartition(" ")
    return f"{start}{space}{IRREGULAR.get(last, f'{last}s')}"
