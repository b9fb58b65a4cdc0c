"""Whose component a failure may be due to."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

from backdoor_bench_none.contracts.cell import Cell
from backdoor_bench_none.contracts.job import CELL, Outcome
from backdoor_bench_none.planning.plan import make_plan
from backdoor_bench_none.planning.stage_table import STAGES
from backdoor_bench_none.registry.components import Registry
from backdoor_bench_none.registry.plugins import Plugins
from backdoor_bench_none.run.blame import name_suspects

#: kind -> what a package of a stranger has in its one module
SOURCES = {
    "attack": "from bbn_attacks.badnets import BadNets as Base",
    "defense": "from bbn_defenses.no_defense import NoDefense as Base",
    "architecture": "from backdoor_bench_none.models.mlp import MLP as Base",
    "activation": "from backdoor_bench_none.models.activations import ReLU as Base",
}
SOURCE = '''
from backdoor_bench_none import hookimpl
{imports}

class Strange(Base):
    """Is a stranger's."""

@hookimpl
def bbn_{kind}s():
    return {{"strange_{kind}": Strange}}
'''
BENCHMARK = """\
version: 1
name: test
matrix:
  dataset: [{name: digits, params: {image_size: 8}}]
  attack: [badnets, strange_attack]
  defense: [no_defense, strange_defense]
  architecture: [mlp, strange_architecture]
  activation: [relu, strange_activation]
"""


class Strangers:
    """Four packages, one for each of four axes, and the cells that they are in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.registry = Registry(Plugins())
        (folder / "benchmark.yaml").write_text(BENCHMARK)
        self.cells = make_plan(folder / "benchmark.yaml", self.registry).cells

    def cell(self, *strange: str) -> Cell:
        """The cell with the strangers' components on these axes and built-ins on the others."""
        return next(
            cell
            for cell in self.cells
            if all((cell.choices[axis].name == f"strange_{axis}") == (axis in strange) for axis in SOURCES)
        )

    def suspects(self, outcome: Outcome, *strange: str) -> list[str]:
        return name_suspects(self.cell(*strange), outcome, self.registry)

    def traceback(self, *kinds: str) -> str:
        """A traceback through the files of these packages."""
        frames = [f'  File "{self.folder / kind / f"strange_{kind}.py"}", line 3, in run' for kind in kinds]
        return "\n".join(["Traceback (most recent call last):", *frames, "ValueError: it broke"])


@pytest.fixture
def strangers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Strangers]:
    for number, (kind, imports) in enumerate(SOURCES.items()):
        dist_info = tmp_path / kind / f"dist_{kind}-1.{number}.dist-info"
        dist_info.mkdir(parents=True)
        (tmp_path / kind / f"strange_{kind}.py").write_text(SOURCE.format(imports=imports, kind=kind))
        (dist_info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: dist-{kind}\nVersion: 1.{number}\n")
        (dist_info / "entry_points.txt").write_text(f"[backdoor_bench_none]\nplug_{kind} = strange_{kind}\n")
        monkeypatch.syspath_prepend(str(tmp_path / kind))
    yield Strangers(tmp_path)
    for kind in SOURCES:
        sys.modules.pop(f"strange_{kind}", None)


def named(kind: str) -> str:
    version = f"1.{list(SOURCES).index(kind)}"
    return f"{kind} 'strange_{kind}' of plugin 'plug_{kind}' (dist-{kind} {version})"


ALL = tuple(SOURCES)
#: kind of job -> whose code runs in it, by axis; None for a job of which that is not known
AT_WORK: dict[str | None, tuple[str, ...]] = {
    None: ALL,
    CELL: ALL,
    "victim": ("attack", "architecture", "activation"),
    "benign": ("architecture", "activation"),
    "backbone": ("architecture", "activation"),
    "poison": ("attack",),
    "crafter": ("attack",),
    "data": (),
}


def test_built_ins_are_not_named(strangers: Strangers) -> None:
    assert strangers.suspects(Outcome("failed", kind="cell")) == []
    assert strangers.suspects(Outcome("failed", traceback=strangers.traceback("attack"), kind="cell")) == []


@pytest.mark.parametrize("kind", ALL)
def test_the_one_stranger_is_named_with_distribution_and_version(kind: str, strangers: Strangers) -> None:
    assert strangers.suspects(Outcome("failed", kind="cell"), kind) == [named(kind)]


@pytest.mark.parametrize("job", AT_WORK)
@pytest.mark.parametrize("status", ["failed", "timeout"])
def test_without_a_traceback_all_that_were_at_work_are_named(
    status: Literal["failed", "timeout"], job: str | None, strangers: Strangers
) -> None:
    """A process that was killed or hung leaves none."""
    suspects = strangers.suspects(Outcome(status, kind=job), *ALL)
    assert sorted(suspects) == sorted(map(named, AT_WORK[job]))


@pytest.mark.parametrize("guilty", [("attack",), ("defense",), ("architecture", "activation")])
def test_a_traceback_acquits_the_others(guilty: tuple[str, ...], strangers: Strangers) -> None:
    outcome = Outcome("failed", traceback=strangers.traceback(*guilty), kind="cell")
    assert strangers.suspects(outcome, *ALL) == [named(kind) for kind in guilty]


def test_a_traceback_that_shows_no_stranger_acquits_nobody(strangers: Strangers) -> None:
    """Core raises when a defense returned what it may not."""
    outcome = Outcome("failed", traceback='  File "stages.py", line 1, in run\nTypeError', kind="cell")
    assert sorted(strangers.suspects(outcome, "attack", "defense")) == sorted([named("attack"), named("defense")])


def test_whoever_was_not_at_work_is_not_named_even_if_a_traceback_shows_them(strangers: Strangers) -> None:
    outcome = Outcome("failed", traceback=strangers.traceback("defense", "attack"), kind="poison")
    assert strangers.suspects(outcome, *ALL) == [named("attack")]


def test_these_are_all_kinds_of_jobs() -> None:
    assert set(AT_WORK) == {None, CELL, *(stage.name for stage in STAGES if stage.shared)}
