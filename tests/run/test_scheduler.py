"""The scheduler: order, slots, failures handed down, and stopping."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from backdoor_bench_none.contracts.executor import Event, Group
from backdoor_bench_none.contracts.job import Job, Outcome
from backdoor_bench_none.run.scheduler import Scheduler

DONE = Outcome("done")
FAILED = Outcome("failed", "ValueError", "it broke", "Traceback", warnings=("told once",))


@dataclass
class FakePool:
    """Ends one job per wait, the first started first or last, each with the outcome given for its id."""

    slots: int = 1
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    last_first: bool = False
    started: list[str] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    needs_done: list[bool] = field(default_factory=list)
    most: int = 0

    def has_room(self, group: Group) -> bool:
        return len(self.started) - len(self.ended) < self.slots

    def submit(self, group: Group) -> None:
        (job,) = group
        done = {job for job in self.ended if self.outcomes.get(job, DONE).status == "done"}
        self.needs_done.append(set(job.needs) <= done)
        self.started.append(job.id)
        self.most = max(self.most, len(self.started) - len(self.ended))

    def wait(self, timeout: float) -> list[Event]:
        running = [job for job in self.started if job not in self.ended]
        job = running[-1 if self.last_first else 0]
        self.ended.append(job)
        return [Event(job, done=1, total=2), Event(job, outcome=self.outcomes.get(job, DONE))]


def jobs(**needs: str) -> list[Job]:
    """Jobs by id, each with the ids it needs."""
    return [Job(name, "cell", name, {}, tuple(needed.split())) for name, needed in needs.items()]


def singles(todo: list[Job]) -> list[Group]:
    return [(job,) for job in todo]


def run(pool: FakePool, todo: list[Job], keep_going: Callable[[], bool] = lambda: True) -> dict[str, Outcome]:
    return {job.id: outcome for job, outcome in Scheduler(singles(todo), pool).run(keep_going)}


DIAMONDS = jobs(data="", poison="data", victim="poison", a="victim", b="victim", c="poison", d="data")


@pytest.mark.parametrize("last_first", [False, True])
@pytest.mark.parametrize("slots", [1, 2, 3, 100])
def test_every_job_runs_once_after_its_needs_within_the_slots(slots: int, last_first: bool) -> None:
    pool = FakePool(slots, last_first=last_first)
    outcomes = run(pool, DIAMONDS)
    assert sorted(pool.started) == sorted(outcomes) == sorted(job.id for job in DIAMONDS)
    assert set(outcomes.values()) == {DONE}
    assert all(pool.needs_done)
    assert pool.most <= slots


def test_free_slots_are_used() -> None:
    pool = FakePool(slots=3)
    run(pool, jobs(a="", b="", c="", d=""))
    assert pool.most == 3


def test_one_slot_keeps_the_order() -> None:
    pool = FakePool()
    run(pool, DIAMONDS)
    assert pool.started == [job.id for job in DIAMONDS]


def test_a_failure_is_handed_down_to_dependents_only() -> None:
    pool = FakePool(2, {"victim": FAILED})
    outcomes = run(pool, DIAMONDS)
    assert {name for name, outcome in outcomes.items() if outcome.status == "failed"} == {"victim", "a", "b"}
    assert {"a", "b"}.isdisjoint(pool.started)
    assert {"c", "d"} <= set(pool.started)


def test_a_failure_is_handed_down_all_the_way_with_its_reason_but_is_warned_of_once() -> None:
    outcomes = run(FakePool(outcomes={"data": FAILED}), DIAMONDS)
    assert {outcome.message for outcome in outcomes.values()} == {"it broke"}
    assert [name for name, outcome in outcomes.items() if outcome.warnings] == ["data"]


def test_a_timeout_stays_a_timeout() -> None:
    outcomes = run(FakePool(outcomes={"a": Outcome("timeout", "Timeout", "too long")}), jobs(a="", b="a"))
    assert outcomes["b"].status == "timeout"


def test_stopping_finishes_what_runs_and_starts_no_more() -> None:
    pool = FakePool(slots=2)
    outcomes = run(pool, jobs(a="", b="", c="", d=""), lambda: not pool.ended)
    assert pool.started == ["a", "b"]
    assert list(outcomes) == ["a", "b"]


def test_stopped_from_the_start() -> None:
    pool = FakePool()
    assert run(pool, jobs(a=""), lambda: False) == {}
    assert pool.started == []


def test_stopping_on_a_failure_that_was_handed_down_starts_no_more() -> None:
    """As `bbn run -x` does when a victim fails: the cell that needs it is the first failed cell."""
    pool = FakePool(outcomes={"victim": FAILED})
    failed: list[str] = []
    for job, _ in Scheduler(singles(jobs(victim="", cell="victim", other="")), pool).run(lambda: not failed):
        if job.id == "cell":
            failed.append(job.id)
    assert failed == ["cell"]
    assert pool.started == ["victim"]


def test_progress_and_starts_are_told() -> None:
    told: list[Event] = []
    begun: list[str] = []
    scheduler = Scheduler(singles(jobs(a="", b="a")), FakePool(), told.append, lambda job: begun.append(job.id))
    assert len(list(scheduler.run(lambda: True))) == 2
    assert begun == ["a", "b"]
    assert [(event.job, event.done, event.total, event.outcome) for event in told] == [
        ("a", 1, 2, None), ("b", 1, 2, None),
    ]  # fmt: skip
