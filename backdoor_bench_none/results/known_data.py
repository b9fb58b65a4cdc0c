"""What records say of data sets that are no longer on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from backdoor_bench_none.contracts.component import Choice
from backdoor_bench_none.contracts.dataset import Dataset, DatasetInfo
from backdoor_bench_none.contracts.record import Record
from backdoor_bench_none.results.files import DamagedFileError, read_record_file
from backdoor_bench_none.results.index import record_stamps


def find_data(results: Path, dataset: Choice[Dataset]) -> tuple[DatasetInfo, str] | None:
    """The metadata and the fingerprint of a data set, from the newest record made of it; None if there is none."""
    for key, _, _ in sorted(record_stamps(results), key=lambda stamp: stamp[1], reverse=True):
        try:
            record = read_record_file(results / "records" / key[:2] / f"{key}.json")
        except (FileNotFoundError, DamagedFileError):
            continue
        fingerprint = record.upstream.get("dataset_sha256")
        if _is_of(record, dataset) and isinstance(fingerprint, str):
            return _info_of(record, dataset), fingerprint
    return None


def _is_of(record: Record, dataset: Choice[Dataset]) -> bool:
    made_of, identity = record.axes["dataset"], dataset.component.identity()
    return (made_of.name, made_of.revision, made_of.params) == (dataset.name, identity["revision"], identity["params"])


def _info_of(record: Record, dataset: Choice[Dataset]) -> DatasetInfo:
    if record.dataset_info is None:  # a record of a version that did not keep it
        return dataset.component.info()
    return DatasetInfo(**{name: _as_kept(value) for name, value in record.dataset_info.items()})


def _as_kept(value: Any) -> Any:  # noqa: ANN401
    """A value as it was before it became JSON, which has no tuples."""
    return tuple(value) if isinstance(value, list) else value
