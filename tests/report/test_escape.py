"""Texts of strangers stay texts in every output."""

from __future__ import annotations

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backdoor_bench_none.report.escape import FORMULA, LATEX, escape_csv, escape_latex, escape_markdown


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("dp_sgd", r"dp\_sgd"),
        ("50 % & more", r"50 \% \& more"),
        (r"\input{secret}", r"\textbackslash{}input\{secret\}"),
        ("$x^2$ #1 ~", r"\$x\textasciicircum{}2\$ \#1 \textasciitilde{}"),
        ("two\nlines", "two lines"),
        ("BA ↑ ±", r"BA $\uparrow$ $\pm$"),
        ("Trojän", "Trojän"),
        ("木马", "??"),
    ],
)
def test_latex(text: str, escaped: str) -> None:
    assert escape_latex(text) == escaped


@given(st.text())
def test_latex_of_any_text_holds_no_command_but_ours(text: str) -> None:
    escaped = escape_latex(text)
    for replacement in sorted(LATEX.values(), key=len, reverse=True):
        escaped = escaped.replace(replacement, "")
    assert not set(escaped) & set("\\{}$&#%_^~\n")


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a|b", r"a\|b"),
        ("<script>", "&lt;script&gt;"),
        ("[click](javascript:alert(1))", r"[click\](javascript:alert(1))"),
        ("*bold* _it_ `code`", r"\*bold\* \_it\_ \`code\`"),
        ("two\n\n# lines", "two # lines"),
    ],
)
def test_markdown(text: str, escaped: str) -> None:
    assert escape_markdown(text) == escaped


@pytest.mark.parametrize("text", ["=cmd()", "+1", "-1+2", "@SUM(A1)", "\tx", "\rx", "\nx"])
def test_csv_texts_are_no_formulas(text: str) -> None:
    assert escape_csv(text) == f"'{text}"


@pytest.mark.parametrize("value", [-1.5, 3, None, "badnets", "a=b", True])
def test_csv_numbers_and_plain_texts_stay(value: object) -> None:
    assert escape_csv(value) is value


@given(st.text())
def test_no_csv_text_begins_a_formula(text: str) -> None:
    escaped = str(escape_csv(text))
    assert not escaped.startswith(FORMULA)
    out = io.StringIO(newline="")
    csv.writer(out).writerow([escaped, "next"])
    if "\r" not in text and "\n" not in text and "\0" not in text:
        assert next(csv.reader(io.StringIO(out.getvalue(), newline=""))) == [escaped, "next"]
