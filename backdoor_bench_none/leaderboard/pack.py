"""Packs a defense's results on a track into a submission."""

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
from backdoor_bench_none.registry.plugins import Provider, own_version
from backdoor_bench_none.results.store import Store


def pack(
    track: Track,
    registry: Registry,
    results: Path,
    folder: Path,
    *,
    defense: str,
    params: dict[str, Any],
    claims: Mapping[str, float] | None = None,
    authors: str = "",
    paper: str = "",
    code: str = "",
) -> Submission:
    """Write the submission of `defense` with `params` on `track` into `folder`, which must not exist.

    `claims`, `authors`, `paper` and `code` go into the manifest as they are. `SubmissionError` names the broken rule,
    or the first cell without numbers or weights.
    """
    plan = track.plan(registry, defense, params)
    provider = registry.entry("defense", defense).provider
    _check_installable(defense, provider)
    store = Store(results)
    records = _read_all_records(plan, store)
    _check_clean_fraction(plan, track)
    if folder.exists():
        raise BenchError(f"'{folder}' exists already", "choose another folder with --output")
    facts = {
        **_describe_defense(plan, records, track), "core_version": own_version(),
        "source": {"distribution": provider.distribution, "version": provider.version},
        "claims": claims or {}, "authors": authors, "paper": paper, "code": code,
    }  # fmt: skip
    validate(Submission, {**facts, "files": {}}, MANIFEST)  # faults of the arguments show before anything is written
    return _write(plan, records, store, facts, folder)


def _check_installable(defense: str, provider: Provider) -> None:
    """Raise `SubmissionError` unless the defense comes from a released package."""
    if provider.plugin == "bbnfile" or "+" in provider.version:
        raise SubmissionError(
            f"the defense '{defense}' comes from {provider}, which others cannot install",
            "`bbn new defense NAME` makes a package",
        )


def _check_clean_fraction(plan: Plan, track: Track) -> None:
    """Raise `SubmissionError` if the defense asks for more clean data than the track allows."""
    choice = plan.cells[0].defense
    asked = choice.component.clean_fraction
    if asked > track.highest_clean_fraction:
        raise SubmissionError(
            f"{choice.name} asks for {asked:g} of the training set as clean data; "
            f"{track.name} allows {track.highest_clean_fraction:g}"
        )


def _describe_defense(plan: Plan, records: Mapping[str, Record], track: Track) -> dict[str, Any]:
    """The part of the manifest that follows from the track and the defense."""
    first = plan.cells[0]
    component = first.defense.component
    return {
        "track": track.name, "track_sha256": track.sha256, "defense": records[record_key(first)].axes["defense"],
        "stage": component.stage.value, "clean_fraction": component.clean_fraction,
        "sees_ground_truth": component.sees_ground_truth,
    }  # fmt: skip


def _read_all_records(plan: Plan, store: Store) -> Mapping[str, Record]:
    """The records of all cells by key; `SubmissionError` unless every cell is done and has its weights."""
    records, faults = {}, []
    for cell in plan.cells:
        record = store.read_record(record_key(cell))
        if record is None:
            faults.append(f"{cell.title}: not run yet")
        elif record.status != "done":
            faults.append(f"{cell.title}: {record.status}")
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
    """The record with the track's labels: another benchmark file may label the same cell differently."""
    axes = {axis: value.model_copy(update={"label": cell.choices[axis].label}) for axis, value in record.axes.items()}
    return record.model_copy(update={"axes": axes, "title": cell.title})


def _write(
    plan: Plan, records: Mapping[str, Record], store: Store, facts: Mapping[str, Any], folder: Path
) -> Submission:
    """Write all cells and the manifest beside `folder`, then rename: an interrupted run leaves no half submission."""
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


def _write_cell(cell: Cell, record: Record, store: Store, folder: Path) -> dict[str, str]:
    """Write the record and the tensors of one cell, and return their hashes by file name."""
    artifact = store.load_artifact("defense", defense_key(cell))
    if artifact is None:
        raise SubmissionError(f"{cell.title}: its weights are damaged", "`bbn run --only all` makes them again")
    names = {"record": f"records/{record_key(cell)}.json", "weights": f"weights/{record_key(cell)}.safetensors"}
    for name in names.values():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    write_json(folder / names["record"], record)
    save_file({name: tensor.contiguous() for name, tensor in artifact.tensors.items()}, folder / names["weights"])
    return {name: hash_file(folder / name) for name in names.values()}
