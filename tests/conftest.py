"""A tiny benchmark on real digits, and the console in this process, without the plugins that happen to be installed."""

from __future__ import annotations

import os

# one thread each: workers of pytest-xdist share the cores, and equal seeds give equal numbers for equal thread counts
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from importlib.metadata import entry_points
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from backdoor_bench_none.cli.main import run_cli
from backdoor_bench_none.contracts.cell import AXES
from backdoor_bench_none.contracts.markers import PROJECT
from backdoor_bench_none.contracts.measures import Count, Counts
from backdoor_bench_none.contracts.record import AxisValue, Cost, Record
from backdoor_bench_none.executors.local import start_process_server
from backdoor_bench_none.planning.plan import Plan, make_plan
from backdoor_bench_none.registry.components import Registry

# Tests see only the plugins that they install themselves, and so do the processes they start. It is set on import,
# and not by a fixture, for the fixtures of a module or session and for the server that workers are forked from.
INSTALLED = sorted({point.dist.name for point in entry_points(group=PROJECT) if point.dist is not None})
os.environ["BBN_DISABLE_PLUGINS"] = ",".join(INSTALLED)

TINY = {
    "dataset": "{name: digits, params: {image_size: 8}}",
    "attack": "badnets",
    "defense": "no_defense, none",
    "architecture": "{name: mlp, params: {hidden: 16, depth: 1}}",
    "activation": "relu",
}


class Said(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def write_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes a benchmark file that runs in seconds into an empty folder, the
    current one from then on; keywords are axes as YAML, `rest` more YAML.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def write(seeds: str = "0", rest: str = "", epochs: int = 1, file: str = "benchmark.yaml", **axes: str) -> Path:
        matrix = "".join(f"  {axis}: [{value}]\n" for axis, value in {**TINY, **axes}.items())
        recipe = (
            f"defaults: {{dataset: {{digits: {{recipe: {{epochs: {epochs}}}}}}}, defense: {{none: {{epochs: 1}}}}}}\n"
        )
        path = tmp_path / file
        path.write_text(f"version: 1\nname: tiny\nseeds: [{seeds}]\nmatrix:\n{matrix}{recipe}{rest}")
        return path

    return write


@pytest.fixture
def tiny_plan(write_benchmark: Callable[..., Path]) -> Callable[..., Plan]:
    """The plan of what `write_benchmark` writes."""
    return lambda **keywords: make_plan(path := write_benchmark(**keywords), Registry.default(path.parent))


@pytest.fixture
def bbn(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """Runs `bbn` with these arguments in this process."""

    def run(*arguments: object) -> Said:
        capsys.readouterr()
        code = run_cli([str(argument) for argument in arguments])
        return Said(code, *capsys.readouterr())

    return run


@pytest.fixture
def disable_plugins(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """Sets `BBN_DISABLE_PLUGINS` to a value, and returns the names of what is hidden besides: everything installed."""

    def disable(value: str) -> list[str]:
        monkeypatch.setenv("BBN_DISABLE_PLUGINS", ",".join([value, *INSTALLED]))
        return INSTALLED

    return disable


@pytest.fixture(scope="session")
def processes() -> BaseContext:
    """Fresh processes that have imported what they need."""
    return start_process_server()


@pytest.fixture
def make_record() -> Callable[..., Record]:
    """Builds a record: `ba` and `asr` as hits of 100, `seconds` by stage, labels of axes, and any of its fields."""

    def make(
        key: str = "0123456789abcdef",
        ba: int | None = 90,
        asr: int | None = 80,
        seconds: dict[str, float] | None = None,
        axes: dict[str, str] | None = None,
        **fields: Any,
    ) -> Record:
        labels = {"dataset": "digits", "attack": "badnets", "defense": "none", "architecture": "mlp",
                  "activation": "relu", "trainer": "centralized", **(axes or {})}  # fmt: skip
        values = {axis: AxisValue(name=labels[axis], label=labels[axis], revision=1, params={}) for axis in AXES}
        if ba is not None:
            triggered = None if asr is None else Count(hits=asr, total=100)
            fields["counts"] = Counts(
                benign_accuracy=Count(hits=ba, total=100), attack_success_rate=triggered, robust_accuracy=triggered
            )
        costs = {stage: Cost(seconds=value) for stage, value in (seconds or {"defense": 1.0}).items()}
        given = {"status": "done", "seed": 0, **fields}
        return Record(key=key, title="a cell", axes=values, recipe={}, costs=costs, **given)

    return make


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what `tests/campaign` tried and what was survived."""
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", ()):
                if name == "campaign" and report.when == "call":
                    what, tried, survived = value
                    terminalreporter.write_line(f"campaign: {what}: {tried} tried, {survived} survived")
