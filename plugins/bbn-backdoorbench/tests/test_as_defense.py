"""Our defenses from BackdoorBench's command line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from standins import MODEL, SOURCE

from bbn_backdoorbench.as_defense import as_parameters, main, read_settings


@pytest.fixture
def root(write_record: Callable[..., Path], npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """BackdoorBench's root, as far as our defenses need it: a record, and the clean images."""
    write_record()
    (tmp_path / "data").mkdir()
    shutil.copy(npz, tmp_path / "data" / "cifar10.npz")
    return tmp_path


def run(*arguments: str, defense: str = "none") -> int:
    return main(defense, ["--result_file", "badnet_1", "--dataset", "cifar10", "--model", MODEL, *arguments])


@pytest.mark.slow
def test_none_from_the_command_line(root: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SOURCE), *filter(None, sys.path)])}
    command = [
        sys.executable, "-m", "bbn_backdoorbench.none", "--result_file", "badnet_1", "--dataset", "cifar10",
        "--model", MODEL, "--device", "cpu", "--num_workers", "0", "--lr", "0.001", "--param", "epochs=1",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "test_acc 0." in done.stdout
    assert "not used here: num_workers" in done.stderr
    folder = root / "record" / "badnet_1" / "defense" / "none"
    result = torch.load(folder / "defense_result.pt", weights_only=True)
    assert (result["model_name"], result["num_classes"]) == (MODEL, 10)
    assert {path.name for path in folder.iterdir()} >= {"none_df.csv", "none_df_summary.csv"}


@pytest.mark.parametrize("defense", ["dp_sgd", "nad", "ac", "abl"])
def test_the_other_defenses_run(defense: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = {"nad": ["--te_epochs", "1", "--epochs", "1", "--ratio", "0.2"], "abl": ["--isolation_ratio", "0.05"]}
    code = run("--lr", "0.001", "--epochs", "1", *quick.get(defense, []), defense=defense)
    assert code == 0, capsys.readouterr().err
    assert (root / "record" / "badnet_1" / "defense" / defense / "defense_result.pt").is_file()


@pytest.mark.parametrize(("flags", "epochs"), [([], 7), (["--epochs", "2"], 2)])
def test_the_command_line_wins_over_the_file(flags: list[str], epochs: int, root: Path) -> None:
    Path("nad.yaml").write_text("epochs: 7\nte_epochs: 3\nbeta1: 100\ncheckpoint_load:\nnum_workers: 4\n")
    settings = read_settings("nad", ["--result_file", "badnet_1", "--yaml_path", "nad.yaml", *flags])
    assert as_parameters("nad", settings) == {"epochs": epochs, "teacher_epochs": 3, "betas": [100, 1000, 1000]}


def test_the_toolboxs_own_yaml_of_nad_is_read(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It names a teacher without saying which."""
    Path("nad.yaml").write_text("te_epochs: 10\nbeta1: 500\np: 2.0\nindex:\nteacher_model_loc:\n")
    settings = read_settings("nad", ["--result_file", "badnet_1", "--yaml_path", "nad.yaml"])
    assert as_parameters("nad", settings) == {"teacher_epochs": 10, "betas": [500, 1000, 1000]}
    assert run("--teacher_model_loc", "teacher.pt", defense="nad") == 2
    assert "teacher_model_loc: our nad trains its teacher" in capsys.readouterr().err


def test_our_names_win_over_the_toolboxs_words(root: Path) -> None:
    settings = read_settings("abl", ["--result_file", "x", "--gamma", "0.3", "--param", "gamma=0.7"])
    assert as_parameters("abl", settings) == {"gamma": 0.7}
    settings = read_settings("abl", ["--result_file", "x", "--gradient_ascent_type", "Flooding"])
    assert as_parameters("abl", settings) == {"isolation": "flooding"}


def test_faults_are_told_without_a_traceback(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("odd.yaml").write_text("epoch: 7\n")
    faults = {
        ("--yaml_path", "odd.yaml"): "unknown key 'epoch'",
        ("--yaml_path", "none.yaml"): "cannot be read",
        ("--model", "resnet18"): "--model resnet18: the record is of squeezenet1_0",
        ("--dataset", "gtsrb"): "--dataset gtsrb: the record is of cifar10",
        ("--result_file", "nothing"): "is not a record",
        ("--device", "cuda:9"): "there is no device 'cuda:9'",
        ("--param", "epochs=-1"): "epochs",
    }
    for arguments, message in faults.items():
        assert run(*arguments) == 2, arguments
        said = capsys.readouterr().err
        assert message in said
        assert "Traceback" not in said
    assert not (root / "record" / "nothing").exists()  # the toolbox would make the folder


@pytest.mark.parametrize("name", ["0123", "2024_0101", "no", "1e3"])
def test_a_records_name_is_taken_as_it_is_written(name: str, root: Path) -> None:
    """Not as the number or truth value that YAML sees in it."""
    assert read_settings("none", ["--result_file", name])["result_file"] == name


def test_values_that_are_none_are_told_without_a_traceback(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("params.yaml").write_text("params: 3\n")
    Path("list.yaml").write_text("- lr\n")
    Path("lr.yaml").write_text("lr: fast\n")
    Path("binary.yaml").write_bytes(b"\xff\xfe\x00")
    faults = {
        ("--lr", "["): "--lr [ is not a value",
        ("--epochs", "[1]"): "epochs: Input should be a valid integer",
        ("--random_seed", "abc"): "seeds.0: 'abc' is no seed",
        ("--param", "x"): "'x' is not NAME=VALUE",
        ("--yaml_path", "params.yaml"): "'params.yaml': params is not a mapping",
        ("--yaml_path", "list.yaml"): "'list.yaml' is not a mapping",
        ("--yaml_path", "lr.yaml"): "lr: 'fast' is not a number",
        ("--yaml_path", "binary.yaml"): "'binary.yaml' cannot be read",
    }
    for arguments, message in faults.items():
        assert run(*arguments) == 2, arguments
        assert message in capsys.readouterr().err
    assert not (root / "record" / "badnet_1" / "defense").exists()


def test_the_file_alone_may_say_it_all_and_the_parameters_of_ours(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("nad.yaml").write_text(
        f"result_file: badnet_1\ndataset: cifar10\nmodel: {MODEL}\ndevice: cpu\nratio: 0.2\nlr: 0.001\n"
        "num_workers: 4\namp: true\nparams: {epochs: 1, teacher_epochs: 1}\n"
    )
    assert main("nad", ["--yaml_path", "nad.yaml"]) == 0
    said = capsys.readouterr()
    assert "not used here: amp, num_workers" in said.err
    assert "test_asr" in said.out
    assert (root / "record" / "badnet_1" / "defense" / "nad" / "defense_result.pt").is_file()


def test_a_second_run_replaces_our_own_result(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = root / "record" / "badnet_1" / "defense" / "nad" / "defense_result.pt"
    words = ("--te_epochs", "1", "--epochs", "1", "--ratio", "0.2", "--lr", "0.001")
    assert run(*words, "--random_seed", "0", defense="nad") == 0
    first = torch.load(result, weights_only=True)["model"]
    assert run(*words, "--random_seed", "1", defense="nad") == 0, capsys.readouterr().err
    second = torch.load(result, weights_only=True)["model"]
    assert any(not torch.equal(first[name], tensor) for name, tensor in second.items())


def test_the_toolboxs_own_result_is_left_alone(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = root / "record" / "badnet_1" / "defense" / "nad"
    theirs.mkdir(parents=True)
    (theirs / "defense_result.pt").write_bytes(b"theirs")
    assert run("--epochs", "1", "--te_epochs", "1", "--lr", "0.001", "--ratio", "0.2", defense="nad") == 2
    assert "not written by this package" in capsys.readouterr().err
    assert (theirs / "defense_result.pt").read_bytes() == b"theirs"
