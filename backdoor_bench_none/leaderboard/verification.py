"""What a verifier found: verification.json, beside the submission."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from backdoor_bench_none.leaderboard.submission import VERIFICATION
from backdoor_bench_none.measures import Counts

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
    core_version: str
    device: str


def write_verification(folder: Path, verification: Verification) -> Path:
    """Write verification.json beside the submission."""
    path = folder / VERIFICATION
    path.write_text(json.dumps(verification.model_dump(mode="json"), indent=1, ensure_ascii=False), encoding="utf-8")
    return path
