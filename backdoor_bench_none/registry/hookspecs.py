"""All hooks of backdoor-bench-none.

Hooks change only by new keyword arguments; an implementation may take fewer. The first group returns a mapping from a
snake_case name to a class, or to a lazy `"module:Class"` string that is imported when the component is first used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from backdoor_bench_none.contracts.markers import hookspec

if TYPE_CHECKING:
    from backdoor_bench_none.contracts.architecture import Activation, Architecture
    from backdoor_bench_none.contracts.attack import Attack
    from backdoor_bench_none.contracts.cell import Cell
    from backdoor_bench_none.contracts.config import Config
    from backdoor_bench_none.contracts.dataset import Dataset
    from backdoor_bench_none.contracts.defense import Defense
    from backdoor_bench_none.contracts.executor import Executor
    from backdoor_bench_none.contracts.metric import Metric
    from backdoor_bench_none.contracts.record import Record
    from backdoor_bench_none.contracts.trainer import Trainer


@hookspec
def bbn_attacks() -> Mapping[str, type[Attack] | str]:
    """Attacks, which poison the training set and stamp the trigger on the test set."""


@hookspec
def bbn_defenses() -> Mapping[str, type[Defense] | str]:
    """Defenses, which turn an untrusted training set, or a model trained on it, into a model."""


@hookspec
def bbn_architectures() -> Mapping[str, type[Architecture] | str]:
    """Network architectures, which take any activation function."""


@hookspec
def bbn_activations() -> Mapping[str, type[Activation] | str]:
    """Activation functions."""


@hookspec
def bbn_datasets() -> Mapping[str, type[Dataset] | str]:
    """Image classification data sets."""


@hookspec
def bbn_trainers() -> Mapping[str, type[Trainer] | str]:
    """Ways to train a model."""


@hookspec
def bbn_metrics() -> Mapping[str, type[Metric] | str]:
    """Extra metrics, computed from the predictions when a cell is evaluated."""


@hookspec
def bbn_executors() -> Mapping[str, type[Executor] | str]:
    """Ways to run jobs."""


@hookspec
def bbn_commands() -> Mapping[str, str]:
    """Further verbs of `bbn`, each a `"module:command"` string that names a click command or group."""


@hookspec
def bbn_modify_plan(config: Config, cells: list[Cell]) -> None:
    """Reorder, drop or add cells in place, after the matrix is expanded and before records are looked up.

    :param config: the validated benchmark file.
    :param cells: all cells of the matrix, in the order in which tables show them.
    """


@hookspec(firstresult=True)
def bbn_cell_skip(cell: Cell) -> str | None:
    """The reason to skip `cell`, shown in the tables; None to leave the decision to the next plugin.

    :param cell: one combination of the matrix.
    """


@hookspec
def bbn_cell_finished(cell: Cell, record: Record) -> None:
    """Called for each cell that ended, with any status, after its record was written; it cannot change the record.

    :param cell: one combination of the matrix.
    :param record: the record of the cell.
    """


#: hook name -> the kind of component it provides
COMPONENT_HOOKS: Mapping[str, str] = {
    "bbn_attacks": "attack",
    "bbn_defenses": "defense",
    "bbn_architectures": "architecture",
    "bbn_activations": "activation",
    "bbn_datasets": "dataset",
    "bbn_trainers": "trainer",
    "bbn_metrics": "metric",
    "bbn_executors": "executor",
}
#: all hooks that map names to classes or commands
NAMING_HOOKS: Mapping[str, str] = {**COMPONENT_HOOKS, "bbn_commands": "command"}
