"""A place on a cluster: a pool of local processes that runs a group of jobs and reports on them as JSON."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from backdoor_bench_none.contracts.executor import Event, Group
from backdoor_bench_none.contracts.job import Job, Outcome, Settings
from backdoor_bench_none.executors.local import Local
from backdoor_bench_none.registry.components import Registry
from backdoor_bench_none.registry.plugins import Plugins, own_version
from backdoor_bench_none.run.scheduler import Scheduler
from backdoor_bench_none.system import keep_working_directory


def run_group(
    group: Group, settings: Settings, versions: Mapping[str, str], local: Local, report: Callable[[Event], None]
) -> None:
    """Run a group in processes of this machine, if it has the software that the driver has; `report` gets all events.

    The error of a job on another machine names it.
    """
    fault = find_other_versions(settings, versions) or find_absent_folder(settings.results)
    if fault is not None:
        for job in group:
            report(Event(job.id, Outcome("failed", "PlaceError", f"node {platform.node()}: {fault}", kind=job.kind)))
        return
    inside = {job.id for job in group}
    alone = [(replace(job, needs=tuple(need for need in job.needs if need in inside)),) for job in group]
    with local.open(settings) as pool:
        scheduler = Scheduler(alone, pool, report, lambda job: report(Event(job.id)))
        for job, outcome in scheduler.run(lambda: True):
            report(Event(job.id, outcome))


def open_registry(settings: Settings) -> Registry:
    """The registry that jobs have."""
    with keep_working_directory():
        return Registry(Plugins(external=settings.external, bbnfile=settings.bbnfile, disabled=settings.disabled))


def find_versions(settings: Settings) -> dict[str, str]:
    """The versions of this package and of all plugins that are loaded here, by name."""
    providers = open_registry(settings).plugins.providers
    return {"backdoor-bench-none": own_version(), **{one.plugin: one.version for one in providers}}


def find_other_versions(settings: Settings, wanted: Mapping[str, str]) -> str | None:
    """The first package that is missing here or has another version than `wanted`, in words; None if none has."""
    installed = find_versions(settings)
    for name, version in wanted.items():
        if name not in installed:
            return f"{name} {version} is not installed; install there what is installed here"
        if installed[name] != version:
            return f"{name} has version {installed[name]}, here it is {version}; install the same everywhere"
    return None


def find_absent_folder(results: Path) -> str | None:
    """That this machine does not see the results folder, in words; None if it does."""
    if results.is_dir():
        return None
    return f"the results folder {results} is not there; choose one that all nodes see"


# Groups and events as JSON, which is what travels between machines and versions of Python.


def pack_group(group: Group, settings: Settings, versions: Mapping[str, str]) -> dict[str, Any]:
    """A group and what its place needs to know, as JSON values."""
    paths = {"results": str(settings.results), "bbnfile": None if settings.bbnfile is None else str(settings.bbnfile)}
    disabled = None if settings.disabled is None else sorted(settings.disabled)
    return {
        "jobs": [dataclasses.asdict(job) for job in group],
        "settings": {**dataclasses.asdict(settings), **paths, "disabled": disabled},
        "versions": dict(versions),
    }


def unpack_group(packed: Mapping[str, Any]) -> tuple[Group, Settings, dict[str, str]]:
    """What `pack_group` packed."""
    group = tuple(Job(**{**job, "needs": tuple(job["needs"])}) for job in packed["jobs"])
    values = dict(packed["settings"])
    values["results"] = Path(values["results"])
    values["bbnfile"] = None if values["bbnfile"] is None else Path(values["bbnfile"])
    values["disabled"] = None if values["disabled"] is None else frozenset(values["disabled"])
    return group, Settings(**values), dict(packed["versions"])


def pack_event(event: Event) -> dict[str, Any]:
    """An event as JSON values."""
    return dataclasses.asdict(event)


def unpack_event(packed: Mapping[str, Any]) -> Event:
    """What `pack_event` packed."""
    values = dict(packed)
    if values["outcome"] is not None:
        outcome = dict(values["outcome"])
        values["outcome"] = Outcome(**{**outcome, "warnings": tuple(outcome["warnings"])})
    return Event(**values)
