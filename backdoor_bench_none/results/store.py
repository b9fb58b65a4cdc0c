"""The results folder: records and artifacts.

Every file is written under a temporary name and renamed, so that neither a reader nor a crash leaves half a file.
`records/ab/<key>.json` are the results. `artifacts/<stage>/ab/<key>.<sha256>.safetensors` are shared stages, checked
against the hash in their name.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from backdoor_bench_none.contracts.record import Record
from backdoor_bench_none.errors import BenchError, StoreError
from backdoor_bench_none.results.files import (
    DamagedFileError,
    encode_record,
    open_file,
    read_record_file,
    warn_of_damage,
)
from backdoor_bench_none.system import lock_file

if TYPE_CHECKING:
    from torch import Tensor

#: the ending of the file of an artifact
ARTIFACT = ".safetensors"


class DamagedArtifactWarning(UserWarning):
    """An artifact is truncated or altered; it is computed again."""


class UnlockedFolderWarning(UserWarning):
    """The results folder is on a file system without locks, so that two runs at once may compute the same stage."""


@dataclass(frozen=True)
class Artifact:
    """Tensors by name, on the CPU, and a JSON mapping."""

    tensors: Mapping[str, Tensor]
    meta: Mapping[str, Any]


@dataclass(frozen=True)
class Damage:
    """A file of a results folder that is not as it was written, and what is wrong with it."""

    path: Path
    fault: str


class Store:
    """A results folder; any number of processes may use it at once."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def create(self) -> None:
        """Create the folder; `StoreError` if it cannot be written, and a warning if its file system has no locks."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root) as file:
                has_locks = lock_file(file)
        except OSError as error:
            message = f"the results folder '{self.root}' cannot be written: {error}"
            raise StoreError(message, "choose another with --results") from error
        if not has_locks:
            warnings.warn(
                f"the file system of '{self.root}' has no locks: one run is safe there, two at once are not",
                UnlockedFolderWarning,
                stacklevel=2,
            )

    # records

    def record_path(self, key: str) -> Path:
        """The file of a cell's record."""
        return self.root / "records" / key[:2] / f"{key}.json"

    def write_record(self, record: Record) -> None:
        """Write `record`, in place of an older one with its key."""
        self.write_file(self.record_path(record.key), encode_record(record))

    def read_record(self, key: str) -> Record | None:
        """The record of a cell; None if it is absent or cannot be read."""
        return _read_record(self.record_path(key))

    def records(self) -> list[Record]:
        """All records, sorted by key."""
        return [record for path in self.record_paths() if (record := _read_record(path)) is not None]

    def record_paths(self) -> list[Path]:
        """The files of all records, sorted by key."""
        folder = self.root / "records"
        names = ((part, name) for part in _names_in(folder) for name in _names_in(folder / part))
        return [folder / part / name for part, name in names if name.endswith(".json") and not name.startswith(".")]

    def find_record(self, prefix: str) -> Record:
        """The one record whose key starts with `prefix`."""
        every = self.record_paths()
        paths = [path for path in every if prefix and path.stem.startswith(prefix)]
        if len(paths) == 1:
            try:
                return read_record_file(paths[0])
            except (DamagedFileError, FileNotFoundError) as error:
                raise BenchError(f"record '{paths[0]}' cannot be read: {error}", "`bbn run` makes it again") from error
        if paths:
            raise BenchError(
                f"'{prefix}' is not one key: {', '.join(sorted(p.stem for p in paths)[:5])}", "give more digits"
            )
        hint = "`bbn run` names the keys of its cells" if every else "`bbn run` makes records"
        raise BenchError(f"there is no record '{prefix}' in '{self.root}'", hint)

    # artifacts

    def find_artifact(self, stage: str, key: str) -> Path | None:
        """The file of an artifact, which is not read; None if it is absent."""
        return next((path for path in self._artifact_paths(stage, key[:2]) if path.name.startswith(f"{key}.")), None)

    def artifact_keys(self, stage: str) -> set[str]:
        """The keys of all artifacts of a stage, which are not read."""
        return {path.name.partition(".")[0] for path in self.artifact_paths(stage)}

    def artifact_paths(self, stage: str) -> list[Path]:
        """The files of all artifacts of a stage."""
        folders = _names_in(self.root / "artifacts" / stage)
        return [path for folder in folders for path in self._artifact_paths(stage, folder)]

    def count_artifacts(self) -> int:
        """The number of artifacts of all stages."""
        return sum(len(self.artifact_paths(stage)) for stage in _names_in(self.root / "artifacts"))

    def _artifact_paths(self, stage: str, folder: str) -> list[Path]:
        path = self.root / "artifacts" / stage / folder
        return [path / name for name in _names_in(path) if name.endswith(ARTIFACT) and not name.startswith(".")]

    def save_artifact(self, stage: str, key: str, artifact: Artifact) -> None:
        """Write an artifact to a file with its hash in the name."""
        from safetensors.torch import save  # imports torch

        # copies, since safetensors refuses tied weights, which share their memory
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in artifact.tensors.items()}
        data = save(tensors, metadata={"meta": json.dumps(artifact.meta)})
        self.write_file(
            self.root / "artifacts" / stage / key[:2] / f"{key}.{hashlib.sha256(data).hexdigest()}.safetensors", data
        )

    def load_artifact(self, stage: str, key: str) -> Artifact | None:
        """An artifact, checked against its hash; None if it is absent.

        A damaged one is removed with a warning, and is absent from then on.
        """
        path = self.find_artifact(stage, key)
        if path is None:
            return None
        try:
            _require_intact(path)
            return _read_artifact(path)
        except (OSError, SafetensorError, DamagedFileError):
            pass
        warnings.warn(f"artifact {stage} {key} is damaged and is computed again", DamagedArtifactWarning, stacklevel=2)
        self._clear(path)
        return None

    def find_damage(self) -> Iterator[Damage]:
        """Everything in the folder that is not as it was written; all of it is read."""
        for path in self.record_paths():
            try:
                read_record_file(path)
            except (DamagedFileError, FileNotFoundError) as error:
                yield Damage(path, str(error))
        for stage in _names_in(self.root / "artifacts"):
            for path in self.artifact_paths(stage):
                try:
                    _require_intact(path)
                except (OSError, DamagedFileError) as error:
                    yield Damage(path, getattr(error, "strerror", None) or str(error))
        for path in self._temporaries():
            yield Damage(path, "a run was ended while it wrote this")

    def _temporaries(self) -> Iterator[Path]:
        """What is left of writes that were interrupted; a run that is going on has some for a moment."""
        for top in ("records", "artifacts"):
            for where, _, names in os.walk(self.root / top):
                yield from (Path(where, name) for name in names if name.startswith("."))

    def set_aside(self, path: Path) -> Path:
        """Move something damaged out of the way, into the folder `damaged`, and return its new path."""
        folder = self.root / "damaged"
        folder.mkdir(parents=True, exist_ok=True)
        number = 0
        while os.path.lexists(target := folder / f"{path.name}.{number}"):
            number += 1
        path.rename(target)
        return target

    def _clear(self, path: Path) -> None:
        """Remove what is in the way of a new file; a folder is moved, since it may hold anything."""
        if path.is_dir() and not path.is_symlink():
            self.set_aside(path)
        else:
            path.unlink(missing_ok=True)

    @contextmanager
    def lock(self, stage: str, key: str) -> Iterator[None]:
        """Hold the lock of a stage, for which a second process waits; the kernel frees it when the process ends."""
        path = self.root / "locks" / f"{stage}-{key}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(path) and not path.is_file():
            self._clear(path)
        with path.open("w") as file:
            lock_file(file)  # where there are no locks, `create` has warned
            yield

    def write_file(self, path: Path, data: bytes) -> None:
        """Write a file of this folder whole or not at all; `StoreError` if it cannot be written."""
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if path.is_dir() and not path.is_symlink():
                self._clear(path)
            temporary.replace(path)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
            raise StoreError(
                f"'{path}' cannot be written: {error.strerror}",
                "free some space, or choose another folder with --results",
            ) from error


def _read_record(path: Path) -> Record | None:
    try:
        return read_record_file(path)
    except FileNotFoundError:
        return None
    except DamagedFileError as error:
        warn_of_damage(path, error)
        return None


def _require_intact(path: Path) -> None:
    """Raise `DamagedFileError` or `OSError` unless the content of an artifact has the hash in its name."""
    with open_file(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != path.name.split(".")[1]:
        raise DamagedFileError("its content has another hash than its name")


def _names_in(folder: Path) -> list[str]:
    """The names in a folder, sorted; none if it is absent or no folder."""
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _read_artifact(path: Path) -> Artifact:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        return Artifact({name: file.get_tensor(name) for name in file.keys()}, json.loads(metadata["meta"]))  # noqa: SIM118
