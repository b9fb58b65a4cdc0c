"""What a verifier found. It stands in a folder of the verifier's own, under the hash of the submission: what comes
with a submission is its author's word.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from backdoor_bench_none.contracts.measures import Counts
from backdoor_bench_none.errors import BenchError

Verdict = Literal["verified", "reevaluated", "refused"]


class Finding(BaseModel):
    """What was found out about one cell, or the whole (`cell` is empty)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    check: str
    cell: str = ""
    ok: bool
    message: str = ""


class Verification(BaseModel):
    """What `verify` writes. `verified`: every model evaluated and a sample run again; `reevaluated`: every model
    evaluated, nothing run again since the code is a stranger's; `refused`: something does not hold.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    schema_version: Literal[1] = 1
    submission_sha256: str
    track: str
    verdict: Verdict
    findings: list[Finding]
    #: counts of every submitted model as evaluated here, by cell
    reevaluated: dict[str, Counts]
    #: counts of the cells that were run again
    repeated: dict[str, Counts]
    #: what the cells to run again were drawn with
    seed: int
    core_version: str
    device: str


def verification_path(folder: Path, submission_sha256: str) -> Path:
    """Where the verification of a submission stands, by the sha256 of its submission.json."""
    return folder / f"{submission_sha256}.json"


def write_verification(path: Path, verification: Verification) -> None:
    """Write a verification in place of an older one; a link that stands there is replaced, not followed."""
    text = json.dumps(verification.model_dump(mode="json"), indent=1, ensure_ascii=False)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        raise BenchError(f"'{path}' cannot be written: {error.strerror}", "choose another with --output") from error
