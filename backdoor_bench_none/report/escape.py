"""Names and texts come from strangers: each output has its way to keep them from being read as commands."""

from __future__ import annotations

import re

LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--", "±": r"$\pm$", "≈": r"$\approx$",
    "↑": r"$\uparrow$", "↓": r"$\downarrow$", "·": r"$\cdot$", "≤": r"$\leq$", "≥": r"$\geq$", "′": r"$'$",
    "Δ": r"$\Delta$", "−": r"$-$", "’": "'",
}  # fmt: skip
#: what a spreadsheet takes for the beginning of a formula
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


def escape_latex(text: str) -> str:
    """`text` for LaTeX: nothing in it is a command; other characters than Latin letters become a question mark."""
    kept = "".join(LATEX.get(character, character) for character in text.replace("\n", " "))
    return re.sub(r"[^\x20-\x7e\u00a0-\u024f]", "?", kept)


def escape_markdown(text: str) -> str:
    """`text` for a cell of a Markdown table or a line below it: no bars, no HTML, no links, no emphasis."""
    flat = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_|]|\](?=\())", r"\\\1", flat)


def escape_csv(value: object) -> object:
    """A text that a spreadsheet would compute gets an apostrophe in front; numbers stay as they are."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value
