"""MLflow logger: one run per finished cell, on the server that MLflow's environment variables name."""

from __future__ import annotations

import os
import re
import time
from typing import TYPE_CHECKING

from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from backdoor_bench_none.loggers import chosen_parameters, epoch_losses, measured_values

if TYPE_CHECKING:
    from backdoor_bench_none.contracts.record import Record

#: the lowest limit of MLflow's servers, old ones included; the record has the whole value
VALUE_LENGTH = 500
#: MLflow's limit on names of parameters and metrics
NAME_LENGTH = 250
#: MLflow's status for each status of a cell
STATUSES = {"done": "FINISHED", "failed": "FAILED", "timeout": "FAILED", "skipped": "KILLED"}


#: MLflow's client tries for minutes by default; what the environment says of it stands
IMPATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "5", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}


def log_record(record: Record) -> None:
    """Create a run for `record`; a cell that runs again gets another run with the same tag `key`."""
    for name, value in IMPATIENCE.items():
        os.environ.setdefault(name, value)
    client = MlflowClient()
    now = int(time.time() * 1000)
    measured = [Metric(safe_name(name), value, now, 0) for name, value in measured_values(record).items()]
    losses = [Metric("victim_loss", loss, now, epoch) for epoch, loss in epoch_losses(record)]
    parameters = {safe_name(name): shorten(value) for name, value in chosen_parameters(record).items()}
    tags = {"key": record.key, "status": record.status, "reason": record.reason or ""}
    run = client.create_run(_experiment_id(client), run_name=shorten(record.title))
    try:
        client.log_batch(
            run.info.run_id,
            metrics=[*measured, *losses],
            params=[Param(name, value) for name, value in parameters.items()],
            tags=[RunTag(name, shorten(value)) for name, value in tags.items() if value],
            synchronous=True,
        )
    finally:
        client.set_terminated(run.info.run_id, STATUSES[record.status])


def _experiment_id(client: MlflowClient) -> str:
    """The experiment that MLflow's environment variables name, created if necessary, or the default one."""
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME")
    if not name:
        return os.environ.get("MLFLOW_EXPERIMENT_ID") or "0"
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return str(client.create_experiment(name))
        except MlflowException:  # another process may have been faster
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise
    return str(experiment.experiment_id)


def safe_name(name: str) -> str:
    """`name` with the characters and path segments that MLflow rejects replaced or removed."""
    parts = re.sub(r"[^\w.\- /]", "_", name).split("/")
    return "/".join(part for part in parts if part not in ("", ".", ".."))[:NAME_LENGTH].rstrip("/") or "_"


def shorten(value: str) -> str:
    """`value` within MLflow's limit."""
    if len(value) <= VALUE_LENGTH:
        return value
    return f"{value[: VALUE_LENGTH - 1]}…"
