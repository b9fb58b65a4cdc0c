"""index.sqlite: the measurements of all records of a results folder, which tables read.

It is made from the records and may be deleted.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from backdoor_bench_none.results.files import DamagedFileError, read_record_file, warn_of_damage
from backdoor_bench_none.results.measurement import COLUMNS, Measurement

NAME = "index.sqlite"
#: a record's key, its file's time of change in nanoseconds, and its size; if one of them changed, it is read again
Stamp = tuple[str, int, int]
#: bumped when the meaning of a column changes
REVISION = 2
SELECT = f"SELECT {', '.join(COLUMNS)} FROM records ORDER BY key"  # noqa: S608 - our own names
INSERT = f"INSERT OR REPLACE INTO records VALUES ({', '.join('?' * (len(COLUMNS) + 2))})"  # noqa: S608


def read_measurements(root: Path) -> list[Measurement]:
    """The measurements of all records below `root`, sorted by key, from the index, which is updated first.

    Where the index cannot be written or is damaged, the records themselves are read.
    """
    stamps = {stamp[0]: stamp for stamp in record_stamps(root)}
    if not stamps:
        return []
    try:
        with closing(_open(root / NAME)) as database:
            _refresh(database, root, stamps)
            rows = database.execute(SELECT).fetchall()
    except (sqlite3.Error, OSError):
        return sorted(_read(root, stamps).values(), key=lambda measurement: measurement.key)
    return [Measurement(*row) for row in rows]


def record_stamps(root: Path) -> Iterator[Stamp]:
    """The stamps of all record files of a results folder."""
    try:
        folders = [entry.path for entry in os.scandir(root / "records") if entry.is_dir()]
    except OSError:
        return
    for folder in folders:
        for entry in os.scandir(folder):
            if entry.name.endswith(".json") and not entry.name.startswith("."):
                stat = _stat(entry)
                yield entry.name.removesuffix(".json"), stat.st_mtime_ns, stat.st_size


def _stat(entry: os.DirEntry[str]) -> os.stat_result:
    try:
        return entry.stat()
    except OSError:  # a link to nothing, or to itself
        return entry.stat(follow_symlinks=False)


def _open(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=5)
    (revision,) = database.execute("PRAGMA user_version").fetchone()
    if revision != REVISION:
        with database:
            database.execute("DROP TABLE IF EXISTS records")
            columns = ", ".join((*COLUMNS, "file_changed INTEGER", "file_size INTEGER", "PRIMARY KEY (key)"))
            database.execute(f"CREATE TABLE records ({columns})")
            database.execute(f"PRAGMA user_version = {REVISION}")
    return database


def _refresh(database: sqlite3.Connection, root: Path, stamps: Mapping[str, Stamp]) -> None:
    known = {row[0]: row for row in database.execute("SELECT key, file_changed, file_size FROM records")}
    gone = [(key,) for key in known.keys() - stamps.keys()]
    changed = {key: stamp for key, stamp in stamps.items() if known.get(key) != stamp}
    if not gone and not changed:
        return
    read = _read(root, changed)
    unreadable = [(key,) for key in changed.keys() - read.keys()]
    with database:
        database.executemany("DELETE FROM records WHERE key = ?", gone + unreadable)
        rows = [(*measurement.as_row(), *changed[key][1:]) for key, measurement in read.items()]
        database.executemany(INSERT, rows)


def _read(root: Path, stamps: Mapping[str, Any]) -> dict[str, Measurement]:
    """The measurements of these records by key; one that cannot be read is left out, with a warning."""
    measurements = {}
    for key in stamps:
        path = root / "records" / key[:2] / f"{key}.json"
        try:
            measurements[key] = Measurement.of(read_record_file(path))
        except FileNotFoundError:
            continue
        except DamagedFileError as error:
            warn_of_damage(path, error)
    return measurements
