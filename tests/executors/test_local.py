"""The local executor with real processes: whatever a defense does to its own, the others finish and it has a reason."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from rich.console import Console

from backdoor_bench_none.contracts.executor import Event
from backdoor_bench_none.contracts.job import Job, Outcome, Settings
from backdoor_bench_none.contracts.record import Record
from backdoor_bench_none.executors import local
from backdoor_bench_none.executors.local import Local
from backdoor_bench_none.planning.plan import Plan, make_plan
from backdoor_bench_none.planning.stage_table import record_key
from backdoor_bench_none.registry.components import Registry
from backdoor_bench_none.registry.plugins import Plugins
from backdoor_bench_none.results.store import Store
from backdoor_bench_none.run.progress import Lines
from backdoor_bench_none.run.runner import Options, pack_jobs, run_plan
from backdoor_bench_none.run.scheduler import Scheduler
from backdoor_bench_none.system import count_cores

TIMEOUT = 10.0
BBNFILE = """
import os, signal, sys, threading, time
from pathlib import Path
from typing import ClassVar
import torch
from backdoor_bench_none.api import Defense, DefenseResult, Stage, hookimpl

def good(task, context):
    return DefenseResult(task.new_model(), extras={"threads": torch.get_num_threads(), "pid": os.getpid()})

def also_good(task, context):
    return good(task, context)

def lingers_well(task, context):
    threading.Thread(target=time.sleep, args=(1000,)).start()
    return good(task, context)

def trains_for_ages(task, context):
    model = task.new_model()
    task.fit(model, context, epochs=1_000_000)
    return DefenseResult(model)

def hangs(task, context):
    Path("hanging.pid").write_text(str(os.getpid()))
    time.sleep(1000)

def lingers(task, context):
    threading.Thread(target=time.sleep, args=(1000,)).start()
    return DefenseResult(task.new_model())

def raises(task, context):
    raise ValueError("it broke")

def exits(task, context):
    os._exit(7)

def leaves(task, context):
    sys.exit(3)

def is_killed(task, context):
    os.kill(os.getpid(), signal.SIGKILL)

def returns_a_dict(task, context):
    return {"model": task.new_model()}

def flags_too_few(task, context):
    return DefenseResult(task.new_model(), flagged=torch.zeros(3, dtype=torch.bool))

def returns_another_network(task, context):
    return DefenseResult(torch.nn.Linear(2, 2))

def reports_a_tensor(task, context):
    return DefenseResult(task.new_model(), extras={"found": torch.zeros(1)})

def make(function):
    run = lambda self, task, context: function(task, context)
    return type(function.__name__, (Defense,), {"__doc__": "Misbehaves.", "__module__": __name__, "run": run,
        "stage": Stage.IN_TRAINING, "__annotations__": {"stage": ClassVar[Stage]}})

FUNCTIONS = [good, also_good, lingers_well, trains_for_ages, hangs, lingers, raises, exits, leaves, is_killed,
             returns_a_dict, flags_too_few, returns_another_network, reports_a_tensor]

@hookimpl
def bbn_defenses():
    return {function.__name__: make(function) for function in FUNCTIONS}
"""
#: what a defense does -> how its job ends, and what the reason says
ENDS = {
    "good": ("done", ""),
    "trains_for_ages": ("timeout", "time limit"),
    "hangs": ("timeout", "the time limit of 10 s"),
    "raises": ("failed", "it broke"),
    "exits": ("failed", "exit code 7"),
    "leaves": ("failed", "3"),
    "is_killed": ("failed", "SIGKILL, perhaps for lack of memory"),
    "returns_a_dict": ("failed", "a defense returns a DefenseResult, not dict"),
    "flags_too_few": ("failed", "flagged has shape (3,)"),
    "returns_another_network": ("failed", "state_dict"),
    "reports_a_tensor": ("failed", "extras"),
}


class Ended(NamedTuple):
    outcomes: dict[str, Outcome]
    records: dict[str, Record]
    events: list[Event]
    seconds: float


def write_files(folder: Path, defenses: str) -> Path:
    (folder / "bbnfile.py").write_text(BBNFILE)
    path = folder / "benchmark.yaml"
    path.write_text(
        "version: 1\nname: test\nmatrix:\n  dataset: [{name: digits, params: {image_size: 8}}]\n"
        f"  attack: [badnets]\n  defense: [{defenses}]\n"
        "  architecture: [{name: mlp, params: {hidden: 16, depth: 1}}]\n"
        "defaults: {dataset: {digits: {recipe: {epochs: 1}}}}\n"
    )
    return path


def run(folder: Path, defenses: str, slots: int = 2, *, keeps: bool = False) -> Ended:
    path = write_files(folder, defenses)
    registry = Registry.default(folder)
    plan: Plan = make_plan(path, registry)
    store = Store(folder / "results")
    jobs = pack_jobs(plan.cells, store)
    settings = Settings(store.root, "cpu", TIMEOUT, registry.plugins.bbnfile)
    titles = {f"cell:{record_key(cell)}": cell.defense.name for cell in plan.cells}
    events: list[Event] = []
    started = time.monotonic()
    with Local(slots=slots, keep_processes=keeps).open(settings) as pool:
        ended: list[tuple[Job, Outcome]] = list(
            Scheduler([(job,) for job in jobs], pool, events.append).run(lambda: True)
        )
    outcomes = {titles.get(job.id, job.kind): outcome for job, outcome in ended}
    records = {c.defense.name: record for c in plan.cells if (record := store.read_record(record_key(c))) is not None}
    return Ended(outcomes, records, events, time.monotonic() - started)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(False, id="a process for each job"),
        pytest.param(True, id="processes are kept", marks=pytest.mark.slow),
    ],
)
def ended(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ended]:
    folder, before = tmp_path_factory.mktemp("run"), Path.cwd()
    os.chdir(folder)
    patch = pytest.MonkeyPatch()
    patch.setattr(local, "GRACE", 3.0)
    try:
        yield run(folder, ", ".join(reversed(ENDS)), keeps=request.param)
    finally:
        patch.undo()
        os.chdir(before)


@pytest.mark.parametrize("name", ENDS)
def test_every_job_ends_with_its_reason(name: str, ended: Ended) -> None:
    status, reason = ENDS[name]
    outcome = ended.outcomes[name]
    assert outcome.status == status
    assert reason in outcome.message
    assert (name in ended.records) == (status == "done")


def test_an_exception_keeps_its_traceback(ended: Ended) -> None:
    traceback = ended.outcomes["raises"].traceback
    assert traceback is not None
    assert 'raise ValueError("it broke")' in traceback
    assert ended.outcomes["raises"].error == "ValueError"


def test_shared_stages_are_jobs_of_their_own(ended: Ended) -> None:
    assert {name for name, outcome in ended.outcomes.items() if name not in ENDS} == {"data", "poison"}


def test_slots_share_the_cores(ended: Ended) -> None:
    threads = max(1, count_cores() // 2)
    assert ended.records["good"].extras["threads"] == threads
    assert ended.records["good"].provenance["threads"] == threads


def test_progress_counts_epochs(ended: Ended) -> None:
    told = [(event.done, event.total) for event in ended.events if event.total == 1_000_000]
    assert told[0] == (1, 1_000_000)


@pytest.mark.slow
@pytest.mark.parametrize(("defenses", "keeps", "processes"), [
    ("good, also_good", True, 1), ("good, also_good", False, 2), ("lingers_well, good", True, 2),
])  # fmt: skip
@pytest.mark.usefixtures("soon")
def test_a_process_is_kept_unless_a_job_left_something_in_it(
    defenses: str, keeps: bool, processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(local, "GRACE", 0.5)
    ended = run(tmp_path, defenses, slots=1, keeps=keeps)
    assert {outcome.status for outcome in ended.outcomes.values()} == {"done"}
    assert len({record.extras["pid"] for record in ended.records.values()}) == processes


def test_a_process_that_died_while_it_waited_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_files(tmp_path, "good")
    registry = Registry.default(tmp_path)
    store = Store(tmp_path / "results")
    data, poison, cell = pack_jobs(make_plan(path, registry).cells, store)
    settings = Settings(store.root, "cpu", None, registry.plugins.bbnfile)
    ended: list[Event] = []
    with Local(slots=1, keep_processes=True).open(settings) as pool:
        for count, job in enumerate((data, poison, cell), 1):
            pool.submit((job,))
            while len(ended) < count:
                ended += [event for event in pool.wait(1.0) if event.outcome is not None]
            (process,) = multiprocessing.active_children()
            process.kill()
            process.join()
    assert [event.outcome and event.outcome.status for event in ended] == ["done", "done", "done"]


@pytest.fixture
def soon() -> Iterator[None]:
    """Ends processes that still run after 12 seconds, so that a run that waits for ever comes to its end."""
    timer = threading.Timer(12.0, lambda: [process.kill() for process in multiprocessing.active_children()])
    timer.start()
    yield
    timer.cancel()


@pytest.mark.usefixtures("soon")
def test_a_process_that_does_not_end_by_itself_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ended = run(tmp_path, "lingers, good", slots=1)
    assert ended.outcomes["good"].status == "done"
    assert ended.seconds < 10


def test_ctrl_c_does_not_end_a_process_that_is_starting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal it goes to every process of the run."""
    monkeypatch.chdir(tmp_path)
    path = write_files(tmp_path, "good")
    registry = Registry.default(tmp_path)
    (cell,) = make_plan(path, registry).cells
    job = pack_jobs([cell], Store(tmp_path / "results"))[0]
    with Local(slots=1).open(Settings(tmp_path / "results", "cpu", None, registry.plugins.bbnfile)) as pool:
        pool.submit((job,))
        (process,) = multiprocessing.active_children()
        assert process.pid is not None
        os.kill(process.pid, signal.SIGINT)
        events: list[Event] = []
        assert eventually(lambda: bool(events.extend(pool.wait(1.0)) or len(events) == 2))
    assert [event.outcome and event.outcome.status for event in events] == [None, "done"], events


@pytest.mark.parametrize("disabled", [["bbnfile"], []])
def test_disabled_plugins_are_disabled_in_workers(
    disabled: list[str], write_benchmark: Callable[..., Path], disable_plugins: Callable[[str], list[str]]
) -> None:
    installed = disable_plugins("")
    path = write_benchmark(defense="no_defense")
    (path.parent / "bbnfile.py").write_text("import os, pathlib\npathlib.Path(f'{os.getpid()}.seen').touch()")
    registry = Registry(Plugins(bbnfile=path.parent / "bbnfile.py", disabled=[*disabled, *installed]))
    summary = run_plan(make_plan(path, registry), registry, Options(path.parent / "results", "cpu"), Lines(Console()))
    assert summary.done == 1
    loaded_by = {file.stem for file in path.parent.glob("*.seen")}
    assert bool(loaded_by - {str(os.getpid())}) == (not disabled)


def test_leaving_the_pool_ends_its_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_files(tmp_path, "hangs")
    registry = Registry.default(tmp_path)
    store = Store(tmp_path / "results")
    (cell,) = make_plan(path, registry).cells
    job = pack_jobs([cell], store)[-1]
    with Local(slots=1).open(Settings(store.root, "cpu", None, registry.plugins.bbnfile)) as pool:
        pool.submit((job,))
        assert eventually((tmp_path / "hanging.pid").exists)
        pid = int((tmp_path / "hanging.pid").read_text())
        assert is_alive(pid)
    assert eventually(lambda: not is_alive(pid))


# the parent dies


def eventually(condition: Callable[[], bool], seconds: float = 240.0) -> bool:
    """Whether a condition comes true; the usual limit is for a busy machine, on which `bbn run` starts in a minute."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if condition():
            return True
        time.sleep(0.1)
    return False


def state(pid: int) -> list[str]:
    """State, parent and group of a process, from what follows its name."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ["Z"]


def is_alive(pid: int) -> bool:
    return state(pid)[0] != "Z"


def group(leader: int) -> list[int]:
    """The living processes of a process group."""
    processes = [(pid, state(pid)) for pid in map(int, filter(str.isdigit, os.listdir("/proc")))]
    return [pid for pid, fields in processes if fields[0] != "Z" and int(fields[2]) == leader]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at /proc")
@pytest.mark.slow
def test_workers_end_when_the_run_is_killed(tmp_path: Path) -> None:
    write_files(tmp_path, "hangs")
    bbn = Path(sys.executable).parent / "bbn"
    process = subprocess.Popen([bbn, "run", "-q"], cwd=tmp_path, start_new_session=True)
    try:
        pid_file = tmp_path / "hanging.pid"
        assert eventually(lambda: pid_file.exists() and pid_file.read_text() != "")
        worker = int(pid_file.read_text())
        assert worker in group(process.pid)
        process.kill()
        process.wait()
        assert eventually(lambda: not is_alive(worker), 10)
        assert eventually(lambda: group(process.pid) == [], 10)
    finally:
        for pid in group(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.wait()
