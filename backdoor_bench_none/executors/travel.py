"""Files of a results folder that travel to machines that do not see it, and back."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from backdoor_bench_none.contracts.executor import Group
from backdoor_bench_none.errors import StoreError
from backdoor_bench_none.planning.choices import cell_from_spec
from backdoor_bench_none.planning.stage_table import artifact_keys, find_stage
from backdoor_bench_none.registry.components import Registry
from backdoor_bench_none.results.store import Store

#: the path of an artifact or of a record in a results folder
TRAVELS = re.compile(r"artifacts/\w+/[0-9a-f]{2}/[0-9a-f]+\.[0-9a-f]+\.safetensors|records/[0-9a-f]{2}/[0-9a-f]+\.json")


def list_files(results: Path) -> set[str]:
    """The paths of all artifacts and records in a results folder, relative to it."""
    paths = set()
    for top in ("artifacts", "records"):
        for where, _, names in os.walk(results / top):
            paths |= {(Path(where) / name).relative_to(results).as_posix() for name in names}
    return {path for path in paths if TRAVELS.fullmatch(path)}


def find_needed(group: Group, results: Path, registry: Registry) -> Iterator[str]:
    """The paths of the artifacts that are there for the cells of a group, relative to the results folder."""
    store = Store(results)
    keys = {
        (str(find_stage(name).folder), key)
        for job in group
        for name, key in artifact_keys(cell_from_spec(job.spec, registry)).items()
    }
    for folder, key in sorted(keys):
        path = store.find_artifact(folder, key)
        if path is not None:
            yield path.relative_to(results).as_posix()


def write_file(results: Path, name: str, data: bytes) -> None:
    """Write a file that came from another machine; `StoreError` if it is neither an artifact nor a record."""
    if not TRAVELS.fullmatch(name):
        raise StoreError(f"another machine sent '{name}', which is no file of a results folder", "see its version")
    Store(results).write_file(results / name, data)
