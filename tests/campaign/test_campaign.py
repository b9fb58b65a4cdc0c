"""What happens to results folders: kills, full and read-only disks, two runs at once, moves, missing locks.

Whatever happens, no finished record is lost or changed, and a later run ends with the results of an undisturbed one.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from backdoor_bench_none.cli.main import run_cli
from backdoor_bench_none.executors.local import PRELOAD
from tests.campaign.conftest import results_of, write_files

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="kills processes as Unix does"),
]
Count = Callable[[str, int, int], None]
KILLS = 100
#: kills of a whole `bbn run` with its processes
REAL_KILLS = 6
PROGRAM = Path(sys.executable).with_name("bbn")


def start(*arguments: str) -> int:
    """Run `bbn` in a fork of this process, which has imported everything; its process id. It writes to PID.said."""
    pid = os.fork()
    if pid:
        return pid
    with suppress(BaseException), open(f"{os.getpid()}.said", "w") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
        sys.stdout = sys.stderr = said
        warnings.resetwarnings()
        code = run_cli(list(arguments))
        said.flush()
        os._exit(code)
    os._exit(70)


def run_inline(results: str) -> int:
    """Start a run of the whole benchmark."""
    return start("run", "inline.yaml", "--results", results, "-q")


def wait_for(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def bbn(*arguments: str) -> tuple[int, str]:
    """The exit code of a command, and what it said."""
    pid = start(*arguments)
    return wait_for(pid), Path(f"{pid}.said").read_text()


def content(folder: Path) -> dict[str, bytes]:
    """The finished records, byte for byte."""
    texts = {path.name: path.read_bytes() for path in (folder / "records").glob("*/*.json")}
    return {name: text for name, text in texts.items() if b'"status": "done"' in text}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run that nothing happens to: its folder, its results and its duration in seconds."""
    for module in PRELOAD:  # once, for all forks
        importlib.import_module(module)
    where = tmp_path_factory.mktemp("good")
    write_files(where)
    with contextlib.chdir(where):
        started = time.monotonic()
        assert wait_for(run_inline("good")) == 0
    return {"seconds": time.monotonic() - started, "folder": where / "good", "results": results_of(where / "good")}


@pytest.fixture
def undisturbed(good: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The same, with a copy of its results folder in the current one."""
    shutil.copytree(good["folder"], folder / "good")
    return good


def test_killed_at_random_moments(folder: Path, undisturbed: dict[str, Any], count: Count) -> None:
    """Each results folder is killed again and again until its run ends."""
    randomness, survived, killed = random.Random(0), 0, 0
    while killed < KILLS:
        shutil.rmtree(folder / "results", ignore_errors=True)
        while killed < KILLS:
            before = content(folder / "results")
            pid = run_inline("results")
            time.sleep(randomness.uniform(0, undisturbed["seconds"]))
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            ended = wait_for(pid)
            after = content(folder / "results")
            killed += ended != 0
            survived += ended != 0 and before.items() <= after.items()
            assert ended in (0, -signal.SIGKILL)
            if ended == 0:
                break
        assert wait_for(run_inline("results")) == 0
        assert results_of(folder / "results") == undisturbed["results"]
    count("kill -9 at a random moment", killed, survived)
    assert survived == killed


def test_a_whole_run_is_killed(folder: Path, undisturbed: dict[str, Any], count: Count) -> None:
    """With the processes that it started: they end too, and the next run goes on."""
    randomness, survived = random.Random(1), 0
    for _ in range(REAL_KILLS):
        before = content(folder / "results")
        process = subprocess.Popen(
            [str(PROGRAM), "run", "b.yaml", "-q"], start_new_session=True, stdout=subprocess.DEVNULL
        )
        time.sleep(randomness.uniform(2, 12))
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        survived += before.items() <= content(folder / "results").items()
    assert wait_for(run_inline("results")) == 0
    assert results_of(folder / "results") == undisturbed["results"]
    count("kill -9 of a run with its processes", REAL_KILLS, survived)
    assert survived == REAL_KILLS


def test_two_runs_at_once(folder: Path, undisturbed: dict[str, Any], count: Count) -> None:
    survived = 0
    for number in range(10):
        results = f"results{number}"
        pids = [run_inline(results), run_inline(results)]
        ended = [wait_for(pid) for pid in pids]
        survived += ended == [0, 0] and results_of(folder / results) == undisturbed["results"]
    count("two runs at once", 10, survived)
    assert survived == 10


def test_a_folder_is_moved(folder: Path, undisturbed: dict[str, Any], count: Count) -> None:
    """Nothing is computed again in its new place."""
    (folder / "elsewhere").mkdir()
    moved = folder / "elsewhere" / "moved"
    (folder / "good").rename(moved)
    before = {path: path.stat().st_mtime_ns for path in moved.rglob("*.*") if path.suffix in (".json", ".safetensors")}
    survived = wait_for(run_inline(str(moved))) == 0 and all(
        path.stat().st_mtime_ns == changed for path, changed in before.items()
    )
    count("the folder is moved", 1, int(survived))
    assert survived
    assert results_of(moved) == undisturbed["results"]


@contextmanager
def small_disk(where: Path, size: str) -> Iterator[Path]:
    where.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(where)]
    if subprocess.run(options, capture_output=True).returncode != 0:
        pytest.skip("a file system cannot be mounted here")
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", str(where)], check=True)


def test_a_full_disk(folder: Path, undisturbed: dict[str, Any], count: Count) -> None:
    """It fills up at another place each time; what was finished is there, and more space is all that is missing."""
    tried = survived = 0
    whole = sum(path.stat().st_size for path in (folder / "good").rglob("*") if path.is_file())
    for share in (0.05, 0.2, 0.5, 0.8, 0.95):
        with small_disk(folder / f"disk{share}", f"{max(40, int(whole * share / 1024))}k") as disk:
            code = wait_for(run_inline(str(disk / "results")))
            kept = content(disk / "results") if (disk / "results").is_dir() else {}
            shutil.copytree(disk, folder / f"larger{share}")
        results = folder / f"larger{share}" / "results"
        again = wait_for(run_inline(str(results)))
        tried += 1
        whole_again = results_of(results) == undisturbed["results"]
        survived += code in (1, 2) and again == 0 and whole_again and kept.items() <= content(results).items()
    count("the disk is full", tried, survived)
    assert survived == tried


def test_a_read_only_folder(folder: Path, undisturbed: dict[str, Any], count: Count) -> None:
    """Everything that only reads works; a run says at once that it cannot write."""
    with small_disk(folder / "disk", "50m") as disk:
        shutil.copytree(folder / "good", disk / "results")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        results = str(disk / "results")
        verbs = (["table"], ["status"], ["plan"], ["report", "--output", "r.html"])
        codes = [bbn(verb[0], "inline.yaml", "--results", results, *verb[1:])[0] for verb in verbs]
        code, said = bbn("run", "inline.yaml", "--results", results)
    survived = sum(code == 0 for code in codes) + (code == 2 and "cannot be written" in said)
    count("the folder is read-only", len(codes) + 1, survived)
    assert survived == len(codes) + 1


def test_no_locks(folder: Path, undisturbed: dict[str, Any], count: Count) -> None:
    """As on a network file system without lockd."""
    (folder / "bbnfile.py").write_text(
        (folder / "bbnfile.py").read_text()
        + "\nimport errno, fcntl\ndef flock(*_): raise OSError(errno.ENOLCK, 'no locks available')\n"
        "fcntl.flock = flock\n"
    )
    survived = wait_for(run_inline("results")) == 0 and results_of(folder / "results") == undisturbed["results"]
    count("the file system has no locks", 1, int(survived))
    assert survived


def test_the_data_are_gone(folder: Path, undisturbed: dict[str, Any], count: Count) -> None:
    """Own images whose folder was moved: what needs no pixels shows the records."""
    import numpy as np
    from PIL import Image

    for label in range(2):
        (folder / "mine" / f"class{label}").mkdir(parents=True)
        for index in range(30):
            pixels = np.full((16, 16, 3), 40 + 120 * label + index, np.uint8)
            Image.fromarray(pixels).save(folder / "mine" / f"class{label}" / f"{index}.png")
    text = (folder / "inline.yaml").read_text()
    images = "{name: image_folder, params: {root: mine, image_size: 16}, as: mine, recipe: {epochs: 2, batch_size: 8}}"
    (folder / "inline.yaml").write_text(
        text.replace("{name: digits, params: {image_size: 8}, recipe: {epochs: 2}}", images)
    )
    assert wait_for(run_inline("results")) == 0
    (folder / "mine").rename(folder / "elsewhere")
    verbs = (
        ["table", "inline.yaml"], ["table", "inline.yaml", "--format", "csv"], ["status", "inline.yaml"],
        ["plan", "inline.yaml"], ["report", "inline.yaml", "--output", "r.html"],
        ["plot", "matrix", "inline.yaml", "--output", "m.png"],
    )  # fmt: skip
    said = [bbn(*verb) for verb in verbs]
    survived = sum(code == 0 for code, _ in said) + ("4 done" in said[2][1])
    count("the data are gone", len(verbs) + 1, survived)
    assert survived == len(verbs) + 1, said
