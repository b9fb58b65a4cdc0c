"""A record written from the format's facts alone, its clean images, the plugin on the path, and a stand-in checkout."""

from __future__ import annotations

import os
import sys
import tarfile
import time
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

# one thread each: workers of pytest-xdist share the cores
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits
from standins import BENCHMARK, CLASSES, ENDINGS, FT, MODEL, POISONED, ROOT, SOURCE, TRAIN, Said, write_part

from backdoor_bench_none.api import Context, Record, Registry, Stages, Store, make_plan, record_key, run_cli

#: the distributions of other plugins that happen to be installed; the tests do not see them
OTHERS = sorted(
    {point.dist.name for point in entry_points(group="backdoor_bench_none") if point.dist is not None}
    - {"bbn-backdoorbench"}
)


@pytest.fixture(autouse=True)
def plugin(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugin as an installed distribution, and an empty current folder."""
    folder = tmp_path_factory.mktemp("installed")
    info = folder / "bbn_backdoorbench-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bbn-backdoorbench\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[backdoor_bench_none]\nbackdoorbench = bbn_backdoorbench\n")
    monkeypatch.syspath_prepend(str(SOURCE))
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("BBN_DISABLE_PLUGINS", ",".join(OTHERS))
    for name in ("BBN_BACKDOORBENCH_HOME", "BBN_BACKDOORBENCH_PYTHON"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "500")  # so wide that no message is broken into lines
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def bbn(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """Runs `bbn` with these arguments in this process."""

    def run(*arguments: object) -> Said:
        capsys.readouterr()
        code = run_cli([str(argument) for argument in arguments])
        return Said(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def clean() -> dict[str, Any]:
    """Real digits on 32x32 in colour: 60 to train with, 30 to test with."""
    digits = load_digits()
    chosen = np.concatenate([np.flatnonzero(digits.target == label)[:9] for label in range(CLASSES)]).reshape(10, 9).T
    order = chosen.ravel()
    images = [np.asarray(Image.fromarray((digits.images[i] * 15).astype("uint8")).resize((32, 32))) for i in order]
    pixels = np.repeat(np.stack(images)[..., None], 3, axis=3)
    labels = digits.target[order].astype("int64")
    return {"x_train": pixels[:TRAIN], "y_train": labels[:TRAIN], "x_test": pixels[TRAIN:], "y_test": labels[TRAIN:]}


@pytest.fixture
def npz(clean: dict[str, Any], tmp_path: Path) -> Path:
    """The clean images as the data set backdoorbench:npz reads them."""
    path = tmp_path / "clean.npz"
    np.savez(path, **clean)
    return path


@pytest.fixture(scope="session")
def weights() -> dict[str, torch.Tensor]:
    """An untrained network's."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = torchvision.models.get_model(MODEL, weights=None, num_classes=CLASSES)
    return dict(network.state_dict())


Mutate = Callable[[dict[str, Any]], object]


@pytest.fixture
def write_record(clean: dict[str, Any], weights: dict[str, torch.Tensor], tmp_path: Path) -> Callable[..., Path]:
    """Writes a record as BackdoorBench lays it out, after `mutate` had its way with attack_result.pt's content."""

    def write(mutate: Mutate = lambda raw: None, name: str = "badnet_1", info: bool = True) -> Path:
        folder = tmp_path / "record" / name
        raw = {
            "model_name": MODEL, "num_classes": CLASSES, "model": dict(weights), "data_path": "./data/cifar10",
            "img_size": (32, 32, 3), "clean_data": "cifar10",
            "bd_train": write_part(folder, "bd_train", clean["x_train"], clean["y_train"], POISONED, np.arange(TRAIN)),
        }  # fmt: skip
        attacked = np.flatnonzero(clean["y_test"] != 0)
        raw["bd_test"] = write_part(folder, "bd_test", clean["x_test"], clean["y_test"], list(attacked), attacked)
        if info:
            torch.save({"attack": "badnet", "pratio": 0.1, "attack_target": 0}, folder / "info.pickle")
        mutate(raw)
        torch.save(raw, folder / "attack_result.pt", pickle_protocol=2)
        return folder

    return write


@pytest.fixture(scope="session")
def real_record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A record that an unmodified BackdoorBench wrote."""
    folders = [Path(os.environ.get("BBN_TEST_DATA", "nowhere")), ROOT.parent / "shared" / "data"]
    archive = next(
        (f / "backdoorbench_record.tar.gz" for f in folders if (f / "backdoorbench_record.tar.gz").is_file()), None
    )
    if archive is None:
        pytest.skip("the real record is not at hand (BBN_TEST_DATA)")
    folder = tmp_path_factory.mktemp("real")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    return folder / "record" / "badnet_digits_sq3"


@pytest.fixture(scope="session")
def real_npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The clean images of the real record, made again as its README says."""
    digits, generator = load_digits(), np.random.default_rng(0)
    order = generator.permutation(len(digits.target))
    small = (digits.images / 16.0 * 255).astype("uint8")[order]
    large = np.stack(
        [np.asarray(Image.fromarray(image).resize((24, 24), Image.Resampling.BILINEAR)) for image in small]
    )
    pixels = np.zeros((len(large), 3, 32, 32), "uint8")
    tint = generator.uniform(0.5, 1.0, (len(large), 3, 1, 1))
    pixels[:, :, 4:28, 4:28] = (large[:, None] * tint).astype("uint8")
    labels = digits.target[order]
    path = tmp_path_factory.mktemp("clean") / "digits.npz"
    np.savez(path, x_train=pixels[:1500], y_train=labels[:1500], x_test=pixels[1500:], y_test=labels[1500:])
    return path


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A stand-in for a checkout of BackdoorBench whose defense `script` ends in this way."""

    def make(ending: str = "fine", script: str = "ft") -> Path:
        home = tmp_path / "BackdoorBench"
        for folder in ("attack", "utils", "data", "defense", f"config/defense/{script}"):
            (home / folder).mkdir(parents=True)
        (home / "defense" / f"{script}.py").write_text((FT + ENDINGS[ending]).replace('"ft"', f'"{script}"'))
        (home / "config" / "defense" / script / "cifar10.yaml").write_text("u: 3\n")
        monkeypatch.setenv("BBN_BACKDOORBENCH_HOME", str(home))
        return home

    return make


@pytest.fixture
def write_benchmark(npz: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a benchmark file in which the record is the attack."""

    def write(record: Path | None = None, rest: str = "", images: Path | None = None, **axes: str) -> Path:
        values = {
            "attack": f"{{name: backdoorbench_record, params: {{record: {record}}}, as: record}}",
            "defense": "no_defense", "architecture": f'"backdoorbench:{MODEL}"', "activation": "relu", **axes,
        }  # fmt: skip
        path = tmp_path / "benchmark.yaml"
        path.write_text(BENCHMARK.format(npz=images or npz, rest=rest, **values))
        return path

    return write


@pytest.fixture
def evaluate(tmp_path: Path) -> Callable[..., dict[str, Record]]:
    """Runs the cells of a benchmark file in this process, into `results`; the records by defense."""

    def run(path: Path, seconds: float | None = None) -> dict[str, Record]:
        plan = make_plan(path, Registry.default(path.parent), need_data=True)
        store, records = Store(tmp_path / "results"), {}
        store.create()
        for cell in plan.cells:
            deadline = None if seconds is None else time.monotonic() + seconds
            if record_key(cell) in plan.skipped:
                record = Record.of(cell, record_key(cell), "skipped", reason=plan.skipped[record_key(cell)])
            else:
                record = Stages(cell, store, Context(torch.device("cpu"), 0, deadline=deadline)).evaluate()
            store.write_record(record)
            records[cell.defense.label] = record
        return records

    return run
