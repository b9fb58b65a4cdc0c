"""BackdoorBench's own defenses, each run as a process in a copy of the user's checkout that consists of links."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import ClassVar, cast

import torch
from pydantic import Field
from torch import nn

from backdoor_bench_none.api import (
    BenchError,
    ConfigError,
    Context,
    Defense,
    DefenseResult,
    DefenseTask,
    OracleTask,
    Stage,
)
from bbn_backdoorbench.attack import load_weights
from bbn_backdoorbench.reading import RecordError, load_checked, read_weights
from bbn_backdoorbench.words import DEFENSE_RESULT, HOME
from bbn_backdoorbench.writing import Network, write_attack

#: the interpreter of the checkout's environment; default: this one
PYTHON = "BBN_BACKDOORBENCH_PYTHON"
RECORD = "bbn"
#: seconds between two checks of the deadline
PATIENCE = 0.2
Flag = str | int | float | bool


class ToolboxDefense(Defense):
    """Base of the toolbox's defenses.

    The checkout is the one that BBN_BACKDOORBENCH_HOME names, with its data sets in data/. As in the toolbox, the
    script is given the whole record, including the triggered test set; the network it writes is evaluated here.
    """

    stage: ClassVar[Stage] = Stage.POST_TRAINING
    starts_from_victim: ClassVar[bool] = True
    sees_ground_truth: ClassVar[bool] = True
    #: the script in `defense/`
    script: ClassVar[str]
    #: whether it filters the record's training set, so that a record without one does not fit
    filters_training_set: ClassVar[bool] = False

    options: dict[str, Flag] = Field(
        default_factory=dict, description="further flags of the script by name, as {epochs: 10}; they win over its YAML"
    )

    def run(self, task: DefenseTask, context: Context) -> DefenseResult:
        """The network in the script's defense_result.pt."""
        oracle_task = cast("OracleTask", task)
        home = find_checkout(self.script)
        with tempfile.TemporaryDirectory(prefix="bbn-") as name:
            root = Path(name).resolve()
            if "record" in str(root):
                raise ConfigError(f"BackdoorBench cannot work below '{root}'", "choose a TMPDIR without 'record' in it")
            link_checkout(home, root)
            network = self._write_record(oracle_task, root / "record" / RECORD)
            self._execute(root, context, task.info.name.removeprefix("backdoorbench:"), network.model_name)
            return self._read_result(root, task)

    def _write_record(self, task: OracleTask, folder: Path) -> Network:
        name = getattr(task.build.architecture, "model_name", None)
        if name is None or not task.info.name.startswith("backdoorbench:"):
            raise ConfigError(
                f"BackdoorBench's {self.script} needs a network and a data set of BackdoorBench",
                "as architecture backdoorbench:resnet18 and data set backdoorbench:cifar10",
            )
        network = Network(name, task.info.num_classes, task.victim().state_dict())
        train, test = (task.original, task.poisoned_samples), (task.test, task.triggered_samples)
        write_attack(folder, network, task.info, train, test, {"attack": "bbn"})
        return network

    def _execute(self, root: Path, context: Context, dataset: str, model: str) -> None:
        command = self.command(root, context, dataset, model)
        log = root / "output.txt"
        with log.open("wb") as output:
            try:
                process = subprocess.Popen(
                    command, cwd=root, env=environment(root), stdin=subprocess.DEVNULL, stdout=output,
                    stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                raise ConfigError(f"'{command[0]}' cannot be started: {error.strerror}", f"set {PYTHON}") from error
            try:
                while process.poll() is None:
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(PATIENCE)
                    context.check_deadline()
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if process.returncode != 0:
            last = " | ".join(log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:])
            raise BenchError(f"BackdoorBench's defense/{self.script}.py ended with code {process.returncode}: {last}")

    def command(self, root: Path, context: Context, dataset: str, model: str) -> list[str]:
        """The command of the script, with every flag that it does not take from the record."""
        configs = [root / "config" / "defense" / self.script / f"{name}.yaml" for name in (dataset, "config")]
        config = next((path for path in configs if path.is_file()), None)
        if config is None:
            raise ConfigError(f"the checkout has no config/defense/{self.script}/{dataset}.yaml")
        flags: dict[str, Flag] = {
            "result_file": RECORD, "yaml_path": f"./{config.relative_to(root)}", "dataset": dataset, "model": model,
            "device": str(context.device), "num_workers": 0, "random_seed": context.seed % 2**31, **self.clean_flags(),
            **self.options,
        }  # fmt: skip
        command = [os.environ.get(PYTHON) or sys.executable, f"./defense/{self.script}.py"]
        for name, value in flags.items():
            command += [f"--{name}", str(value)]
        return command

    def clean_flags(self) -> Mapping[str, Flag]:
        """The flag for the share of clean data; empty for scripts that take none."""
        if not self.clean_fraction:
            return {}
        return {"ratio": self.clean_fraction}

    def _read_result(self, root: Path, task: DefenseTask) -> DefenseResult:
        path = root / "record" / RECORD / "defense" / self.script / DEFENSE_RESULT
        if not path.is_file():
            raise RecordError(f"defense/{self.script}.py ended without writing {DEFENSE_RESULT}")
        model: nn.Module = task.new_model()
        load_weights(model, read_weights(load_checked(path).get("model"), path), path)
        return DefenseResult(model.eval())


class WithCleanData(ToolboxDefense):
    """A defense with clean data, which its script draws from the clean training set."""

    clean_fraction: float = Field(0.05, gt=0, lt=1, description="share of clean training images, its `ratio`")


def find_checkout(script: str) -> Path:
    """The user's checkout; `ConfigError` if there is none, or if it lacks the script or the data."""
    named = os.environ.get(HOME)
    if not named:
        raise ConfigError(f"{HOME} is not set", "set it to a checkout of BackdoorBench, with its data sets in data/")
    home = Path(named).expanduser().resolve()
    for needed in (f"defense/{script}.py", "config/defense", "data"):
        if not (home / needed).exists():
            raise ConfigError(f"'{home}' is not a checkout of BackdoorBench: {needed} is not there", f"set {HOME}")
    return home


def link_checkout(home: Path, root: Path) -> None:
    """Link everything of the checkout but its records into `root`, so that scripts write their files there."""
    for path in home.iterdir():
        if path.name not in ("record", ".git"):
            (root / path.name).symlink_to(path, target_is_directory=path.is_dir())
    (root / "record").mkdir()


def environment(root: Path) -> dict[str, str]:
    """The environment variables with which the toolbox runs on a current stack: torch from 2.6 on, and numpy 2."""
    shim = str(Path(__file__).parent / "shim")
    return {
        **os.environ,
        "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1",  # it loads only the record that we have just written
        "PYTHONPATH": os.pathsep.join([shim, str(root)]),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "MPLBACKEND": "Agg",
        "PYTHONDONTWRITEBYTECODE": "1",  # modules are imported through links into the user's checkout
    }


class ABL(ToolboxDefense):
    """BackdoorBench's defense/abl.py."""

    script: ClassVar[str] = "abl"
    filters_training_set: ClassVar[bool] = True


class AC(ToolboxDefense):
    """BackdoorBench's defense/ac.py."""

    script: ClassVar[str] = "ac"
    filters_training_set: ClassVar[bool] = True


class ANP(WithCleanData):
    """BackdoorBench's defense/anp.py."""

    script: ClassVar[str] = "anp"


class BNP(ToolboxDefense):
    """BackdoorBench's defense/bnp.py."""

    script: ClassVar[str] = "bnp"


class CLP(ToolboxDefense):
    """BackdoorBench's defense/clp.py."""

    script: ClassVar[str] = "clp"


class EP(WithCleanData):
    """BackdoorBench's defense/ep.py."""

    script: ClassVar[str] = "ep"


class FP(WithCleanData):
    """BackdoorBench's defense/fp.py."""

    script: ClassVar[str] = "fp"


class FT(WithCleanData):
    """BackdoorBench's defense/ft.py."""

    script: ClassVar[str] = "ft"


class FTSAM(WithCleanData):
    """BackdoorBench's defense/ft-sam.py."""

    script: ClassVar[str] = "ft-sam"


class IBAU(WithCleanData):
    """BackdoorBench's defense/i-bau.py."""

    script: ClassVar[str] = "i-bau"


class MCR(WithCleanData):
    """BackdoorBench's defense/mcr.py."""

    script: ClassVar[str] = "mcr"


class NAD(WithCleanData):
    """BackdoorBench's defense/nad.py."""

    script: ClassVar[str] = "nad"


class NC(WithCleanData):
    """BackdoorBench's defense/nc.py."""

    script: ClassVar[str] = "nc"


class NPD(WithCleanData):
    """BackdoorBench's defense/npd.py."""

    script: ClassVar[str] = "npd"


class RNP(WithCleanData):
    """BackdoorBench's defense/rnp.py."""

    script: ClassVar[str] = "rnp"


class SAU(WithCleanData):
    """BackdoorBench's defense/sau.py."""

    script: ClassVar[str] = "sau"


class Spectral(ToolboxDefense):
    """BackdoorBench's defense/spectral.py."""

    script: ClassVar[str] = "spectral"
    filters_training_set: ClassVar[bool] = True
