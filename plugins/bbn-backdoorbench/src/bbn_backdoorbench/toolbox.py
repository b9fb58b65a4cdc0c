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
from typing import TYPE_CHECKING, ClassVar, Literal, cast

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from backdoor_bench_none.api import (
    BenchError,
    Combination,
    ConfigError,
    Context,
    Defense,
    DefenseResult,
    DefenseTask,
    OracleTask,
    Stage,
)
from bbn_backdoorbench.attack import load_weights
from bbn_backdoorbench.plug import Plugged, insert_plug
from bbn_backdoorbench.reading import RecordError, load_checked, read_weights
from bbn_backdoorbench.words import DEFENSE_RESULT, HOME, NETWORKS, PLUG_LAYER
from bbn_backdoorbench.writing import Network, write_attack

if TYPE_CHECKING:
    from bbn_backdoorbench.networks import ToolboxNetwork

#: the interpreter of the checkout's environment; default: this one
PYTHON = "BBN_BACKDOORBENCH_PYTHON"
RECORD = "bbn"
#: the folder whose sitecustomize mends the toolbox's processes
SHIM = Path(__file__).parent / "shim"
#: the note on a result whose script wrote the weights that it was given
UNCHANGED = "returned network equals the victim"
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
    #: whether it reads the record's training set, so that a record without one does not fit
    needs_training_set: ClassVar[bool] = False
    #: whether the script names the device cuda where it should take that of its flag
    needs_cuda: ClassVar[bool] = False

    options: dict[str, Flag] = Field(
        default_factory=dict, description="further flags of the script by name, as {epochs: 10}; they win over its YAML"
    )

    def skip(self, cell: Combination) -> str | None:
        """The reason why a cell does not fit: the script knows no other networks and data sets than the toolbox's."""
        name = getattr(cell.architecture.component, "model_name", None)
        if name is None or not cell.info.name.startswith("backdoorbench:"):
            return (
                f"BackdoorBench's {self.script} needs a network and a data set of BackdoorBench, "
                "as backdoorbench:resnet18 and backdoorbench:cifar10"
            )
        networks = NETWORKS.get(self.script, (name,))
        if name not in networks:
            return f"BackdoorBench's {self.script} has no code for {name}, only for {', '.join(networks)}"
        return None

    def run(self, task: DefenseTask, context: Context) -> DefenseResult:
        """The network in the script's defense_result.pt."""
        oracle_task = cast("OracleTask", task)
        if self.needs_cuda and context.device.type != "cuda":
            raise ConfigError(
                f"BackdoorBench's {self.script} runs on CUDA only: its script names that device itself",
                "run the cell with --device cuda, or leave this defense out",
            )
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
        name = cast("ToolboxNetwork", task.build.architecture).model_name
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
            hint = None
            if "ModuleNotFoundError" in last:
                hint = f"install what it imports for the interpreter of {PYTHON}; the bridge's README has a list"
            raise BenchError(
                f"BackdoorBench's defense/{self.script}.py ended with code {process.returncode}: {last}", hint
            )

    def command(self, root: Path, context: Context, dataset: str, model: str) -> list[str]:
        """The command of the script, with every flag that it does not take from the record."""
        configs = [root / "config" / "defense" / self.script / f"{name}.yaml" for name in (dataset, "config")]
        config = next((path for path in configs if path.is_file()), None)
        if config is None:
            raise ConfigError(f"the checkout has no config/defense/{self.script}/{dataset}.yaml")
        flags: dict[str, Flag] = {
            "result_file": RECORD, "yaml_path": f"./{config.relative_to(root)}", "dataset": dataset, "model": model,
            "device": str(context.device), "num_workers": 0, "random_seed": context.seed % 2**31, **self.flags(),
            **self.options,
        }  # fmt: skip
        command = [os.environ.get(PYTHON) or sys.executable, f"./defense/{self.script}.py"]
        for name, value in flags.items():
            command += [f"--{name}", str(value)]
        return command

    def flags(self) -> Mapping[str, Flag]:
        """The flags for parameters other than `options`: the share of clean data, for scripts that take one."""
        if not self.clean_fraction:
            return {}
        return {"ratio": self.clean_fraction}

    def _read_result(self, root: Path, task: DefenseTask) -> DefenseResult:
        path = self._find_result(root, DEFENSE_RESULT)
        model: nn.Module = task.new_model()
        load_weights(model, fold_masks(read_weights(load_checked(path).get("model"), path)), path)
        extras = {}
        if same_weights(model, task.victim()):
            extras["result"] = UNCHANGED
        return DefenseResult(model.eval(), extras=extras)

    def _find_result(self, root: Path, name: str) -> Path:
        path = root / "record" / RECORD / "defense" / self.script / name
        if not path.is_file():
            raise RecordError(f"defense/{self.script}.py ended without writing {name}")
        return path


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


def fold_masks(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights with masks of torch's pruning applied, which FP leaves in its result.

    Pruning keeps a tensor NAME as NAME_orig and NAME_mask; the network computes with their product.
    """
    folded: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        plain = name.removesuffix("_orig").removesuffix("_mask")
        if f"{plain}_orig" in weights and f"{plain}_mask" in weights:
            folded[plain] = weights[f"{plain}_orig"] * weights[f"{plain}_mask"]
        else:
            folded[name] = tensor
    return folded


def same_weights(model: nn.Module, other: nn.Module) -> bool:
    """Whether two networks of one structure have equal weights and statistics."""
    own, others = model.state_dict(), other.state_dict()
    return own.keys() == others.keys() and all(torch.equal(own[name].cpu(), others[name].cpu()) for name in own)


def environment(root: Path) -> dict[str, str]:
    """The environment variables with which the toolbox runs on a current stack: torch from 2.6 on, and numpy 2."""
    return {
        **os.environ,
        "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1",  # it loads only the record that we have just written
        "PYTHONPATH": os.pathsep.join([str(SHIM), str(root)]),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "MPLBACKEND": "Agg",
        "PYTHONDONTWRITEBYTECODE": "1",  # modules are imported through links into the user's checkout
    }


class ABL(ToolboxDefense):
    """BackdoorBench's defense/abl.py."""

    script: ClassVar[str] = "abl"
    needs_training_set: ClassVar[bool] = True


class AC(ToolboxDefense):
    """BackdoorBench's defense/ac.py."""

    script: ClassVar[str] = "ac"
    needs_training_set: ClassVar[bool] = True


class ANP(WithCleanData):
    """BackdoorBench's defense/anp.py."""

    script: ClassVar[str] = "anp"


class BNP(WithCleanData):
    """BackdoorBench's defense/bnp.py, which compares the norms' inputs on the training set with those on clean data."""

    script: ClassVar[str] = "bnp"
    needs_training_set: ClassVar[bool] = True


class CLP(ToolboxDefense):
    """BackdoorBench's defense/clp.py."""

    script: ClassVar[str] = "clp"


class EP(ToolboxDefense):
    """BackdoorBench's defense/ep.py, which takes no clean data: it measures entropies on the record's training set."""

    script: ClassVar[str] = "ep"
    needs_training_set: ClassVar[bool] = True


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
    needs_cuda: ClassVar[bool] = True


class MCR(WithCleanData):
    """BackdoorBench's defense/mcr.py."""

    script: ClassVar[str] = "mcr"
    needs_training_set: ClassVar[bool] = True


class NAD(WithCleanData):
    """BackdoorBench's defense/nad.py."""

    script: ClassVar[str] = "nad"


class NC(WithCleanData):
    """BackdoorBench's defense/nc.py, which writes the network that it was given, also where it finds a trigger.

    It fine-tunes one copy of the network and saves another.
    """

    script: ClassVar[str] = "nc"


class NPD(WithCleanData):
    """BackdoorBench's defense/npd.py, which trains a layer in front of one of the network's, and changes nothing else.

    Its defense_result.pt holds the victim; the network returned here also has the layer of its plug_layer.pt.
    """

    revision: ClassVar[int] = 2
    script: ClassVar[str] = "npd"

    plug: Literal["convbn", "lightconv", "onlyconv", "twoconv"] = Field(
        "convbn", description="structure of the trained layer, its `model_name`"
    )
    target_layer: str = Field(
        "layer4.1.conv1", description="convolution that the trained layer is put in front of, its `target_layer_name`"
    )

    @field_validator("options")
    @classmethod
    def _keep_the_structure(cls, options: dict[str, Flag]) -> dict[str, Flag]:
        for flag, instead in (
            ("model_name", "use the parameter plug"), ("target_layer_name", "use the parameter target_layer"),
            ("use_residual", "a network with a residual around the trained layer is not rebuilt here"),
        ):  # fmt: skip
            if flag in options:
                raise ValueError(f"{flag} is not an option here: {instead}")
        return options

    def adapt(self, model: nn.Module) -> nn.Module:
        """The network with an untrained layer in front of the target layer."""
        return insert_plug(model, self.target_layer, self.plug)

    def flags(self) -> Mapping[str, Flag]:
        """The share of clean data, and where the layer is put."""
        return {**super().flags(), "model_name": self.plug, "target_layer_name": self.target_layer}

    def run(self, task: DefenseTask, context: Context) -> DefenseResult:
        """The victim with the trained layer in it."""
        self.adapt(task.new_model())  # so that a target layer that is not there is refused before the script's hours
        return super().run(task, context)

    def _read_result(self, root: Path, task: DefenseTask) -> DefenseResult:
        victim = super()._read_result(root, task)
        path = self._find_result(root, PLUG_LAYER)
        model = self.adapt(victim.model)
        plugged = cast("Plugged", model.get_submodule(self.target_layer))
        load_weights(plugged.plug, read_weights(load_checked(path).get("plug_model"), path), path)
        extras = {}
        if victim.extras:
            extras["result"] = f"{DEFENSE_RESULT} holds the victim; the layer of {PLUG_LAYER} is put into it"
        return DefenseResult(model.eval(), extras=extras)


class RNP(WithCleanData):
    """BackdoorBench's defense/rnp.py."""

    script: ClassVar[str] = "rnp"


class SAU(WithCleanData):
    """BackdoorBench's defense/sau.py."""

    script: ClassVar[str] = "sau"


class Spectral(ToolboxDefense):
    """BackdoorBench's defense/spectral.py."""

    script: ClassVar[str] = "spectral"
    needs_training_set: ClassVar[bool] = True
