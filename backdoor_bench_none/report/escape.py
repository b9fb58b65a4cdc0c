"""Escapes names and texts, which may be third-party, for LaTeX, Markdown and CSV: none of them becomes a command."""

from __future__ import annotations

import re

LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--", "±": r"$\pm$", "≈": r"$\approx$",
    "↑": r"$\uparrow$", "↓": r"$\downarrow$", "·": r"$\cdot$", "≤": r"$\leq$", "≥": r"$\geq$", "′": r"$'$",
    "Δ": r"$\Delta$", "−": r"$-$", "’": "'",
}  # fmt: skip
#: the characters with which a spreadsheet lets formulas begin
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


def escape_latex(text: str) -> str:
    """`text` for LaTeX without commands; characters that are neither ASCII nor Latin become a question mark."""
    kept = "".join(LATEX.get(character, character) for character in text.replace("\n", " "))
    return re.sub(r"[^\x20-\x7e\u00a0-\u024f]", "?", kept)


def escape_markdown(text: str) -> str:
    """`text` for a cell of a Markdown table or a line below it, without bars, HTML, links and emphasis."""
    flat = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_|]|\](?=\())", r"\\\1", flat)


def escape_csv(value: object) -> object:
    """`value` with an apostrophe in front if it is a text that a spreadsheet would take for a formula."""
    is_formula = isinstance(value, str) and value.startswith(FORMULA)
    return f"'{value}" if is_formula else value
