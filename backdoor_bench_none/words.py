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
#: characters of one message on a terminal, and of the whole of it in a record
LONGEST_LINE, LONGEST_TEXT = 2_000, 2**16
#: characters that steer a terminal or turn the order of a text, and halves of characters, which no file can hold
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def has_control_characters(text: str) -> bool:
    """Whether `text` has a character that steers a terminal; tabs and ends of lines do not count."""
    return CONTROL.search(text) is not None


def visible(text: str) -> str:
    """`text` with its control characters written as in Python, such as `\\x1b`."""
    return CONTROL.sub(lambda character: ascii(character[0])[1:-1], text)


def plural(word: str, count: int) -> str:
    """`count` and `word`, in the singular for one and in the plural otherwise: `plural("seed", 2)` is "2 seeds"."""
    if count == 1:
        return f"1 {word}"
    return f"{count:,} {many(word)}"


def many(word: str) -> str:
    """The plural of a noun phrase, formed on its last word: "poisoned set" gives "poisoned sets"."""
    start, space, last = word.rpartition(" ")
    return f"{start}{space}{IRREGULAR.get(last, f'{last}s')}"


def shorten(text: str, limit: int) -> str:
    """`text` within `limit` characters: of a longer one the start and the end, with what is left out counted."""
    if len(text) <= limit:
        return text
    half = (limit - 40) // 2
    return f"{text[:half]} … {len(text) - 2 * half:,} characters … {text[-half:]}"


def text_of(error: BaseException) -> str:
    """The message of any exception within `LONGEST_TEXT` characters, without control characters."""
    try:
        text = str(error)
    except Exception as second:  # third-party code may raise anything
        return f"its message cannot be read, which raises {visible(type(second).__name__)}"
    return visible(shorten(text, LONGEST_TEXT))


def describe_error(error: BaseException) -> str:
    """The type and the message of any exception, in one line of at most `LONGEST_LINE` characters."""
    return shorten(f"{visible(type(error).__name__)}: {' '.join(text_of(error).split())}", LONGEST_LINE)


def wrap(text: str) -> str:
    """`text` with lines wider than the terminal broken between words; the rest is aligned below the second column.

    Output to a file or a pipe stays as it is, one message a line, and a word that is wider than the terminal stays
    whole. Control characters are made visible.
    """
    text = visible(text)
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
