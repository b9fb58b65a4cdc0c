"""Options that several verbs share, and the selection of cells they make."""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from backdoor_bench_none.cli.output import say
from backdoor_bench_none.errors import ConfigError, NothingSelectedError

if TYPE_CHECKING:
    from backdoor_bench_none.contracts.cell import Cell
    from backdoor_bench_none.planning.plan import Plan
    from backdoor_bench_none.registry.components import Registry
    from backdoor_bench_none.results.measurement import Measurement

Command = TypeVar("Command", bound=Callable[..., Any])

results_option = click.option(
    "--results",
    type=click.Path(path_type=Path, file_okay=False),
    help="Results folder; default: that of the file, else results/.",
)
file_argument = click.argument("file", required=False, type=click.Path(path_type=Path))


def scale_option(text: str) -> Callable[[Command], Command]:
    """The size of the paper's experiments; `text` is its help."""
    return click.option("--scale", type=click.Choice(["full", "small"]), default="full", show_default=True, help=text)


@dataclass(frozen=True)
class Selection:
    """The cells of a plan that a verb works on: patterns by axis, seeds, and an expression over titles."""

    patterns: dict[str, tuple[str, ...]]
    seeds: tuple[int, ...]
    expression: str | None

    def apply(self, plan: Plan) -> Plan:
        """The plan with the selected cells; `NothingSelectedError` if there are none."""
        matches = self._compile()
        selected = plan.select(lambda cell: self._wants(cell) and matches(cell.title))
        if not selected.cells:
            raise NothingSelectedError(f"no cell of {len(plan.cells)} is selected", "`bbn plan` shows all cells")
        return selected

    def wants_measured(self, measured: Measurement) -> bool:
        """Whether a record is selected, by the labels of its axes."""
        matches = self._compile()
        if self.seeds and measured.seed not in self.seeds:
            return False
        chosen = ((getattr(measured, axis), patterns) for axis, patterns in self.patterns.items() if patterns)
        return all(_matches_one(label, patterns) for label, patterns in chosen) and matches(measured.title)

    def _wants(self, cell: Cell) -> bool:
        if self.seeds and cell.seed not in self.seeds:
            return False
        return all(_matches(cell.choices[axis], patterns) for axis, patterns in self.patterns.items() if patterns)

    def _compile(self) -> Callable[[str], bool]:
        if not self.expression:
            return lambda title: True
        return compile_expression(self.expression)


def _matches(choice: Any, patterns: tuple[str, ...]) -> bool:  # noqa: ANN401
    """Whether the label or the name matches one of the patterns, in which `[` is literal."""
    return any(_matches_one(name, patterns) for name in (choice.label, choice.name))


def _matches_one(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern.replace("[", "[[]")) for pattern in patterns)


def selection_options(command: Command) -> Command:
    """Add -a, -d, -m, --activation, --dataset, -s and -k, which the verb gets as one `selection`."""

    @functools.wraps(command)
    def with_selection(*args: Any, **options: Any) -> Any:  # noqa: ANN401
        patterns = {axis: options.pop(axis) for axis in ("attack", "defense", "architecture", "activation", "dataset")}
        selection = Selection(patterns, options.pop("seed"), options.pop("expression"))
        return command(*args, selection=selection, **options)

    options = [
        click.option("-a", "--attack", multiple=True, metavar="NAME", help="Only these attacks (labels or patterns)."),
        click.option("-d", "--defense", multiple=True, metavar="NAME", help="Only these defenses."),
        click.option("-m", "--architecture", multiple=True, metavar="NAME", help="Only these architectures."),
        click.option("--activation", multiple=True, metavar="NAME", help="Only these activations."),
        click.option("--dataset", multiple=True, metavar="NAME", help="Only these data sets."),
        click.option("-s", "--seed", multiple=True, type=int, help="Only these seeds."),
        click.option(
            "-k", "expression", metavar="EXPR", help="Only cells whose title matches, as 'badnets and not mlp'."
        ),
    ]
    for option in reversed(options):
        with_selection = option(with_selection)
    return with_selection  # type: ignore[return-value]


def compile_expression(text: str) -> Callable[[str], bool]:
    """A test of titles by an expression as of pytest's -k: names joined by and, or, not and parentheses.

    A name holds if it is part of the title.
    """
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError:
        tree = None
    if tree is None or not _is_expression(tree):
        raise ConfigError(f"-k '{text}' is not an expression", "names joined by and, or, not and parentheses")
    return lambda title: _holds(tree, title)


def _is_expression(node: ast.AST) -> bool:
    match node:
        case ast.Name():
            return True
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return _is_expression(operand)
        case ast.BoolOp(values=values):
            return all(map(_is_expression, values))
    return False


def _holds(node: ast.AST, title: str) -> bool:
    match node:
        case ast.Name(id=name):
            return name in title
        case ast.UnaryOp(operand=operand):
            return not _holds(operand, title)
        case ast.BoolOp(op=ast.And(), values=values):
            return all(_holds(value, title) for value in values)
        case ast.BoolOp(values=values):
            return any(_holds(value, title) for value in values)
    raise AssertionError(ast.dump(node))


def read_plan(file: Path | None, results: Path | None, selection: Selection) -> tuple[Plan, Path, Path]:
    """The selected cells of a benchmark file, its path, and its results folder; `results` is that of the command line.

    Data sets that are not on this machine are known from the records.
    """
    from backdoor_bench_none.planning.plan import make_plan
    from backdoor_bench_none.planning.reading import find_file
    from backdoor_bench_none.results.known_data import find_data

    path = find_file(file)
    plan = make_plan(
        path, open_registry(path), find_data=lambda configured, dataset: find_data(results or configured, dataset)
    )
    return selection.apply(plan), path, results or plan.config.results


def warn_of_absent(plan: Plan) -> None:
    """Warn of absent data sets of which there is no record: keys depend on the data, so none can be looked up."""
    for name in plan.absent:
        say(f"warning: data set {name} is not on this machine: its records cannot be looked up", err=True)


def open_registry(file: Path | None) -> Registry:
    """The registry, with the bbnfile.py beside the benchmark file."""
    from backdoor_bench_none.registry.components import Registry

    return Registry.default((file or Path("benchmark.yaml")).parent)
