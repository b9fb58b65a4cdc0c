"""Breaks the long lines of messages between words, where the width of the terminal is known."""

from __future__ import annotations

import re
import shutil
import sys
import textwrap

#: the first column of a line that has several, with the gap behind it
FIRST_COLUMN = re.compile(r" *\S+(?: \S+)* {2,}")
#: columns by which the rest of another line is indented
INDENT = 4


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
