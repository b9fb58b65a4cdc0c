"""What the README promises, with the real console: interrupted, killed and doubled runs end with the same records."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any

import pytest

from backdoor_bench_none.cli.init import default_benchmark
from backdoor_bench_none.cli.main import VERBS
from backdoor_bench_none.planning.plan import plan_config
from backdoor_bench_none.planning.reading import parse_config
from backdoor_bench_none.registry.components import Registry
from backdoor_bench_none.registry.plugins import Plugins
from backdoor_bench_none.results.store import Store

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BBN = str(Path(sys.executable).parent / "bbn")
LIMIT = 120.0


def block(language: str, containing: str) -> str:
    """The one code block of the README or of a page of docs/ in that language with that text."""
    pages = [README, *(page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("*.md")))]
    blocks = re.findall(rf"```{language}\n(.*?)```", "\n".join(pages), re.DOTALL)
    (text,) = [text for text in blocks if containing in text]
    return str(text)


@contextmanager
def started(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`bbn` with these arguments in a process group of its own, which is killed in the end."""
    process = subprocess.Popen(
        [BBN, *arguments], cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def run(folder: Path, *arguments: str) -> tuple[int, str]:
    with started(folder, "run", *arguments) as process:
        out, _ = process.communicate(timeout=LIMIT)
        return process.returncode, out


def records(results: Path) -> dict[str, tuple[object, ...]]:
    """What must be equal: status, counts and findings by key."""
    records = Store(results).records()
    return {r.key: (r.status, r.counts, r.detection, r.extras, r.victim_losses) for r in records}


def files(results: Path, pattern: str) -> list[Path]:
    return [path for path in results.rglob(pattern) if path.is_file()]


# the README


def test_the_default_benchmark_is_what_init_writes() -> None:
    assert (ROOT / "benchmark.yaml").read_text(encoding="utf-8") == default_benchmark()


def test_the_documented_benchmark_is_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BBN_DATA", str(tmp_path))
    config, source = parse_config(block("yaml", "name: cifar10-core"), "benchmark-file.md")
    plan = plan_config(config, source, Registry(Plugins(external=False)))
    # attacks x defenses x (architectures x activations less one) x seeds, and the included matrix
    assert len(plan.cells) == 4 * 6 * (2 * 2 - 1) * 3 + 2 * 3
    assert plan.excluded == 4 * 6 * 3
    assert {*plan.absent} == {"cifar10", "mnist"}
    epochs = {cell.architecture.name: cell.recipe.epochs for cell in plan.cells if cell.dataset.name == "cifar10"}
    assert epochs == {"nin": 200, "resnet18": 100}
    assert config.budget.cell_timeout == 90 * 60


def test_the_defense_of_the_readme_runs(write_benchmark: Callable[..., Path], bbn: Any, tmp_path: Path) -> None:
    write_benchmark(defense="no_defense, short_fine_tune")
    (tmp_path / "bbnfile.py").write_text(block("python", "ShortFineTune"))
    assert "short_fine_tune" in bbn("list", "defenses").out
    shown = bbn("show", "short_fine_tune").out
    assert "Fine-tunes the finished network on a few trusted images." in shown
    assert "highest learning rate" in shown
    said = bbn("run")
    assert said.code == 0, said.out
    assert "short_fine_tune was given 5 % of the training set as clean data" in said.out
    assert {record.status for record in Store(tmp_path / "results").records()} == {"done"}


def test_the_commands_of_the_readme_exist(bbn: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    verbs = set(re.findall(r"^bbn (\w+)", block("bash", "bbn doctor"), re.MULTILINE))
    assert verbs == {*VERBS} - {"status"}
    for verb in verbs:
        assert bbn(verb, "--help").code == 0


# runs that are disturbed


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[object, ...]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    write_few(folder)
    code, out = run(folder)
    assert code == 0, out
    assert len(re.findall(r"^done  .* left\)$", out, re.MULTILINE)) == 4  # no terminal: a line per cell
    assert "\x1b" not in out
    return records(folder / "results")


def write_few(folder: Path) -> None:
    """2 attacks x 2 defenses."""
    (folder / "benchmark.yaml").write_text(
        "version: 1\nname: few\nmatrix:\n  dataset: [{name: digits, params: {image_size: 8}}]\n"
        "  attack: [clean, badnets]\n  defense: [no_defense, none]\n"
        "  architecture: [{name: mlp, params: {hidden: 16, depth: 1}}]\n"
        "defaults: {dataset: {digits: {recipe: {epochs: 2}}}, defense: {none: {epochs: 1}}}\n"
    )


def wait_for(condition: Callable[[], object]) -> None:
    until = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_records(undisturbed: dict[str, Any], tmp_path: Path) -> None:
    write_few(tmp_path)
    results = tmp_path / "results"
    moment = Random(time.time_ns())
    artifacts = moment.randint(1, 8)
    with started(tmp_path, "run") as process:
        wait_for(lambda: len(files(results, "*.safetensors")) >= artifacts or process.poll() is not None)
        time.sleep(moment.random() / 2)
        process.kill()
    before = {path: path.stat().st_mtime_ns for path in files(results, "*.safetensors")}
    assert before
    code, out = run(tmp_path)
    assert code == 0, out
    assert records(results) == undisturbed
    assert {path: path.stat().st_mtime_ns for path in before} == before  # what was finished is not computed again


@pytest.mark.slow
def test_two_runs_on_one_folder(undisturbed: dict[str, Any], tmp_path: Path) -> None:
    write_few(tmp_path)
    with started(tmp_path, "run") as one, started(tmp_path, "run") as other:
        said = [process.communicate(timeout=LIMIT)[0] for process in (one, other)]
        assert [one.returncode, other.returncode] == [0, 0], said
    assert records(tmp_path / "results") == undisturbed
    keys = [path.name.split(".")[0] for path in files(tmp_path / "results", "*.safetensors")]
    assert len(keys) == len(set(keys))  # nothing was computed twice
    assert files(tmp_path / "results", ".*") == []


@pytest.mark.slow
def test_interrupted_once(undisturbed: dict[str, Any], tmp_path: Path) -> None:
    write_few(tmp_path)
    results = tmp_path / "results"
    with started(tmp_path, "run", "-j", "1") as process:
        wait_for(lambda: files(results, "*.json") or process.poll() is not None)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 130
    assert "stopping: running stages are finished" in out
    assert "Traceback" not in out
    assert re.search(r"\d+ done, \d+ not run in", out)
    assert "go on: bbn run" in out
    kept = records(results)
    assert 0 < len(kept) < len(undisturbed)
    code, out = run(tmp_path)
    assert code == 0, out
    assert f"{len(kept)} done before" in out
    assert records(results) == undisturbed


@pytest.mark.slow
def test_interrupted_twice_stops_at_once(tmp_path: Path) -> None:
    write_few(tmp_path)
    text = (tmp_path / "benchmark.yaml").read_text()
    (tmp_path / "benchmark.yaml").write_text(text.replace("epochs: 2", "epochs: 1000000"))
    with started(tmp_path, "run", "-j", "1") as process:
        wait_for(lambda: files(tmp_path / "results", "victim-*") or process.poll() is not None)  # its lock
        process.send_signal(signal.SIGINT)
        time.sleep(1)
        assert process.poll() is None  # the running stage is to be finished
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=15)
    assert process.returncode == 130
    assert "Traceback" not in out


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.slow
def test_a_terminal_shows_bars_and_the_table(undisturbed: dict[str, Any], tmp_path: Path) -> None:
    import pexpect
    import pyte

    write_few(tmp_path)
    environment = {**os.environ, "TERM": "xterm-256color"}
    child = pexpect.spawn(BBN, ["run"], cwd=str(tmp_path), env=environment, dimensions=(40, 120), timeout=LIMIT)
    raw = b""
    screen = pyte.Screen(120, 40)
    stream = pyte.ByteStream(screen)
    bars = set()
    with suppress(pexpect.EOF):
        while True:
            chunk = child.read_nonblocking(65536, timeout=LIMIT)
            raw += chunk
            stream.feed(chunk)
            bars |= {
                name
                for line in screen.display
                for name in re.findall(r"^(poison|victim|defense) +[━╸╺ ]+ +\d+/\d+", line)
            }
    child.close()
    assert child.exitstatus == 0
    assert bars == {"poison", "victim", "defense"}
    shown = "\n".join(screen.display)
    assert re.search(r"attack +┃ +no_defense +┃ +none", shown)
    assert "4 done in" in shown
    assert not re.search(r"(victim|defense) +━", shown)  # the bars are gone
    assert records(tmp_path / "results") == undisturbed
