"""Groups of jobs for places that do not share a machine: every network is trained once, and needs come first."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backdoor_bench_none.contracts.executor import Group
from backdoor_bench_none.contracts.job import CELL, Job
from backdoor_bench_none.planning.stage_table import find_stage
from backdoor_bench_none.run.grouping import group_by_network

NETWORKS = ("crafter", "backbone", "benign", "victim")


def job(name: str, needs: str = "") -> Job:
    kind = name.partition(":")[0]
    return Job(name, kind, name, {}, tuple(needs.split()))


def names(groups: list[Group]) -> list[list[str]]:
    return [[job.id for job in group] for group in groups]


TWO_VICTIMS = [
    job("data:d"),
    job("poison:p", "data:d"),
    job("victim:v", "data:d poison:p"),
    job("cell:v1", "data:d poison:p victim:v"),
    job("cell:v2", "data:d poison:p victim:v"),
    job("victim:w", "data:d poison:p"),
    job("cell:w1", "data:d poison:p victim:w"),
    job("cell:alone", "data:d poison:p"),
]


def test_the_cells_of_a_victim_are_together_with_it_and_what_it_needs() -> None:
    assert names(group_by_network(TWO_VICTIMS)) == [
        ["data:d", "poison:p", "victim:v", "cell:v1", "cell:v2"],
        ["data:d", "poison:p", "victim:w", "cell:w1"],
        ["data:d", "poison:p", "cell:alone"],
    ]


def test_a_network_that_several_groups_need_comes_first_and_alone() -> None:
    jobs = [
        job("data:d"), job("crafter:c", "data:d"), job("poison:p", "data:d crafter:c"),
        job("victim:v", "data:d poison:p"), job("cell:v", "data:d poison:p victim:v"),
        job("victim:w", "data:d poison:p"), job("cell:w", "data:d poison:p victim:w"),
    ]  # fmt: skip
    assert names(group_by_network(jobs)) == [
        ["data:d", "crafter:c"],
        ["data:d", "poison:p", "victim:v", "cell:v"],
        ["data:d", "poison:p", "victim:w", "cell:w"],
    ]


def test_the_victim_of_one_cell_that_is_the_benign_network_of_another_is_trained_once() -> None:
    jobs = [
        job("data:d"), job("victim:clean", "data:d"), job("cell:clean", "data:d victim:clean"),
        job("victim:joined", "data:d victim:clean"), job("cell:joined", "data:d victim:joined"),
    ]  # fmt: skip
    assert names(group_by_network(jobs)) == [
        ["data:d", "victim:clean"],
        ["data:d", "cell:clean"],
        ["data:d", "victim:joined", "cell:joined"],
    ]


def test_a_large_group_is_split_and_its_victim_comes_first() -> None:
    split = names(group_by_network(TWO_VICTIMS, cells=1))
    assert split[0] == ["data:d", "poison:p", "victim:v"]
    assert ["data:d", "poison:p", "cell:v1"] in split
    assert ["data:d", "poison:p", "victim:w", "cell:w1"] in split  # of which one group has need


@st.composite
def random_jobs(draw: st.DrawFn) -> list[Job]:
    kinds = ("data", "crafter", "poison", "benign", "victim", CELL)
    jobs: list[Job] = []
    for number in range(draw(st.integers(1, 14))):
        kind = draw(st.sampled_from(kinds))
        before = [other.id for other in jobs if kinds.index(other.kind) < kinds.index(kind)]
        needs = draw(st.lists(st.sampled_from(before), unique=True)) if before else []
        jobs.append(job(f"{kind}:{number}", " ".join(needs)))
    return jobs


@given(random_jobs(), st.sampled_from([None, 1, 2]))
def test_every_cell_is_in_one_group_every_network_in_at_most_one_and_needs_come_first(
    jobs: list[Job], cells: int | None
) -> None:
    groups = group_by_network(jobs, cells)
    counts = Counter(job.id for group in groups for job in group)
    assert all(counts[job.id] == 1 for job in jobs if job.kind == CELL)
    assert all(counts[job.id] <= 1 for job in jobs if job.kind in NETWORKS)
    assert all(counts[need] >= 1 for job in jobs if counts[job.id] for need in job.needs)
    ended: set[str] = set()
    for group in groups:
        for member in group:
            assert set(member.needs) <= ended | {other.id for other in group}
        ended |= {member.id for member in group}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_stages_that_train_are_marked(name: str) -> None:
    assert find_stage(name).trains
    assert not find_stage("data").trains
    assert not find_stage("poison").trains
