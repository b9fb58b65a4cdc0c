"""LaTeX output is compiled, hostile labels and all."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from backdoor_bench_none.contracts.record import Record
from backdoor_bench_none.report.comparison import compare_defenses
from backdoor_bench_none.report.tables import render, render_table
from backdoor_bench_none.results.measurement import Measurement
from backdoor_bench_none.results.rows import rows_of_measurements

PDFLATEX = shutil.which("pdflatex")
#: what each would do if it were read as LaTeX: end the run, read a file, open a formula, begin a comment
HOSTILE = (r"\end{document}", r"\input{/etc/hostname}", "$x_1^2", "50 % & more # {", "~^\\", "line\nbreak ′ Δ ≤ 木")


@pytest.mark.skipif(PDFLATEX is None, reason="there is no pdflatex")
def test_tables_compile(make_record: Callable[..., Record], tmp_path: Path) -> None:
    labels = ["none", "nad", *HOSTILE]
    records = [
        make_record(f"{number:015x}{seed}", ba=90 - number + seed, asr=number, seed=seed, axes={"defense": label})
        for number, label in enumerate(labels)
        for seed in (0, 1)
    ]
    records.append(make_record("f" * 16, ba=None, status="failed", reason=HOSTILE[0], axes={"defense": "abl"}))
    rows = rows_of_measurements(map(Measurement.of, records))
    tables = [render(rows, "latex"), render_table(compare_defenses(rows, "none", HOSTILE[2], tmp_path), "latex")]
    body = "\n\n".join(tables)
    source = rf"""\documentclass{{article}}
\usepackage[T1]{{fontenc}}
\usepackage{{booktabs}}
\begin{{document}}
{body}
\end{{document}}
"""
    (tmp_path / "table.tex").write_text(source, encoding="utf-8")
    command = [str(PDFLATEX), "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", "table.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "table.pdf").stat().st_size > 10_000
    assert "Undefined control sequence" not in done.stdout
