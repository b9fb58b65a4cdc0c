"""The result of verifying a submission.

It is kept in the verifier's own folder under the hash of the submission; results in a submission are the author's
claim.
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
    """The outcome of one check of one cell, or of the whole submission (`cell` is empty)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    check: str
    cell: str = ""
    ok: bool
    message: str = ""


class Verification(BaseModel):
    """What `verify` writes.

    The verdict is `verified` if every model was evaluated and a sample of cells run again, `reevaluated` if every
    model was evaluated but nothing run again because the code is third-party, and `refused` if a check failed.
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
    #: the seed of the sample of cells to run again
    seed: int
    core_version: str
    device: str


def verification_path(folder: Path, submission_sha256: str) -> Path:
    """The file of a submission's verification, by the sha256 of its submission.json."""
    return folder / f"{submission_sha256}.json"


def write_verification(path: Path, verification: Verification) -> None:
    """Write a verification, replacing an older one; a link with its name is replaced, not followed."""
    text = json.dumps(verification.model_dump(mode="json"), indent=1, ensure_ascii=False)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        raise BenchError(f"'{path}' cannot be written: {error.strerror}", "choose another with --output") from error
