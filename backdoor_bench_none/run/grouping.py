"""Groups the jobs of cells by the network they share, so that no network is trained in two places."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from backdoor_bench_none.contracts.executor import Group
from backdoor_bench_none.contracts.job import CELL, Job
from backdoor_bench_none.planning.stage_table import find_stage


def group_by_network(jobs: Sequence[Job], cells: int | None = None) -> list[Group]:
    """Groups of `jobs`, each of the cells of one victim with what they need; with at most `cells` cells, if given.

    A network that several groups need, such as the one an attack crafts with, is a group of its own, for which they
    wait. What is cheap, data and poisoned sets, is in every group that needs it: the first to compute it keeps it for
    all. A cell that shares no network is alone. `jobs` are in an order in which each comes after those it needs; so are
    the groups.
    """
    by_id = {job.id: job for job in jobs}
    needs: dict[str, list[str]] = {}
    for job in jobs:
        direct_and_further = (need for direct in job.needs for need in (*needs[direct], direct))
        needs[job.id] = list(dict.fromkeys(direct_and_further))
    cells_of: dict[str, list[str]] = defaultdict(list)
    for job in jobs:
        if job.kind == CELL:
            networks = [need for need in needs[job.id] if _trains(by_id[need])]
            cells_of[networks[-1] if networks else job.id].append(job.id)
    parts = [part for members in cells_of.values() for part in _split(members, cells)]
    users: dict[str, int] = defaultdict(int)
    for part in parts:
        for need in {need for cell in part for need in needs[cell]}:
            users[need] += _trains(by_id[need])
    alone = [name for name in by_id if users[name] > 1]
    position = {name: index for index, name in enumerate(by_id)}
    groups: list[Group] = []
    for members in [[name] for name in alone] + parts:
        inside = {need for member in members for need in needs[member]} - set(alone) | set(members)
        groups.append(tuple(by_id[name] for name in sorted(inside, key=position.__getitem__)))
    return groups


def _trains(job: Job) -> bool:
    return job.kind != CELL and find_stage(job.kind).trains


def _split(members: list[str], size: int | None) -> list[list[str]]:
    step = size or len(members)
    return [members[start : start + step] for start in range(0, len(members), step)]
