"""Packages of strangers, built and installed beside our wheel in fresh environments: what keeps its part works, and of
those in tests/packages each is broken in its own way, harms nobody else, and is named with its version.

Torch and the like come from the environment that runs these tests; nothing is downloaded.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import site
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from backdoor_bench_none.contracts.record import Record
from backdoor_bench_none.results.store import Store

ROOT = Path(__file__).parents[1]
BROKEN = ROOT / "tests" / "packages"
#: what stands in a checkout and matters for a wheel
FOLDERS = ("backdoor_bench_none", "attacks", "defenses", "plugins", "tests")
FILES = ("benchmark.yaml", "pyproject.toml", "README.md", "LICENSE")
#: the distribution of the bridge to BackdoorBench
BRIDGE = "bbn-backdoorbench"
#: what `bbn new` is asked for: kind -> name
GENERATED = {"attack": "my_attack", "defense": "my_defense", "architecture": "my_architecture"}
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input")
OFFLINE = ("--quiet", "--no-deps", "--no-index")
MATRIX = """\
version: 1
name: strangers
matrix:
  dataset: [{{name: digits, params: {{image_size: 8}}}}]
  attack: [{attacks}]
  defense: [{defenses}]
  architecture: [{{name: mlp, params: {{hidden: 16, depth: 1}}}}]
defaults: {{dataset: {{digits: {{recipe: {{epochs: 1}}}}}}}}
"""


class Environment(NamedTuple):
    """A virtual environment with our wheel in it, and the packages of strangers beside it."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def run(self, *command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
        """Runs a program of this environment."""
        outside = {
            name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "BBN_", "PYTEST"))
        }
        settings = {**outside, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        line = [str(self.folder / "bin" / str(command[0])), *map(str, command[1:])]
        return subprocess.run(line, cwd=cwd, env=settings, capture_output=True, text=True, timeout=300, check=False)

    def install(self, wheels: Path) -> None:
        """Installs all wheels of a folder."""
        run(*PIP, "--python", self.folder, "install", *OFFLINE, *wheels.glob("*.whl"))


def run(*command: object) -> None:
    """Runs a command here, which must not fail."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def make_environment(folder: Path) -> Environment:
    """A fresh one that sees everything installed here but what is ours or a stranger's."""
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    lent = folder / "lent"
    lent.mkdir()
    here = [Path(path) for path in dict.fromkeys([*site.getsitepackages(), *sys.path])]
    for path in (path for each in here if each.name in ("site-packages", "dist-packages") for path in each.iterdir()):
        if not (is_ours(path) or is_plugin(path) or (lent / path.name).exists()):
            (lent / path.name).symlink_to(path)
    (own,) = (folder / "lib").glob("python*/site-packages")
    (own / "lent.pth").write_text(f"{lent}\n")
    return Environment(folder)


def is_ours(path: Path) -> bool:
    """Whether a path beside installed packages belongs to this project, or leads to its checkout."""
    return path.name.startswith(("bbn", "backdoor_bench_none", "__pycache__")) or path.suffix == ".pth"


def is_plugin(path: Path) -> bool:
    """Whether it is the metadata by which an installed plugin is found."""
    points = path / "entry_points.txt"
    return points.is_file() and "[backdoor_bench_none]" in points.read_text()


def build(packages: list[Path], wheels: Path) -> Path:
    run(*PIP, "wheel", *OFFLINE, "--no-build-isolation", "--wheel-dir", wheels, *packages)
    return wheels


# what the tests share, made once, by whichever worker comes first


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """Makes a folder of this test run with a function that fills it, once for all workers."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def make(name: str, fill: Callable[[Path], None]) -> Path:
        folder, done = base / f"third-party-{name}", base / f"third-party-{name}.done"
        with locked(base / f"third-party-{name}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                fill(folder)
                done.touch()
        return folder

    return make


@contextmanager
def locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


Shared = Callable[[str, Callable[[Path], None]], Path]


@pytest.fixture(scope="session")
def own_wheel(shared: Shared) -> Path:
    """A folder with our wheel, built from a copy of the checkout."""

    def fill(folder: Path) -> None:
        checkout = folder / "checkout"
        checkout.mkdir()
        for name in FOLDERS:
            shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in FILES:
            shutil.copy(ROOT / name, checkout)
        build([checkout], folder / "wheels")

    return shared("wheel", fill) / "wheels"


@pytest.fixture(scope="session")
def workshop(shared: Shared, own_wheel: Path) -> Path:
    """The sources of what keeps its part: bbn-example, and what `bbn new` writes; `env` has them all installed."""

    def fill(folder: Path) -> None:
        environment = make_environment(folder / "env")
        environment.install(own_wheel)
        shutil.copytree(ROOT / "plugins" / "bbn-example", folder / "bbn-example")
        for kind, name in GENERATED.items():
            said = environment.run("bbn", "new", kind, name, cwd=folder)
            assert said.returncode == 0, said.stderr
        bridge = shutil.copytree(ROOT / "plugins" / BRIDGE, folder / "bridge" / BRIDGE)
        environment.install(build([*sorted(folder.glob("bbn-*")), bridge], folder / "wheels"))

    return shared("workshop", fill)


@pytest.fixture(scope="session")
def environment(workshop: Path) -> Environment:
    return Environment(workshop / "env")


@pytest.fixture(scope="session")
def infested(shared: Shared, own_wheel: Path) -> Environment:
    """An environment with every broken package."""

    def fill(folder: Path) -> None:
        environment = make_environment(folder / "env")
        environment.install(own_wheel)
        shutil.copytree(BROKEN, folder / "packages")
        environment.install(build(sorted((folder / "packages").iterdir()), folder / "wheels"))

    return Environment(shared("infested", fill) / "env")


def identity(project: Path) -> tuple[str, str]:
    """The distribution and the version of a source folder."""
    project_table = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    return project_table["name"], project_table["version"]


def write_matrix(folder: Path, attacks: str, defenses: str, rest: str = "") -> None:
    (folder / "benchmark.yaml").write_text(MATRIX.format(attacks=attacks, defenses=defenses) + rest)


def records(folder: Path) -> Mapping[tuple[str, str], Record]:
    """By attack and defense."""
    records = Store(folder / "results").records()
    return {(record.axes["attack"].name, record.axes["defense"].name): record for record in records}


# our wheel


def test_the_wheel_holds_what_is_installed_and_nothing_else(own_wheel: Path) -> None:
    (wheel,) = own_wheel.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    ours = {"backdoor_bench_none", "bbn_attacks", "bbn_defenses"}
    assert {top for top in tops if not top.endswith(".dist-info")} == ours
    assert {"backdoor_bench_none/benchmark.yaml", "backdoor_bench_none/scaffold/attack.py.txt"} <= set(names)
    assert not [name for name in names if Path(name).match("test_*.py")]


def test_the_wheel_is_what_runs_here(environment: Environment, tmp_path: Path) -> None:
    code = "import backdoor_bench_none as a, bbn_attacks as b, bbn_defenses as c, bbn_example as d, torch; "
    code += "print(*(module.__file__ for module in (a, b, c, d)))"
    said = environment.run("python", "-c", code, cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert all(Path(file).is_relative_to(environment.folder / "lib") for file in said.stdout.split()), said.stdout
    assert len(said.stdout.split()) == 4


# what keeps its part


def test_bbn_list_shows_every_package_with_its_version(environment: Environment, tmp_path: Path) -> None:
    said = environment.run("bbn", "list", "--json", cwd=tmp_path)
    assert (said.returncode, said.stderr) == (0, "")
    rows = [(row["kind"], row["name"], row["distribution"], row["version"]) for row in json.loads(said.stdout)]
    example = identity(ROOT / "plugins" / "bbn-example")
    wanted = [("attack", "cross", *example), ("defense", "trim_losses", *example)]
    wanted += [(kind, name, f"bbn-{name.replace('_', '-')}", "0.1.0") for kind, name in GENERATED.items()]
    assert sorted(row for row in rows if row[2] not in ("backdoor-bench-none", BRIDGE)) == sorted(wanted)
    bridge = {row[1] for row in rows if row[2:] == identity(ROOT / "plugins" / BRIDGE)}
    assert {"backdoorbench_record", "backdoorbench:cifar10", "backdoorbench:resnet18", "backdoorbench:ft"} <= bridge


@pytest.mark.slow
def test_the_bridge_to_backdoorbench_is_installed_whole(environment: Environment, tmp_path: Path) -> None:
    said = environment.run("bbn", "backdoorbench", "import", tmp_path, cwd=tmp_path)
    assert said.returncode == 2
    assert "is not a record: it has no attack_result.pt" in said.stderr
    said = environment.run("python", "-m", "bbn_backdoorbench.none", "--help", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert "--result_file" in said.stdout
    assert list((environment.folder / "lib").glob("*/site-packages/bbn_backdoorbench/shim/sitecustomize.py"))


@pytest.fixture(scope="session")
def strangers(shared: Shared, environment: Environment) -> Path:
    """The folder of a run with components of strangers."""

    def fill(folder: Path) -> None:
        write_matrix(folder, "badnets, cross, my_attack", "no_defense, trim_losses")
        said = environment.run("bbn", "run", cwd=folder)
        assert said.returncode == 0, said.stdout + said.stderr
        assert "6 done" in said.stdout

    return shared("strangers", fill)


@pytest.mark.slow
def test_a_matrix_with_components_of_strangers(strangers: Path) -> None:
    record = records(strangers)["cross", "trim_losses"]
    assert record.status == "done"
    assert record.detection is not None
    providers = record.provenance["providers"]
    name, version = identity(ROOT / "plugins" / "bbn-example")
    assert providers["attack"] == providers["defense"] == f"{name} {version}"
    assert providers["architecture"].startswith("backdoor-bench-none ")


@pytest.mark.slow
def test_bbn_check_passes(environment: Environment, tmp_path: Path) -> None:
    said = environment.run("bbn", "check", "bbn-example", cwd=tmp_path)
    assert said.returncode == 0, said.stdout + said.stderr
    assert said.stdout.splitlines()[-1] == "all checks passed"
    passed = re.findall(r"^passed  (\w+ \w+): (\d+) of \2 checks$", said.stdout, re.MULTILINE)
    assert [title for title, _ in passed] == ["attack cross", "defense trim_losses"]


@pytest.mark.slow
def test_bbn_check_passes_what_bbn_new_writes(environment: Environment, tmp_path: Path) -> None:
    """All in one process, since each begins with seconds of imports."""
    code = "import sys; from backdoor_bench_none.cli.main import run_cli; "
    code += "sys.exit(sum(run_cli(['check', name]) for name in sys.argv[1:]))"
    packages = [f"bbn-{name.replace('_', '-')}" for name in GENERATED.values()]
    said = environment.run("python", "-c", code, *packages, cwd=tmp_path)
    assert said.returncode == 0, said.stdout + said.stderr
    passed = re.findall(r"^passed  (\w+ \w+): (\d+) of \2 checks$", said.stdout, re.MULTILINE)
    assert [title for title, _ in passed] == [f"{kind} {name}" for kind, name in GENERATED.items()]
    assert said.stdout.count("all checks passed") == len(GENERATED)


@pytest.mark.slow
def test_their_own_tests_pass(environment: Environment, workshop: Path) -> None:
    packages = sorted(workshop.glob("bbn-*"))
    options = ("-v", "-p", "no:cacheprovider", "--import-mode=importlib", "-W", "error", "--rootdir", workshop)
    said = environment.run("python", "-m", "pytest", *options, *packages, cwd=workshop)
    assert said.returncode == 0, said.stdout + said.stderr
    for package in packages:
        ends = re.findall(rf"^{package.name}/tests/test_contract\.py::\S+ (\w+)", said.stdout, re.MULTILINE)
        assert set(ends) == {"PASSED"}
        assert len(ends) > 10


# what is broken

#: way of being broken -> what is said of it whenever plugins are loaded
ON_LOADING = {
    "import": "ImportError: cannot import name 'hookimpel' from 'backdoor_bench_none.api'",
    "hook": "unknown hook 'bbn_defences'",
    "signature": "bbn_cell_skip.*colour",
    "dependency": "ModuleNotFoundError: No module named 'bbn_broken_needs_this'",
    "clash": "attack 'badnets' is provided by 'bbn_attacks'.*BBN_DISABLE_PLUGINS=broken_clash leaves this one out",
    "api": "it needs plugin API 99, this is 2",
}
#: ... -> what is said once its component is used
ON_USE = {
    "class": "defense 'broken_class'.* is not a subclass of Defense",
    "lazy": "defense 'broken_lazy'.* cannot be imported: ModuleNotFoundError: No module named 'bbn_broken_needs_this'",
}
#: ... -> how the cell of its defense ends
ON_RUNNING = {
    "exception": ("failed", "ValueError: it broke"),
    "hang": ("timeout", "the time limit of 2 s"),
    "killed": ("failed", "the process was ended by SIGKILL"),
    "memory": ("failed", "memory"),
    "input": ("failed", "TypeError: train.images changed in place; change a clone"),
}


def named(way: str) -> str:
    """How a broken package is named: as 'plugin' (distribution version)."""
    name, version = identity(BROKEN / way)
    return f"'broken_{way}' ({name} {version})"


def test_every_way_of_being_broken_is_tried() -> None:
    ways = sorted(path.name for path in BROKEN.iterdir())
    assert ways == sorted([*ON_LOADING, *ON_USE, *ON_RUNNING])
    assert len({identity(BROKEN / way)[1] for way in ways}) == len(ways)


def test_bbn_list_plugins_names_what_is_broken_and_shows_the_others(infested: Environment, tmp_path: Path) -> None:
    said = infested.run("bbn", "list", "plugins", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    warnings = said.stderr.splitlines()
    assert len(warnings) == len(ON_LOADING)
    for way, reason in ON_LOADING.items():
        (line,) = (line for line in warnings if f"plugin {named(way)}" in line)
        assert line.startswith("warning: ")
        assert re.search(reason, line)
    lines = [line.split(maxsplit=3) for line in said.stdout.splitlines()]
    loaded = {plugin: (distribution, version) for plugin, distribution, version, status in lines if status == "loaded"}
    assert {"bbn_attacks", "bbn_defenses"} <= set(loaded)
    for way in [*ON_USE, *ON_RUNNING]:
        assert loaded[f"broken_{way}"] == identity(BROKEN / way)
    for way in set(ON_LOADING) - {"clash"}:  # the rest of what it provides is in use
        assert f"broken_{way}" not in loaded


def test_what_is_broken_on_use_is_named_then(infested: Environment, tmp_path: Path) -> None:
    write_matrix(tmp_path, "badnets", ", ".join(["no_defense", *(f"broken_{way}" for way in ON_USE)]))
    said = infested.run("bbn", "plan", cwd=tmp_path)
    assert said.returncode == 2
    errors = [line for line in said.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == len(ON_USE)
    for error, (way, reason) in zip(errors, ON_USE.items(), strict=True):
        assert re.search(reason, error)
        assert named(way) in error
    assert "Traceback" not in said.stderr


@pytest.fixture(scope="session")
def harmed(shared: Shared, infested: Environment) -> Path:
    """The folder of a run with everything that is broken when it runs; `said.json` has what it said."""

    def fill(folder: Path) -> None:
        attacks, defenses = "badnets, broken_input", ", ".join(f"broken_{way}" for way in ON_RUNNING)
        write_matrix(folder, attacks, f"{defenses}, no_defense", "budget: {cell_timeout: 2s, memory: 3G}\n")
        said = infested.run("bbn", "run", cwd=folder)
        (folder / "said.json").write_text(json.dumps([said.returncode, said.stdout, said.stderr]))

    return shared("harmed", fill)


@pytest.mark.slow
def test_a_run_goes_on_beside_what_is_broken(harmed: Path) -> None:
    code, out, err = json.loads((harmed / "said.json").read_text())
    assert code == 1, out + err
    assert f"1 done, {2 * len(ON_RUNNING) + 1} failed" in out
    assert records(harmed)["badnets", "no_defense"].status == "done"
    assert "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize("way", ON_RUNNING)
def test_what_breaks_while_it_runs_is_named_with_its_version(way: str, harmed: Path) -> None:
    status, reason = ON_RUNNING[way]
    record = records(harmed)["badnets", f"broken_{way}"]
    assert record.status == status
    assert record.reason is not None
    assert re.search(reason, record.reason)
    assert record.reason.endswith(f"defense 'broken_{way}' of plugin {named(way)}")
    assert record.counts is None


@pytest.mark.slow
def test_an_attack_that_scribbles_is_named_and_the_defenses_are_not(harmed: Path) -> None:
    for defense in ("no_defense", *(f"broken_{way}" for way in ON_RUNNING)):
        record = records(harmed)["broken_input", defense]
        assert record.status == "failed"
        assert record.reason is not None
        assert "data.labels changed in place" in record.reason
        assert record.reason.endswith(f"; attack 'broken_input' of plugin {named('input')}")


@pytest.mark.slow
def test_numbers_are_the_same_in_bad_company(harmed: Path, strangers: Path) -> None:
    alone, beside = (records(folder)["badnets", "no_defense"] for folder in (strangers, harmed))
    assert (alone.key, alone.counts) == (beside.key, beside.counts)
    assert alone.counts is not None
