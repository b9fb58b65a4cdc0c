"""Reads records and other files of a results folder, of which anything may be left after a crash or an edit."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import warnings
from io import BufferedReader
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from backdoor_bench_none.contracts.cell import AXES
from backdoor_bench_none.contracts.record import Record
from backdoor_bench_none.seeds import canonical_json

#: the key of a record file that holds the sha256 of all others
CHECKSUM = "checksum"


class DamagedFileError(Exception):
    """A record or artifact is not what was written; the message says what is wrong with it."""


class DamagedRecordWarning(UserWarning):
    """A record is not as it was written; its cell counts as not run."""


def open_file(path: Path) -> BufferedReader:
    """`path`, open for reading; `OSError` if it is no regular file, such as a folder or a pipe, which never ends."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"it is no file but a {_kind_of(os.fstat(descriptor).st_mode)}")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _kind_of(mode: int) -> str:
    return "folder" if stat.S_ISDIR(mode) else "pipe or device"


def encode_record(record: Record) -> bytes:
    """The content of the file of a record, with its checksum."""
    values = record.model_dump(mode="json", by_alias=True)
    text = json.dumps({CHECKSUM: _checksum(values), **values}, indent=1, ensure_ascii=False, allow_nan=False)
    return text.encode()


def read_record_file(path: Path) -> Record:
    """The record in a file; `FileNotFoundError` if there is none, `DamagedFileError` if it is not as it was written.

    Files of versions before checksums have none.
    """
    try:
        with open_file(path) as file:
            content = file.read()
    except (FileNotFoundError, NotADirectoryError) as error:
        if path.is_symlink():
            raise DamagedFileError(f"it is a link to '{os.readlink(path)}', which is not there") from None
        raise FileNotFoundError(path) from error  # also where something else is in place of its folder
    except OSError as error:
        raise DamagedFileError(error.strerror or str(error)) from error
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DamagedFileError("it is empty" if not content else f"it is not JSON: {error}") from error
    return _read_values(values, path.stem)


def _read_values(values: Any, key: str) -> Record:  # noqa: ANN401
    if not isinstance(values, dict):
        raise DamagedFileError("it holds no mapping")
    checksum = values.pop(CHECKSUM, None)
    if checksum is not None and checksum != _checksum(values):
        raise DamagedFileError("its content was changed: the checksum is another")
    try:
        record = Record.model_validate_json(json.dumps(values))
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(map(str, fault["loc"]))
        raise DamagedFileError(f"it is no record: {place}: {fault['msg']}") from error
    if absent := [axis for axis in AXES if axis not in record.axes]:
        raise DamagedFileError(f"it lacks {', '.join(absent)}")
    if record.key != key:
        raise DamagedFileError(f"it is the record of another cell, {record.key}")
    if record.status == "done" and record.counts is None:
        raise DamagedFileError("it is done and has no counts")
    return record


def _checksum(values: dict[str, Any]) -> str:
    return hashlib.sha256(canonical_json(values).encode("utf-8", "surrogatepass")).hexdigest()


def warn_of_damage(path: Path, error: DamagedFileError) -> None:
    """Say that a record counts as missing, and why."""
    warnings.warn(f"record '{path}' cannot be read and counts as missing: {error}", DamagedRecordWarning, stacklevel=4)
