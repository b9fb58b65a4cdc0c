"""The format of a submission: submission.json, and a record and the defended weights of every cell of a track.

Submissions are third-party data. Everything here reads them within limits on size, depth and names, and executes
nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import stat
import tempfile
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from lzma import LZMAError
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from backdoor_bench_none.contracts.cell import AXES
from backdoor_bench_none.contracts.record import AxisValue, Record
from backdoor_bench_none.errors import BenchError

MANIFEST = "submission.json"
#: the files that a submission may hold; the hexadecimal keys are those of its cells
ALLOWED = re.compile(r"submission\.json|records/[0-9a-f]{16}\.json|weights/[0-9a-f]{16}\.safetensors")
SCHEMA = 1
LARGEST_JSON = 8 * 2**20
LARGEST_SUBMISSION = 16 * 2**30
MOST_FILES = 20_000
#: the depth of nested JSON arrays and objects, and the digits of an integer
DEEPEST = 32
MOST_DIGITS = 20
LONGEST_LABEL = 200
#: the most seconds and bytes that a record may state for a stage
LONGEST_STAGE = 1e9
LARGEST_MEMORY = 2**60
#: Unicode categories that a terminal or a browser interprets instead of showing
CONTROLS = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def as_plain(text: str, longest: int = 500) -> str:
    """A third-party text for a terminal or a log: without control characters, and not too long."""
    shown = "".join(map(_as_visible, text))
    if len(shown) > longest:
        return f"{shown[:longest]}…"
    return shown


def _as_visible(character: str) -> str:
    return "\ufffd" if unicodedata.category(character) in CONTROLS else character


def _require_plain(text: str) -> str:
    if any(unicodedata.category(character) in CONTROLS for character in text):
        raise ValueError("it holds control characters")
    return text


Text = Annotated[str, Field(max_length=500), AfterValidator(_require_plain)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class SubmissionError(BenchError):
    """A submission breaks a rule of its format or its track."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(as_plain(message), hint)


def _require_names(value: AxisValue) -> AxisValue:
    for text in (value.name, value.label):
        if not 0 < len(text) <= LONGEST_LABEL:
            raise ValueError(f"a name or label has {len(text)} characters, at most {LONGEST_LABEL} are allowed")
        _require_plain(text)
    return value


class Source(BaseModel):
    """The package that the defense is part of."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    distribution: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    version: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+!-]{0,99}$")]


class Submission(BaseModel):
    """The content of submission.json.

    `claims` are the authors' own means, as fractions of 1; `files` are sha256 hashes by path.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    schema_version: Literal[1] = Field(1, alias="schema")
    track: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,49}$")]
    track_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    defense: Annotated[AxisValue, AfterValidator(_require_names)]
    stage: Literal["pre_training", "in_training", "post_training"]
    clean_fraction: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = 0.0
    sees_ground_truth: bool = False
    source: Source
    core_version: Text
    authors: Text = ""
    paper: Text = ""
    code: Text = ""
    claims: dict[Literal["ba", "asr", "ra", "der"], Share] = {}
    files: Annotated[dict[str, str], Field(max_length=MOST_FILES)]

    @property
    def title(self) -> str:
        """Defense, package and version."""
        return f"{self.defense.label} ({self.source.distribution} {self.source.version})"


def read_json(path: Path) -> Any:  # noqa: ANN401
    """The JSON in a file: UTF-8, of limited size and depth, with unique keys and finite numbers of limited length."""
    if path.stat().st_size > LARGEST_JSON:
        raise SubmissionError(f"'{path.name}' is larger than {LARGEST_JSON} bytes")
    try:
        value = json.loads(
            path.read_text(encoding="utf-8"), object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite,
            parse_int=_short,
        )  # fmt: skip
        _check_depth(value)
        json.dumps(value, ensure_ascii=False).encode()  # fails on half a surrogate pair, which cannot be written again
    except (ValueError, RecursionError) as error:
        raise SubmissionError(f"'{path.name}' is not valid JSON: {error}") from error
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    counts = Counter(key for key, _ in pairs)
    for key, count in counts.items():
        if count > 1:
            raise ValueError(f"the key {key!r} occurs twice")
    return dict(pairs)


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no number in JSON")


def _check_depth(value: object) -> None:
    level = [value]
    for _ in range(DEEPEST):
        if not level:
            return
        inner: list[object] = []
        for part in level:
            if isinstance(part, dict):
                inner += part.values()
            elif isinstance(part, list):
                inner += part
        level = inner
    raise ValueError(f"it is nested deeper than {DEEPEST}")


def _short(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise ValueError(f"an integer has {len(text)} digits")
    return int(text)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is too large")
    return number


@contextmanager
def open_submission(path: Path) -> Iterator[Path]:
    """The folder of a submission; an archive is unpacked into a temporary one after every name in it was checked."""
    if path.is_dir():
        yield path
        return
    if not path.is_file():
        raise SubmissionError(f"there is no submission '{path}'", "`bbn leaderboard pack` makes one")
    with tempfile.TemporaryDirectory(prefix="bbn-submission-") as folder:
        _unpack(path, Path(folder))
        yield Path(folder)


def _unpack(path: Path, folder: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            parts = [part for part in archive.infolist() if not part.is_dir()]
            _check_archive(parts, path)
            for part in parts:
                target = folder / part.filename
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(part) as source, target.open("wb") as file:
                    _copy(source, file, part)
    except (zipfile.BadZipFile, OSError, RuntimeError, EOFError, ValueError, zlib.error, LZMAError) as error:
        raise SubmissionError(f"'{path}' is not a readable zip archive: {error}") from error


def _check_archive(parts: list[zipfile.ZipInfo], path: Path) -> None:
    if len(parts) > MOST_FILES or sum(part.file_size for part in parts) > LARGEST_SUBMISSION:
        raise SubmissionError(f"'{path}' unpacks to more than {MOST_FILES} files or {LARGEST_SUBMISSION} bytes")
    for part in parts:
        if stat.S_ISLNK(part.external_attr >> 16):
            raise SubmissionError(f"'{path}': {part.filename!r} is a symbolic link")
        if not ALLOWED.fullmatch(part.filename):
            raise SubmissionError(f"'{path}': {part.filename!r} does not belong in a submission")
        if part.filename.endswith(".json") and part.file_size > LARGEST_JSON:
            raise SubmissionError(f"'{path}': {part.filename!r} is larger than {LARGEST_JSON} bytes")
    names = [part.filename for part in parts]
    if len(set(names)) < len(names):
        raise SubmissionError(f"'{path}': a file occurs twice")


def _copy(source: Any, file: Any, part: zipfile.ZipInfo) -> None:  # noqa: ANN401
    """Unpack at most the declared size: the directory of an archive may understate it."""
    left = part.file_size
    while chunk := source.read(min(2**20, left + 1)):
        left -= len(chunk)
        if left < 0:
            raise SubmissionError(f"{part.filename!r} unpacks to more than it declares")
        file.write(chunk)


def read_submission(folder: Path) -> tuple[Submission, dict[str, Record]]:
    """The manifest and the records by key of an unpacked submission, after all files and hashes were checked."""
    path = folder / MANIFEST
    if not path.is_file() or path.is_symlink():
        message = f"'{folder}' is not a submission: it has no {MANIFEST}"
        raise SubmissionError(message, "`bbn leaderboard pack` makes one")
    raw = read_json(path)
    schema = raw.get("schema") if isinstance(raw, dict) else None
    if isinstance(schema, int) and schema > SCHEMA:
        raise SubmissionError(
            f"{MANIFEST} has schema {schema}, this version reads {SCHEMA}", "update backdoor-bench-none"
        )
    submission: Submission = validate(Submission, raw, MANIFEST)
    _check_files(folder, submission.files)
    records = {}
    for name in submission.files:
        if name.startswith("records/"):
            record: Record = validate(Record, read_json(folder / name), name)
            _check_record(record, name)
            records[Path(name).stem] = record
    return submission, records


def _check_record(record: Record, name: str) -> None:
    """Raise `SubmissionError` for a record that a site cannot show: axes are missing, or numbers are out of range."""
    faults: list[str] = []
    if set(record.axes) != set(AXES):
        faults.append(f"axes: {', '.join(sorted(record.axes))} are not {', '.join(sorted(AXES))}")
    for axis, value in record.axes.items():
        try:
            _require_names(value)
        except ValueError as error:
            faults.append(f"axes.{axis}: {error}")
    for stage, cost in record.costs.items():
        if not 0 <= cost.seconds <= LONGEST_STAGE or not 0 <= (cost.peak_memory or 0) <= LARGEST_MEMORY:
            faults.append(f"costs.{stage}: {cost.seconds:g} s and {cost.peak_memory} bytes cannot be")
    if faults:
        raise SubmissionError(f"{name}: {faults[0]}")


def validate(model: Any, raw: object, name: str) -> Any:  # noqa: ANN401
    """`raw` as a `model`; `SubmissionError` names the file and its first fault."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        fault = error.errors()[0]
        location = ".".join(map(str, fault["loc"])) or "-"
        raise SubmissionError(f"{name}: {location}: {fault['msg']}") from error


def _check_files(folder: Path, files: Mapping[str, str]) -> None:
    present = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_symlink() or path.is_file()}
    present -= {MANIFEST}
    if odd := sorted(present.symmetric_difference(files)):
        fault = "not listed in" if odd[0] in present else "missing beside"
        raise SubmissionError(f"{odd[0]!r} is {fault} {MANIFEST}")
    for name, wanted in files.items():
        path = folder / name
        if not ALLOWED.fullmatch(name) or path.is_symlink() or path.parent.is_symlink():
            raise SubmissionError(f"{name!r} does not belong in a submission")
        if hash_file(path) != wanted:
            raise SubmissionError(f"{name!r} does not have the hash in {MANIFEST}", "it was changed after packing")


def hash_file(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_submission(folder: Path, submission: Submission) -> None:
    """Write the manifest into `folder`, beside the files it lists."""
    write_json(folder / MANIFEST, submission)


def write_json(path: Path, model: BaseModel) -> None:
    """Write a manifest or a record."""
    text = json.dumps(model.model_dump(mode="json", by_alias=True), indent=1, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def write_archive(folder: Path, path: Path) -> None:
    """The submission in `folder` as a zip archive."""
    archive = shutil.make_archive(str(path.with_suffix("")), "zip", folder)
    Path(archive).replace(path)  # make_archive ends every name in .zip
