"""Wording shared by messages, and where their lines break."""

from __future__ import annotations

import re
import shutil
import sys
import textwrap

#: nouns whose plural is not the singular with an s
IRREGULAR = {"index": "indices", "entry": "entries", "memory": "memories"}
#: the first column of a line that has several, with the gap behind it
FIRST_COLUMN = re.compile(r" *\S+(?: \S+)* {2,}")
#: columns by which the rest of another line is indented
INDENT = 4


def plural(word: str, count: int) -> str:
    """`count` and `word`, in the singular for one and in the plural otherwise: `plural("seed", 2)` is "2 seeds"."""
    if count == 1:
        return f"1 {word}"
    return f"{count:,} {many(word)}"


def many(word: str) -> str:
    """The plural of a noun phrase, formed on its last word: "poisoned set" gives "poisoned sets"."""
    start, space, last = word.rpartition(" ")
    return f"{start}{space}{IRREGULAR.get(last, f'{last}s')}"


def wrap(text: str) -> str:
    """`text` with lines wider than the terminal broken between words; the rest is aligned below the second column.

    Output to a file or a pipe stays as it is, one message a line, and a word that is wider than the terminal stays
    whole.
    """
    width = terminal_width()
    if width is None:
        return text
    lines: list[str] = []
    for line in text.split("\n"):
        if len(line) <= width:
            lines.append(line)
        else:
            lines += _break(line, width)
    return "\n".join(lines)


def terminal_width() -> int | None:
    """The columns of the terminal, or of the variable COLUMNS; None where the output goes to a file or a pipe."""
    if not sys.stdout.isatty():
        return None
    return shutil.get_terminal_size().columns


def _break(line: str, width: int) -> list[str]:
    column = FIRST_COLUMN.match(line)
    widest_word = max(map(len, line.split()))
    indent = INDENT
    if column is not None and column.end() <= min(width // 3, width - widest_word):
        indent = column.end()
    return textwrap.wrap(line, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)
