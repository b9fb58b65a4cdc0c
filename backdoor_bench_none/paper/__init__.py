"""The paper's experiments: benchmark files for its tables and figures, and the drawing of its figures."""

from __future__ import annotations

from pathlib import Path

from backdoor_bench_none.errors import ConfigError, did_you_mean
from backdoor_bench_none.paper.experiments import Scale, benchmark_of, read_tables

#: files of what is no row of a table
FOLDER = Path(__file__).parent / "benchmarks"


def benchmark_names() -> list[str]:
    """The tables and figures that have a benchmark file."""
    return [*read_tables(), *sorted(path.stem for path in FOLDER.glob("*.yaml"))]


def benchmark_text(name: str, scale: Scale = "full") -> str:
    """The benchmark file of a table or figure, such as `table4`; `ConfigError` if there is none at this scale."""
    if name not in benchmark_names():
        raise ConfigError(f"there is no benchmark file '{name}' of the paper", did_you_mean(name, benchmark_names()))
    if name in read_tables():
        return benchmark_of(name, scale)
    if scale != "full":
        raise ConfigError(f"'{name}' has no scale '{scale}'; tables have")
    return (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
