"""What the executor `ray` runs on the machines of a cluster."""

from __future__ import annotations

import json
import platform
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from backdoor_bench_none.contracts.executor import Event
from backdoor_bench_none.executors.local import Local
from backdoor_bench_none.executors.place import pack_event, run_group, unpack_group
from backdoor_bench_none.executors.travel import list_files, write_file

#: an event as JSON values, and the files that came to be before it
Report = tuple[dict[str, Any], dict[str, bytes]]


class RayPlace:
    """An actor that runs a group in local processes; `take` may be called while `run` is under way."""

    def __init__(self) -> None:
        # Ray's own main module, which every local process would import
        sys.modules["__main__"].__file__ = None
        self._reports: SimpleQueue[Report] = SimpleQueue()
        #: the results folder of a machine that does not see the run's
        self._folder = tempfile.TemporaryDirectory(prefix="bbn-")
        self._sent: set[str] = set()

    def greet(self, token: str) -> tuple[str, bool]:
        """The name of the node, and whether it sees the file `token` of the results folder."""
        return platform.node(), Path(token).exists()

    def run(self, packed: str, local: Mapping[str, Any], parcels: Mapping[str, Any] | None) -> None:
        """Run a packed group in an executor `local` with these parameters.

        `parcels` are the artifacts that it needs, by path, in the object store; None if this machine sees the results.
        """
        group, settings, versions = unpack_group(json.loads(packed))
        if parcels is None:
            run_group(group, settings, versions, Local(**local), lambda event: self._report(event, {}))
            return
        results = Path(self._folder.name)
        self._unpack(parcels, results)
        own = replace(settings, results=results)
        run_group(group, own, versions, Local(**local), lambda event: self._report(event, self._collect(event)))

    def take(self) -> list[Report]:
        """The reports since the last call."""
        reports: list[Report] = []
        while True:
            try:
                reports.append(self._reports.get_nowait())
            except Empty:
                return reports

    def _report(self, event: Event, files: dict[str, bytes]) -> None:
        self._reports.put((pack_event(event), files))

    def _unpack(self, parcels: Mapping[str, Any], results: Path) -> None:
        import ray

        there = list_files(results)
        for path, reference in parcels.items():
            if path not in there:
                write_file(results, path, ray.get(reference))
        self._sent |= set(parcels)

    def _collect(self, event: Event) -> dict[str, bytes]:
        """The files that have come to be since the last outcome."""
        if event.outcome is None:
            return {}
        results = Path(self._folder.name)
        new = list_files(results) - self._sent
        self._sent |= new
        return {path: (results / path).read_bytes() for path in sorted(new)}
