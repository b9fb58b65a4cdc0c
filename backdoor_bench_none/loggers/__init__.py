"""Loggers, which send finished cells to TensorBoard or MLflow.

The environment variable `BBN_LOGGERS` names them, separated by commas.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from backdoor_bench_none.contracts.markers import hookimpl
from backdoor_bench_none.errors import BenchError, ConfigError, PluginError, did_you_mean
from backdoor_bench_none.words import describe_error

if TYPE_CHECKING:
    from backdoor_bench_none.contracts.cell import Cell
    from backdoor_bench_none.contracts.config import Config
    from backdoor_bench_none.contracts.record import Record

#: each is a module of this package with a function `log_record`, and an extra of the distribution
LOGGERS = ("tensorboard", "mlflow")
#: seconds after which a logger that fails gets no second cell
PATIENCE = 1.0


@hookimpl
def bbn_modify_plan(config: Config, cells: list[Cell]) -> None:
    """Give every logger another chance in a new run."""
    _troubles.clear()


@hookimpl
def bbn_cell_finished(record: Record) -> None:
    """Pass `record` to each logger; one that fails does not stop the next."""
    names = [name.strip() for name in os.environ.get("BBN_LOGGERS", "").split(",")]
    errors = [error for name in dict.fromkeys(names) if name and (error := _log(name, record))]
    if len(errors) > 1:
        raise PluginError("; ".join(map(str, errors)))
    if errors:
        raise errors[0]


@dataclass
class _Trouble:
    """The failures of a logger in this process."""

    in_a_row: int = 0
    given_up: bool = False


_troubles: dict[str, _Trouble] = {}


def _log(name: str, record: Record) -> BenchError | None:
    """Pass `record` to a logger; its error, after which it is given up if it was slow or the second in a row.

    A server that does not answer costs a run seconds then, not minutes for each cell.
    """
    trouble = _troubles.setdefault(name, _Trouble())
    if trouble.given_up:
        return None
    started = time.monotonic()
    error = _try_to_log(name, record)
    if error is None:
        trouble.in_a_row = 0
        return None
    trouble.in_a_row += 1
    trouble.given_up = trouble.in_a_row > 1 or time.monotonic() - started > PATIENCE
    if trouble.given_up:
        error.message += "; it gets no more cells of this run, whose records are complete"
    return error


def _try_to_log(name: str, record: Record) -> BenchError | None:
    if name not in LOGGERS:
        return ConfigError(f"BBN_LOGGERS: unknown logger '{name}'", did_you_mean(name, LOGGERS))
    try:
        importlib.import_module(f"{__name__}.{name}").log_record(record)
    except ImportError as error:
        remedy = f"pip install 'backdoor-bench-none[{name}]'"
        return PluginError(f"logger '{name}': {error}", remedy)
    except Exception as error:
        return PluginError(f"logger '{name}': {describe_error(error)}")
    return None


def measured_values(record: Record) -> dict[str, float]:
    """All finite numbers that were measured: shares as fractions of 1, seconds and bytes per stage."""
    counts, detection = record.counts, record.detection
    values: dict[str, float | None] = {}
    if counts is not None:
        shares = {"BA": counts.benign_accuracy, "ASR": counts.attack_success_rate, "RA": counts.robust_accuracy}
        values |= {name: count.rate for name, count in shares.items() if count is not None}
    if detection is not None:
        values |= {"detection/TPR": detection.tpr, "detection/FPR": detection.fpr, "detection/AUROC": detection.auroc}
    for stage, cost in record.costs.items():
        values |= {f"seconds/{stage}": cost.seconds, f"peak_memory/{stage}": cost.peak_memory}
    values |= {f"metrics/{name}": value for name, value in record.metrics.items()}
    return {name: float(value) for name, value in values.items() if value is not None and math.isfinite(value)}


def epoch_losses(record: Record) -> Iterator[tuple[int, float]]:
    """The finite training losses of the victim, each with its epoch, counted from 1."""
    return ((epoch, loss) for epoch, loss in enumerate(record.victim_losses, 1) if math.isfinite(loss))


def chosen_parameters(record: Record) -> dict[str, str]:
    """The parameters of the cell by dotted name, in the words of YAML.

    Examples are `attack`, `attack.poison_rate`, `recipe.lr` and `seed`.
    """
    parameters: dict[str, str] = {}
    for axis, value in record.axes.items():
        parameters |= {axis: value.name} | _flatten(axis, value.params)
    fixed = {"seed": record.seed, "clean_fraction": record.clean_fraction}
    return parameters | _flatten("recipe", record.recipe) | {name: json.dumps(value) for name, value in fixed.items()}


def _flatten(prefix: str, values: Mapping[str, object]) -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in values.items():
        dotted = f"{prefix}.{name}"
        if isinstance(value, Mapping) and value:
            flat |= _flatten(dotted, value)
        elif isinstance(value, str):
            flat[dotted] = value
        else:
            flat[dotted] = json.dumps(value, ensure_ascii=False)
    return flat
