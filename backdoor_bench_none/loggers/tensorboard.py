"""TensorBoard logger: one run folder per cell below `BBN_TENSORBOARD_DIR`, by default `runs`."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.plugins.text.metadata import create_summary_metadata
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from backdoor_bench_none.loggers import chosen_parameters, epoch_losses, measured_values

if TYPE_CHECKING:
    from backdoor_bench_none.contracts.record import Record

#: suffix of the event files written here
SUFFIX = ".bbn"


def log_record(record: Record) -> None:
    """Write the event file of a cell, replacing an older one."""
    folder = Path(os.environ.get("BBN_TENSORBOARD_DIR") or "runs") / run_name(record)
    older = [*folder.glob(f"events.out.tfevents.*{SUFFIX}")]
    writer = EventFileWriter(str(folder), filename_suffix=SUFFIX)
    try:
        for step, summary in _summaries(record):
            writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))
    finally:
        writer.close()
    for path in older:  # two in one folder would be drawn as one curve
        path.unlink(missing_ok=True)


def run_name(record: Record) -> str:
    """A folder name of the safe characters of the title and of the key."""
    title = re.sub(r"[^\w.-]+", "-", record.title.replace("/", "-"), flags=re.ASCII).strip(".-")[:150]
    return f"{title}-{re.sub(r'[^0-9A-Za-z]', '', record.key)}"


def _summaries(record: Record) -> list[tuple[int, Summary]]:
    """The summaries of a record, each with its step."""
    parameters = chosen_parameters(record)
    measured = [Summary.Value(tag=tag, simple_value=value) for tag, value in measured_values(record).items()]
    losses = [
        (epoch, Summary(value=[Summary.Value(tag="victim_loss", simple_value=loss)]))
        for epoch, loss in epoch_losses(record)
    ]
    about = {"key": record.key, "title": record.title, "status": record.status, "reason": record.reason or "-"}
    texts = [_text("cell", about), _text("parameters", parameters)]
    return [(0, hparams_pb(parameters, trial_id=record.key)), (0, Summary(value=[*texts, *measured])), *losses]


def _text(tag: str, values: dict[str, str]) -> Summary.Value:
    """A Markdown table of `values`."""
    rows = [f"| {_cell_text(name)} | {_cell_text(value)} |" for name, value in values.items()]
    table = "\n".join(["| name | value |", "| --- | --- |", *rows]).encode(errors="replace")
    tensor = TensorProto(dtype=DT_STRING, string_val=[table])
    return Summary.Value(tag=tag, metadata=create_summary_metadata(tag, None), tensor=tensor)


def _cell_text(text: str) -> str:
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")
