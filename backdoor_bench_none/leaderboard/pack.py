"""Makes a submission of the results folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from backdoor_bench_none.contracts.cell import Cell
from backdoor_bench_none.contracts.record import Record
from backdoor_bench_none.errors import BenchError
from backdoor_bench_none.leaderboard.submission import (
    MANIFEST,
    Submission,
    SubmissionError,
    hash_file,
    validate,
    write_json,
    write_submission,
)
from backdoor_bench_none.leaderboard.track import Track
from backdoor_bench_none.planning.plan import Plan
from backdoor_bench_none.planning.stage_table import defense_key, record_key
from backdoor_bench_none.registry.components import Registry
from backdoor_bench_none.registry.plugins import own_version
from backdoor_bench_none.results.store import Store


def pack(track: Track, registry: Registry, results: Path, folder: Path, **about: Any) -> Submission:
    """Write the submission of `about["defense"]` with `about["params"]` into `folder`, which must not be there.

    `SubmissionError` names the cells that have no numbers or no weights, and rules that are broken.
    """
    defense, params = about.pop("defense"), about.pop("params")
    plan = track.plan(registry, defense, params)
    provider = registry.entry("defense", defense).provider
    if provider.plugin == "bbnfile" or "+" in provider.version:
        raise SubmissionError(
            f"the defense '{defense}' is of {provider}, which nobody can install",
            "`bbn new defense NAME` makes a package",
        )
    store = Store(results)
    records = _check_complete(plan, store)
    component = plan.cells[0].defense.component
    if component.clean_fraction > track.highest_clean_fraction:
        raise SubmissionError(
            f"{defense} asks for {component.clean_fraction:g} of the training set as clean data; "
            f"{track.name} allows {track.highest_clean_fraction:g}"
        )
    if folder.exists():
        raise BenchError(f"'{folder}' is there already", "choose another folder with --output")
    facts = {
        "track": track.name, "track_sha256": track.sha256,
        "defense": records[record_key(plan.cells[0])].axes["defense"],
        "stage": component.stage.value, "clean_fraction": component.clean_fraction,
        "sees_ground_truth": component.sees_ground_truth, "core_version": own_version(),
        "source": {"distribution": provider.distribution, "version": provider.version}, **about,
    }  # fmt: skip
    validate(Submission, {**facts, "files": {}}, MANIFEST)
    draft = folder.with_name(f".{folder.name}.partial")
    try:
        files: dict[str, str] = {}
        for cell in plan.cells:
            files |= _write_cell(cell, records[record_key(cell)], store, draft)
        submission: Submission = validate(Submission, {**facts, "files": files}, MANIFEST)
        write_submission(draft, submission)
        draft.rename(folder)
    except OSError as error:
        raise BenchError(f"'{folder}' cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return submission


def _check_complete(plan: Plan, store: Store) -> Mapping[str, Record]:
    records, faults = {}, []
    for cell in plan.cells:
        record = store.read_record(record_key(cell))
        if record is None or record.status != "done":
            faults.append(f"{cell.title}: {record.status if record else 'not run yet'}")
        elif store.find_artifact("defense", defense_key(cell)) is None:
            faults.append(f"{cell.title}: its weights are no longer there")
        else:
            records[record_key(cell)] = _relabel(cell, record)
    if faults:
        raise SubmissionError(
            f"{len(faults)} of {len(plan.cells)} cells of the track are missing, the first is {faults[0]}",
            "run the track's benchmark with the defense: `bbn init FILE --from TRACK`, add it, `bbn run FILE`",
        )
    return records


def _relabel(cell: Cell, record: Record) -> Record:
    """The record with the track's labels: another benchmark file may have named the same cell otherwise."""
    axes = {axis: value.model_copy(update={"label": cell.choices[axis].label}) for axis, value in record.axes.items()}
    return record.model_copy(update={"axes": axes, "title": cell.title})


def _write_cell(cell: Cell, record: Record, store: Store, folder: Path) -> dict[str, str]:
    """The record and the tensors of one cell, and their hashes."""
    artifact = store.load_artifact("defense", defense_key(cell))
    if artifact is None:
        raise SubmissionError(f"{cell.title}: its weights are damaged", "`bbn run --only all` makes them again")
    names = {"record": f"records/{record_key(cell)}.json", "weights": f"weights/{record_key(cell)}.safetensors"}
    for name in names.values():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    write_json(folder / names["record"], record)
    save_file({name: tensor.contiguous() for name, tensor in artifact.tensors.items()}, folder / names["weights"])
    return {name: hash_file(folder / name) for name in names.values()}
