"""The numbers of the paper's tables beside those of a results folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from backdoor_bench_none.contracts.cell import AXES, Cell
from backdoor_bench_none.contracts.record import Record
from backdoor_bench_none.errors import ConfigError
from backdoor_bench_none.paper.experiments import Experiment, experiments_of, find_table
from backdoor_bench_none.paper.presets import benchmark_text
from backdoor_bench_none.planning.reading import parse_config
from backdoor_bench_none.report.comparison import Table
from backdoor_bench_none.results.metrics import METRICS
from backdoor_bench_none.results.rows import Row
from backdoor_bench_none.results.store import Store

if TYPE_CHECKING:
    from backdoor_bench_none.registry.components import Registry


@dataclass(frozen=True)
class _Candidate:
    """A row here with the components of an experiment, and its record of one seed."""

    row: Row
    record: Record


def compare_with_paper(
    rows: Sequence[Row], store: Store, registry: Registry, name: str, *, near: bool = False
) -> Table:
    """Each row of a table of the paper beside the row here that is the same cell; a dash where there is none.

    The same means every component with its parameters, and the recipe; seeds may differ. With `near`, a row without
    such a cell is shown beside the one that differs in the fewest values, which are named; `ConfigError` if there is
    none at all.
    """
    experiments = experiments_of(name)
    cells = _plan_cells(name, registry)
    candidates = _read_candidates(rows, store)
    described = [key for key in experiments[0].row if key not in ("ba", "asr")]
    lines: list[list[str]] = []
    marks: dict[str, str] = {}
    exact: list[Row] = []
    close: list[Row] = []
    for experiment in experiments:
        ours, differences = _closest(experiment, cells.get(experiment.labels), candidates)
        if ours is not None and differences:
            close.append(ours)
        elif ours is not None:
            exact.append(ours)
        if differences and not near:
            ours, differences = None, []
        line = [*(str(experiment.row[key]) for key in described), *_numbers(experiment.row, ours)]
        if near:
            line.append(_mark("; ".join(differences), marks))
        lines.append(line)
    if near and not exact + close:
        raise ConfigError(f"no cell here has the components of a row of {name}", "`bbn init --from` writes its file")
    header = [*described, "paper BA / ASR", "ours BA / ASR", "difference", "seeds"]
    notes = [f"{len(exact)} of {len(lines)} rows of the paper have the same cell here; percent, differences in points"]
    if near:
        header.append("differs")
        notes += [f"{mark} {text}" for text, mark in marks.items()]
    elif close:
        notes.append(f"--near shows {len(close)} more beside cells that differ, with the differences")
    reasons = dict.fromkeys(experiment.unavailable for experiment in experiments if experiment.unavailable)
    notes += [f"cannot be repeated: {reason}" for reason in reasons]
    return Table(f"{name}: {find_table(name)['caption']}", header, lines, notes)


def _plan_cells(name: str, registry: Registry) -> dict[tuple[str, ...], Cell]:
    """The cells of the table's benchmark file by their labels; the data sets need not be on this machine."""
    from backdoor_bench_none.planning.plan import plan_config

    config, source = parse_config(benchmark_text(name), f"{name}.yaml")
    plan = plan_config(config, source, registry)
    return {tuple(cell.choices[axis].label for axis in AXES): cell for cell in plan.cells}


def _read_candidates(rows: Sequence[Row], store: Store) -> dict[tuple[str, ...], list[_Candidate]]:
    """The rows with results by the names of their components."""
    candidates: dict[tuple[str, ...], list[_Candidate]] = {}
    for row in rows:
        if row.ba is None or not row.keys:
            continue
        record = store.read_record(row.keys[0])
        if record is not None:
            names = tuple(record.axes[axis].name for axis in AXES)
            candidates.setdefault(names, []).append(_Candidate(row, record))
    return candidates


def _closest(
    experiment: Experiment, cell: Cell | None, candidates: Mapping[tuple[str, ...], list[_Candidate]]
) -> tuple[Row | None, list[str]]:
    """The row that differs from `cell` in the fewest values, and these differences; None without a row to compare.

    What the experiment names, such as the size of the trigger in table 4, must be the same.
    """
    if cell is None:
        return None, []
    names = tuple(cell.choices[axis].name for axis in AXES)
    compared = [(find_differences(each.record, cell), each.row) for each in candidates.get(names, [])]
    comparable = [(differences, row) for differences, row in compared if not experiment.named & set(differences)]
    if not comparable:
        return None, []
    differences, row = min(comparable, key=lambda pair: len(pair[0]))
    return row, list(differences.values())


def find_differences(record: Record, cell: Cell) -> dict[str, str]:
    """The values in which a record differs from a cell: "recipe.epochs" -> "recipe.epochs 20, not 200"."""
    differences: dict[str, str] = {}
    for axis in AXES:
        wanted, ours = cell.choices[axis].component.identity(), record.axes[axis]
        differences |= _differing(axis, ours.params, wanted["params"])
        if ours.revision != wanted["revision"]:
            differences[axis] = f"{axis} of another revision"
    return differences | _differing("recipe", record.recipe, cell.recipe.model_dump(mode="json"))


def _differing(part: str, ours: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, str]:
    names = [name for name in {**wanted, **ours} if ours.get(name) != wanted.get(name)]
    return {f"{part}.{name}": f"{part}.{name} {ours.get(name)}, not {wanted.get(name)}" for name in names}


def _mark(differences: str, marks: dict[str, str]) -> str:
    """The mark of a footnote with these differences, such as "[1]"; equal ones share it."""
    if not differences:
        return ""
    return marks.setdefault(differences, f"[{len(marks) + 1}]")


def _numbers(theirs: Mapping[str, Any], ours: Row | None) -> list[str]:
    """BA and ASR in the paper, here, and their differences; the number of seeds."""
    paper = " / ".join(METRICS[name].show(theirs.get(name)) for name in ("ba", "asr"))
    if ours is None:
        return [paper, "–", "", ""]
    mine = " / ".join(METRICS[name].show(getattr(ours, name)) for name in ("ba", "asr"))
    differences = " / ".join(_difference(theirs.get(name), getattr(ours, name)) for name in ("ba", "asr"))
    return [paper, mine, differences, str(len(ours.seeds))]


def _difference(paper: float | None, ours: float | None) -> str:
    if paper is None or ours is None:
        return "–"
    return f"{100 * (ours - paper):+.1f}"
