"""Tracks: versioned matrices with rules, to whose cells a defense is submitted."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field

from backdoor_bench_none.errors import ConfigError, did_you_mean
from backdoor_bench_none.planning.plan import Plan, plan_config
from backdoor_bench_none.planning.reading import parse_config
from backdoor_bench_none.registry.components import Registry

FOLDER = Path(__file__).parent / "tracks"


class TrackFile(BaseModel):
    """The content of a track's YAML file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    track: str
    title: str
    rules: str
    highest_clean_fraction: float = Field(ge=0, lt=1)
    benchmark: dict[str, Any]


@dataclass(frozen=True)
class Track:
    """A track, and the sha256 of its file, which every submission states."""

    name: str
    title: str
    rules: str
    highest_clean_fraction: float
    benchmark: dict[str, Any]
    sha256: str

    def benchmark_text(self, defense: str | None = None, params: dict[str, Any] | None = None) -> str:
        """Its benchmark file, with `defense` beside no_defense if one is given."""
        matrix = dict(self.benchmark["matrix"])
        if defense is not None and (defense != "no_defense" or params):
            matrix["defense"] = ["no_defense", {"name": defense, "params": params or {}}]
        text: str = yaml.safe_dump({**self.benchmark, "matrix": matrix}, sort_keys=False, default_flow_style=None)
        return text

    def commented_text(self) -> str:
        """Its benchmark file with the title and the rules in comments above it."""
        rules = "".join(f"# - {rule}\n" for rule in self.rules.splitlines())
        return (
            f"# {self.title}. Add your defense to `defense`, and change nothing else.\n{rules}{self.benchmark_text()}"
        )

    def plan(self, registry: Registry, defense: str | None = None, params: dict[str, Any] | None = None) -> Plan:
        """Its cells with `defense` alone; by default those of no_defense."""
        text = self.benchmark_text(defense, params)
        plan = plan_config(*parse_config(text, f"{self.name}.yaml"), registry, need_data=True)
        wanted = defense or "no_defense"
        return plan.select(lambda cell: cell.defense.name == wanted)


def track_names() -> list[str]:
    """The names of all tracks."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read_track(name: str) -> Track:
    """The track of that name; `ConfigError` if there is none."""
    if name not in track_names():
        raise ConfigError(f"there is no track '{name}'", did_you_mean(name, track_names()))
    data = (FOLDER / f"{name}.yaml").read_bytes()
    file = TrackFile.model_validate(yaml.safe_load(data))
    sha256 = hashlib.sha256(data).hexdigest()
    return Track(file.track, file.title, file.rules, file.highest_clean_fraction, file.benchmark, sha256)
