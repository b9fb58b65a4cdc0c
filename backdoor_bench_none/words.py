"""Small pieces of text that messages share."""

from __future__ import annotations

#: nouns whose plural is not the singular with an s
IRREGULAR = {"index": "indices", "entry": "entries", "memory": "memories"}


def plural(word: str, count: int) -> str:
    """`count` and `word`, in the plural unless there is one: `plural("seed", 2)` is "2 seeds"."""
    return f"{count:,} {word if count == 1 else many(word)}"


def many(word: str) -> str:
    """The plural of a noun phrase, which is formed on its last word: "poisoned set" gives "poisoned sets"."""
    start, space, last = word.rpartition(" ")
    return f"{start}{space}{IRREGULAR.get(last, f'{last}s')}"
