"""Runs groups of jobs on the machines of a Ray cluster, each in a pool of local processes."""

from __future__ import annotations

import json
import os
import socket
import sys
import uuid
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Literal

from pydantic import Field, PositiveInt

from backdoor_bench_none.contracts.executor import Event, Executor, Group, Pool
from backdoor_bench_none.contracts.job import CELL, Job, Outcome, Settings
from backdoor_bench_none.errors import BenchError
from backdoor_bench_none.executors.place import find_versions, open_registry, pack_group, unpack_event
from backdoor_bench_none.executors.travel import find_needed, write_file
from backdoor_bench_none.results.store import Store
from backdoor_bench_none.run.grouping import group_by_network

#: how often the jobs of a lost place are tried again
MOST_RETRIES = 2
#: seconds until a cluster must have answered
KNOCK = 10.0
#: seconds between two looks at the reports of the places
LOOK = 0.5


class Ray(Executor):
    """Places on the machines of a Ray cluster: each runs the cells of one victim at a time, in local processes.

    The jobs of a place that is lost run in another one, at most twice more. Machines that do not see the results folder
    get what they need, and send what they compute, through Ray's object store.
    """

    address: str = Field(
        "auto", description="auto: the cluster of this machine, else a new one on it; or a cluster's address"
    )
    cpus: PositiveInt = Field(1, description="cores of a place")
    gpus: float = Field(0, ge=0, description="GPUs of a place; a share, such as 0.25, puts several on one GPU")
    places: PositiveInt | None = Field(None, description="places at the same time; default: as many as fit")
    shared: bool | Literal["auto"] = Field(
        "auto", description="whether places see the results folder; auto: each is asked"
    )
    cells: PositiveInt | None = Field(None, description="cells of one victim in a group; default: all")
    slots: PositiveInt | Literal["auto"] = Field("auto", description="jobs at the same time in a place")

    def group(self, jobs: Sequence[Job]) -> list[Group]:
        """The cells of a victim, and what they need, are a group."""
        return group_by_network(jobs, self.cells)

    def check(self) -> None:
        """Raise `BenchError` if Ray is not installed."""
        if find_spec("ray") is None:
            raise BenchError("executor ray: Ray is not installed", "pip install 'backdoor-bench-none[ray]'")

    @contextmanager
    def open(self, settings: Settings) -> Iterator[Pool]:
        """A pool of places; `BenchError` if there is no such cluster, or no room on it."""
        import ray

        connected = ray.is_initialized()
        if not connected:
            self._connect()
        pool = None
        try:
            pool = _RayPool(self, settings)
            yield pool
        finally:
            if pool is not None:
                pool.stop()
            if not connected:
                ray.shutdown()

    def _connect(self) -> None:
        import ray

        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # of a cluster that starts here; Ray's 15 lets workers starve beside anything else
        os.environ.setdefault("RAY_worker_niceness", "0")
        self._knock()
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        try:
            if self.address != "auto":
                ray.init(address=self.address, **quiet)
                return
            try:
                ray.init(address="auto", **quiet)
            except ConnectionError:
                ray.init(include_dashboard=False, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise BenchError(
                f"executor ray: no cluster answers at '{self.address}': {reason}", "see `ray status`"
            ) from error

    def _knock(self) -> None:
        """Raise `BenchError` unless something listens at the address, which Ray itself asks for minutes."""
        host, _, port = self.address.rpartition("://")[2].rpartition(":")
        if not port.isdecimal():
            return
        try:
            socket.create_connection((host, int(port)), timeout=KNOCK).close()
        except OSError as error:
            raise BenchError(
                f"executor ray: no cluster answers at '{self.address}': {error.strerror or error}", "see `ray status`"
            ) from error

    def count_room(self) -> int:
        """The number of places that fit on the cluster; `BenchError` if not even one does."""
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        fits = [_count_fits(node, self.cpus, self.gpus) for node in nodes]
        if not sum(fits):
            largest = max(((node.get("CPU", 0), node.get("GPU", 0)) for node in nodes), default=(0, 0))
            raise BenchError(
                f"executor ray: no node has {self.cpus} cores and {self.gpus:g} GPUs; the largest has "
                f"{largest[0]:g} and {largest[1]:g}",
                "ask for less: cpus, gpus",
            )
        return min(sum(fits), self.places or sys.maxsize)


def _count_fits(node: Mapping[str, float], cpus: int, gpus: float) -> int:
    fits = int(node.get("CPU", 0) // cpus)
    if gpus:
        fits = min(fits, int(node.get("GPU", 0) / gpus + 1e-9))
    return fits


@dataclass
class _Assignment:
    """A group, how often a place was lost with it, and what its records say about that."""

    group: Group
    losses: tuple[str, ...] = ()
    #: the ids of the jobs that have not ended
    left: set[str] = field(default_factory=set)


@dataclass
class _Place:
    """An actor, which is starting until `greeting` is there, and what it runs."""

    actor: Any
    greeting: Any
    node: str = "of which nothing is known"
    sees_results: bool = False
    assignment: _Assignment | None = None
    end: Any = None

    @property
    def is_idle(self) -> bool:
        return self.greeting is None and self.assignment is None


class _RayPool:
    def __init__(self, executor: Ray, settings: Settings) -> None:
        room = executor.count_room()
        self._executor = executor
        self._settings = settings.absolute()
        self._versions = find_versions(settings)
        self._registry = open_registry(settings)
        self._token = self._settings.results / f".seen-{uuid.uuid4().hex}"
        self._token.touch()
        self._waiting: deque[_Assignment] = deque()
        self._places = [self._start() for _ in range(room)]
        self._parcels: dict[str, Any] = {}
        self._events: list[Event] = []

    def has_room(self, group: Group) -> bool:
        busy = sum(place.assignment is not None for place in self._places)
        return busy + len(self._waiting) < len(self._places)

    def submit(self, group: Group) -> None:
        self._waiting.append(_Assignment(group, left={job.id for job in group}))

    def wait(self, timeout: float) -> list[Event]:
        import ray

        self._assign()
        waited_for = [place.greeting or place.end for place in self._places if not place.is_idle]
        if waited_for and not self._events:
            ray.wait(waited_for, timeout=min(timeout, LOOK))
        for place in list(self._places):
            try:
                self._look(place)
            except ray.exceptions.RayActorError:
                self._lose(place)
        events, self._events = self._events, []
        return events

    def stop(self) -> None:
        import ray

        for place in self._places:
            ray.kill(place.actor)
        self._token.unlink(missing_ok=True)

    def _start(self) -> _Place:
        import ray

        from backdoor_bench_none.executors.ray_place import RayPlace

        actor_class = ray.remote(RayPlace).options(
            num_cpus=self._executor.cpus, num_gpus=self._executor.gpus, max_concurrency=2, scheduling_strategy="SPREAD"
        )
        actor: Any = actor_class.remote()
        return _Place(actor, actor.greet.remote(str(self._token)))

    def _assign(self) -> None:
        """Give waiting groups to idle places."""
        for place in self._places:
            if place.is_idle and self._waiting:
                assignment = self._waiting.popleft()
                group = tuple(job for job in assignment.group if job.id in assignment.left)
                packed = json.dumps(pack_group(group, self._settings, self._versions))
                parcels = None if place.sees_results else self._pack(group)
                local = {"slots": self._executor.slots, "cores": self._executor.cpus}
                place.assignment, place.end = assignment, place.actor.run.remote(packed, local, parcels)

    def _pack(self, group: Group) -> dict[str, Any]:
        """The artifacts for the cells of a group, by path, in the object store."""
        import ray

        results = self._settings.results
        needed = list(find_needed(group, results, self._registry))
        for path in needed:
            if path not in self._parcels:
                self._parcels[path] = ray.put((results / path).read_bytes())
        return {path: self._parcels[path] for path in needed}

    def _look(self, place: _Place) -> None:
        """Take what a place has to say; `RayActorError` if it is lost."""
        import ray

        if place.greeting is not None:
            if ray.wait([place.greeting], timeout=0)[0]:
                place.node, sees_results = ray.get(place.greeting)
                place.sees_results = sees_results if self._executor.shared == "auto" else self._executor.shared
                place.greeting = None
            return
        if place.assignment is None:
            return
        has_ended = bool(ray.wait([place.end], timeout=0)[0])  # before its last reports are taken
        for packed, files in ray.get(place.actor.take.remote()):
            for path, data in files.items():
                write_file(self._settings.results, path, data)
            self._note(place.assignment, unpack_event(packed))
        if has_ended:
            assignment, place.assignment = place.assignment, None
            try:
                ray.get(place.end)
            except ray.exceptions.RayTaskError as error:
                self._fail(assignment, f"node {place.node}: {str(error).strip().splitlines()[-1]}")
            self._fail(assignment, f"node {place.node} ended without a word on this job")

    def _note(self, assignment: _Assignment, event: Event) -> None:
        self._events.append(event)
        if event.outcome is None:
            return
        assignment.left.discard(event.job)
        kind, _, key = event.job.partition(":")
        if kind == CELL and event.outcome.status == "done" and assignment.losses:
            store = Store(self._settings.results)
            record = store.read_record(key)
            if record is not None:
                store.write_record(record.model_copy(update={"warnings": [*record.warnings, *assignment.losses]}))

    def _lose(self, place: _Place) -> None:
        """Have the jobs of a lost place run elsewhere, unless that was tried too often; start another place."""
        self._places.remove(place)
        assignment = place.assignment
        if assignment is not None:
            loss = f"node {place.node} was lost while it computed this, which was then computed elsewhere"
            assignment.losses = (*assignment.losses, loss)
            if len(assignment.losses) > MOST_RETRIES:
                self._fail(assignment, f"the place was lost {len(assignment.losses)} times, the last on {place.node}")
            else:
                self._waiting.appendleft(assignment)
        with suppress(BenchError):  # no room is left: the other places go on
            if self._executor.count_room() > len(self._places):
                self._places.append(self._start())
        if not self._places:
            for left in self._waiting:
                self._fail(left, "no node of the cluster is left")
            self._waiting.clear()

    def _fail(self, assignment: _Assignment, message: str) -> None:
        for job in assignment.group:
            if job.id in assignment.left:
                self._events.append(Event(job.id, Outcome("failed", "PlaceLost", message, kind=job.kind)))
        assignment.left.clear()
