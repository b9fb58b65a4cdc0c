"""Loggers, against the real TensorBoard and MLflow: what they keep is what the records say."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from textwrap import dedent
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata as hparams_metadata

from backdoor_bench_none import loggers
from backdoor_bench_none.contracts.cell import Cell
from backdoor_bench_none.contracts.record import Cost, Record
from backdoor_bench_none.loggers import LOGGERS
from backdoor_bench_none.loggers.mlflow import safe_name
from backdoor_bench_none.loggers.tensorboard import run_name
from backdoor_bench_none.registry.plugins import Plugins, PluginWarning
from backdoor_bench_none.results.store import Store
from backdoor_bench_none.run.evaluation import Detection

pytestmark = [
    # MLflow 3 maps its tables in a way that SQLAlchemy 2.1 deprecates, once, when a database is first used
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning"),
    # before it refused them without MLFLOW_ALLOW_FILE_STORE, MLflow warned of files
    pytest.mark.filterwarnings("ignore:The filesystem tracking backend:FutureWarning"),
]

BBNFILE = """
from pathlib import Path
from backdoor_bench_none.api import Defense, hookimpl

class Broken(Defense):
    def run(self, task, context):
        raise ValueError("it broke")

@hookimpl
def bbn_defenses():
    return {"broken": Broken}

@hookimpl
def bbn_cell_skip(cell):
    return "not on a Sunday" if cell.activation.name == "elu" else None
"""
#: titles as a stranger's labels may make them
TITLES = [
    "digits/badnets/none/s0", "../../../escape", "/etc/passwd", "..", ".", "", "-", "a\\..\\b", "C:\\x", "nul\x00byte",
    "new\nline | a pipe", "$(touch x) `x` ; & *?", "Größe/ゼロ/\u202e/🙂", "x" * 5000, "~/x", "%2e%2e%2f",
]  # fmt: skip
Log = Callable[[Record], None]


class Curves(NamedTuple):
    """What TensorBoard shows of a cell."""

    scalars: Mapping[str, list[tuple[int, float]]]
    texts: Mapping[str, str]
    hparams: Mapping[str, str]


@pytest.fixture(autouse=True)
def another_chance() -> None:
    """No logger was given up in a test before."""
    loggers._troubles.clear()


@pytest.fixture(autouse=True)
def at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of the surroundings; MLflow in files, which need no migrations."""
    for name in ("BBN_LOGGERS", "BBN_TENSORBOARD_DIR", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    """Says that a cell ended, to both loggers."""
    monkeypatch.setenv("BBN_LOGGERS", ",".join(LOGGERS))
    return lambda record: Plugins(external=False).cell_finished(cast("Cell", None), record)


def hide(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Make `package` look as if it were not installed."""
    for name in [*sys.modules, package]:
        if name.split(".")[0] == package:
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"backdoor_bench_none.loggers.{package}", raising=False)


def read_curves(record: Record, folder: str = "runs") -> Curves:
    (path,) = (path for path in Path(folder).iterdir() if path.name.endswith(record.key))
    accumulator = EventAccumulator(str(path), {"scalars": 0, "tensors": 0}).Reload()
    tags = accumulator.Tags()
    start = accumulator.summary_metadata[hparams_metadata.SESSION_START_INFO_TAG].plugin_data.content
    hparams = hparams_metadata.parse_session_start_info_plugin_data(start).hparams
    return Curves(
        {tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in tags["scalars"]},
        {
            tag: accumulator.Tensors(tag)[0].tensor_proto.string_val[0].decode()
            for tag in accumulator.PluginTagToContent("text")
        },
        {name: value.string_value for name, value in hparams.items()},
    )


def read_runs(record: Record, experiment: str = "Default") -> list[Run]:
    client = MlflowClient()
    stored = client.get_experiment_by_name(experiment)
    assert stored is not None
    return list(client.search_runs([stored.experiment_id], f"tags.key = '{record.key}'"))


def numbers(record: Record) -> dict[str, float]:
    """What a logger should have of `record`, written out."""
    numbers: dict[str, float | None] = {}
    if record.counts:
        for name, count in (
            ("BA", record.counts.benign_accuracy),
            ("ASR", record.counts.attack_success_rate),
            ("RA", record.counts.robust_accuracy),
        ):
            numbers[name] = count.hits / count.total if count else None
    if it := record.detection:
        bad, good = it.true_positive + it.false_negative, it.false_positive + it.true_negative
        numbers["detection/TPR"] = it.true_positive / bad if bad else None
        numbers["detection/FPR"] = it.false_positive / good if good else None
        numbers["detection/AUROC"] = it.auroc
    for stage, cost in record.costs.items():
        numbers[f"seconds/{stage}"], numbers[f"peak_memory/{stage}"] = cost.seconds, cost.peak_memory
    return {name: value for name, value in numbers.items() if value is not None and not math.isnan(value)}


def assert_logged(record: Record, experiment: str, folder: str) -> None:
    curves = read_curves(record, folder)
    losses = [*enumerate(record.victim_losses, 1)]
    wanted = {name: [(0, value)] for name, value in numbers(record).items()} | (
        {"victim_loss": losses} if losses else {}
    )
    # an event file holds scalars in single precision
    assert curves.scalars == {
        name: [(step, float(np.float32(value))) for step, value in points] for name, points in wanted.items()
    }
    assert f"| title | {record.title} |" in curves.texts["cell"]
    assert f"| reason | {record.reason or '-'} |" in curves.texts["cell"]

    (run,) = read_runs(record, experiment)
    expected = {**numbers(record), **({"victim_loss": losses[-1][1]} if losses else {})}
    assert dict(run.data.metrics) == expected
    history = MlflowClient().get_metric_history(run.info.run_id, "victim_loss")
    assert sorted((point.step, point.value) for point in history) == losses
    tags = {name: run.data.tags.get(name) for name in ("key", "status", "reason")}
    assert tags == {"key": record.key, "status": record.status, "reason": record.reason}
    assert run.info.run_name == record.title
    status = {"done": "FINISHED", "failed": "FAILED", "skipped": "KILLED"}[record.status]
    assert run.info.status == status

    attack, recipe = record.axes["attack"], record.recipe
    said = {
        "attack": attack.name,
        "defense": record.axes["defense"].name,
        "attack.poison_rate": json.dumps(attack.params["poison_rate"]),
        "architecture.hidden": "16",
        "recipe.epochs": "2",
        "recipe.lr": json.dumps(recipe["lr"]),
        "recipe.clip_norm": json.dumps(recipe["clip_norm"]),
        "seed": str(record.seed),
    }
    assert said.items() <= run.data.params.items()
    assert curves.hparams == run.data.params
    assert {f"| {name} | {value} |" for name, value in said.items()} <= set(curves.texts["parameters"].splitlines())


def test_run_is_logged_to_the_number(
    write_benchmark: Callable[..., Path], bbn: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Done, failed and skipped cells, MLflow in a database as by default."""
    monkeypatch.setenv("BBN_LOGGERS", " tensorboard, mlflow,mlflow,")
    monkeypatch.setenv("BBN_TENSORBOARD_DIR", "curves/of")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "my backdoors")
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    write_benchmark(defense="no_defense, none, broken", activation="relu, elu", epochs=2)
    (tmp_path / "bbnfile.py").write_text(BBNFILE)
    assert bbn("run").code == 1  # `broken` fails
    records = Store(tmp_path / "results").records()
    assert sorted(record.status for record in records) == ["done", "done", "failed", "skipped", "skipped", "skipped"]
    assert any(record.detection for record in records)
    assert any(len(record.victim_losses) == 2 for record in records)
    for record in records:
        assert_logged(record, "my backdoors", "curves/of")
    assert len(list(Path("curves/of").iterdir())) == len(records)


@pytest.mark.parametrize("title", TITLES, ids=lambda title: repr(title[:12]))
def test_hostile_title(title: str, make_record: Callable[..., Record], log: Log, tmp_path: Path) -> None:
    record = make_record(status="failed", ba=None, reason=title).model_copy(update={"title": title})
    log(record)
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.isascii()
    assert len(folder.name) <= 200
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "mlruns"}
    (file,) = folder.iterdir()
    assert file.is_file()
    lines = read_curves(record).texts["cell"].splitlines()
    assert len(lines) == 6  # a table of four rows and two columns, whatever is in it
    assert all(len(re.findall(r"(?<!\\)\|", line.replace(r"\\", ""))) == 3 for line in lines)
    (run,) = read_runs(record)
    assert title[:499].startswith((run.info.run_name or "").rstrip("…")) or not title
    assert run.info.status == "FAILED"


def test_names_are_told_apart_by_the_key(make_record: Callable[..., Record]) -> None:
    records = [
        make_record(key=key).model_copy(update={"title": title}) for key in ("aa", "bb") for title in ("x/y", "x y")
    ]
    assert len({run_name(record) for record in records}) == 2


def test_cell_that_runs_again(make_record: Callable[..., Record], log: Log) -> None:
    """TensorBoard shows the last time alone; MLflow keeps both runs, with the status of each."""
    first = make_record(status="failed", ba=None, reason="no luck")
    again = make_record(ba=70, victim_losses=[2.0, 1.0])
    log(first)
    log(again)
    log(again)
    curves = read_curves(again)
    assert curves.scalars["BA"] == [(0, float(np.float32(0.7)))]
    assert curves.scalars["victim_loss"] == [(1, 2.0), (2, 1.0)]
    assert "no luck" not in curves.texts["cell"]
    assert sorted(run.info.status for run in read_runs(again)) == ["FAILED", "FINISHED", "FINISHED"]


def test_another_program_s_event_files_are_left_alone(make_record: Callable[..., Record], log: Log) -> None:
    record = make_record()
    theirs = Path("runs") / run_name(record) / "events.out.tfevents.1.host.1.0"
    theirs.parent.mkdir(parents=True)
    theirs.touch()
    log(record)
    log(record)
    assert theirs.exists()
    assert len(list(theirs.parent.iterdir())) == 2


def test_what_is_not_a_number_is_left_out(make_record: Callable[..., Record], log: Log) -> None:
    detection = Detection(true_positive=0, false_positive=1, true_negative=9, false_negative=0, auroc=None)
    costs = {"defense": Cost(seconds=0.25), "victim": Cost(seconds=2.5, peak_memory=2**40)}
    record = make_record(asr=None, detection=detection, metrics={"a.b": math.nan, "c": -3.0}, victim_losses=[2.0, 0.5])
    record = record.model_copy(update={"costs": costs})
    log(record)
    wanted = {"BA": 0.9, "detection/FPR": 0.1, "seconds/victim": 2.5, "peak_memory/victim": 2.0**40, "metrics/c": -3.0}
    wanted |= {"victim_loss": 0.5, "seconds/defense": 0.25}
    (run,) = read_runs(record)
    assert run.data.metrics == wanted
    scalars = read_curves(record).scalars
    assert {name: points[-1][1] for name, points in scalars.items()} == pytest.approx(wanted, rel=1e-7)
    assert scalars["victim_loss"] == [(1, 2.0), (2, 0.5)]


def test_limits_of_mlflow(make_record: Callable[..., Record], log: Log) -> None:
    """Names and values that MLflow refuses, and more parameters than it takes at once."""
    params = {
        "nested": {"a": [1, None, "x"], "deep": {"b": True}, "empty": {}}, "text": "y" * 7000, "nothing": None,
        "odd (name)!": 1, "../up": 2, "z" * 300: 3, **{f"p{i}": i for i in range(250)},
    }  # fmt: skip
    record = make_record(metrics={"../x//y": 1.0, "per class: 3 %": 2.0}, victim_losses=[float(i) for i in range(1500)])
    attack = record.axes["attack"].model_copy(update={"params": params})
    record = record.model_copy(update={"axes": {**record.axes, "attack": attack}, "reason": "r" * 9000})
    log(record)
    (run,) = read_runs(record)
    said = run.data.params
    assert said["attack.nested.a"] == '[1, null, "x"]'
    assert said["attack.nested.deep.b"] == "true"
    assert said["attack.nested.empty"] == "{}"
    assert said["attack.nothing"] == "null"
    assert said["attack.text"] == "y" * 499 + "…"
    assert [said[f"attack.p{i}"] for i in range(250)] == [str(i) for i in range(250)]
    assert {said["attack.odd _name__"], said["attack.../up"], said[f"attack.{'z' * 243}"]} == {"1", "2", "3"}
    assert run.data.tags["reason"] == "r" * 499 + "…"
    assert (run.data.metrics["metrics/x/y"], run.data.metrics["metrics/per class_ 3 _"]) == (1.0, 2.0)
    assert len(MlflowClient().get_metric_history(run.info.run_id, "victim_loss")) == 1500
    assert len(read_curves(record).scalars["victim_loss"]) == 1500


@pytest.mark.parametrize("name", ["", "/", "..", "a/../..", "./a//b/", "é%", "x" * 249 + "/y"])
def test_safe_name_is_one_mlflow_takes(name: str) -> None:
    client = MlflowClient()
    run = client.create_run("0")
    client.log_metric(run.info.run_id, safe_name(name), 1.0)
    client.log_param(run.info.run_id, safe_name(name), 1)


def test_experiment_by_id_and_by_default(
    make_record: Callable[..., Record], log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    log(make_record(key="aa"))
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", MlflowClient().create_experiment("other"))
    log(make_record(key="bb"))
    assert [len(read_runs(make_record(key=key), name)) for key in ("aa", "bb") for name in ("Default", "other")] == [
        1,
        0,
        0,
        1,
    ]


# what goes wrong


@pytest.mark.parametrize("package", LOGGERS)
def test_missing_package(
    package: str, write_benchmark: Callable[..., Path], bbn: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run goes on, the other logger too, and the warning names the remedy."""
    monkeypatch.setenv("BBN_LOGGERS", f"{package},tensorboard,mlflow")
    hide(monkeypatch, package)
    write_benchmark(attack="clean", defense="no_defense")
    remedy = rf"hint: pip install 'backdoor-bench-none\[{package}\]'"
    with pytest.warns(PluginWarning, match=rf"(?s)'backdoor_bench_none.loggers': .* logger '{package}': .*{remedy}$"):
        said = bbn("run")
    assert said.code == 0
    assert "1 done" in said.out
    assert Path("runs").exists() == (package == "mlflow")
    assert Path("mlruns").exists() == (package == "tensorboard")


@pytest.mark.parametrize(("name", "hint"), [("tensorbord", "did you mean 'tensorboard'?"), ("x", "known: mlflow, ten")])
def test_unknown_logger(
    name: str, hint: str, make_record: Callable[..., Record], log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BBN_LOGGERS", f"{name},tensorboard")
    with pytest.warns(PluginWarning, match=rf"'backdoor_bench_none.loggers'.*unknown logger '{name}'") as caught:
        log(make_record())
    assert f"hint: {hint}" in str(caught[0].message)
    assert read_curves(make_record()).scalars["BA"]


def test_every_logger_that_fails_is_named(
    make_record: Callable[..., Record], log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("runs").write_text("a file where a folder should be")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://x")
    with pytest.warns(PluginWarning, match=r"(?s)logger 'tensorboard': .*Error: .*; logger 'mlflow': .*nonsense"):
        log(make_record())


def test_run_that_cannot_be_filled_does_not_stay_open(
    make_record: Callable[..., Record], log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: object, **named: object) -> None:
        raise ConnectionError("gone")

    monkeypatch.setattr(MlflowClient, "log_batch", refuse)
    monkeypatch.setenv("BBN_LOGGERS", "mlflow")
    with pytest.warns(PluginWarning, match="logger 'mlflow': ConnectionError: gone"):
        log(make_record())
    (run,) = MlflowClient().search_runs(["0"])
    assert run.info.status == "FINISHED"


@pytest.mark.parametrize("value", [None, "", " , "])
def test_nothing_happens_unasked(
    value: str | None, make_record: Callable[..., Record], log: Log, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("BBN_LOGGERS") if value is None else monkeypatch.setenv("BBN_LOGGERS", value)
    log(make_record())
    assert list(tmp_path.iterdir()) == []


def test_neither_package_is_imported_unasked() -> None:
    code = """
    import sys
    from backdoor_bench_none.registry.plugins import Plugins
    plugins = Plugins()
    slow = {"tensorboard", "mlflow", "torch", "numpy"} & set(sys.modules)
    assert not slow, slow
    plugins.cell_finished(None, None)
    slow = {"tensorboard", "mlflow"} & set(sys.modules)
    assert not slow, slow
    """
    done = subprocess.run([sys.executable, "-c", dedent(code)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


# loggers that fail


def test_a_server_that_does_not_answer_costs_one_cell(
    make_record: Callable[..., Record], log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Port 9 of this machine refuses; the second cell is not even tried."""
    tried: list[str] = []
    create = MlflowClient.create_run

    def noted(self: MlflowClient, *given: Any, **named: Any) -> Any:
        tried.append("run")
        return create(self, *given, **named)

    monkeypatch.setattr(MlflowClient, "create_run", noted)
    monkeypatch.setattr(loggers, "PATIENCE", 0.0)  # however fast it refuses
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("BBN_LOGGERS", "mlflow")
    with pytest.warns(PluginWarning, match="gets no more cells of this run"):
        log(make_record("aa" * 8))
    log(make_record("bb" * 8))
    assert tried == ["run"]


def test_a_logger_that_fails_twice_in_a_row_is_given_up(
    make_record: Callable[..., Record], log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure that is followed by a success does not count."""
    fails = iter([True, False, True, True, True])
    calls: list[bool] = []

    def log_record(record: Record) -> None:
        calls.append(next(fails))
        if calls[-1]:
            raise ValueError("no")

    monkeypatch.setattr("backdoor_bench_none.loggers.tensorboard.log_record", log_record)
    monkeypatch.setenv("BBN_LOGGERS", "tensorboard")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for key in ("aa", "bb", "cc", "dd", "ee"):
            log(make_record(key * 8))
    assert calls == [True, False, True, True]
    assert ["no more cells" in str(warning.message) for warning in caught] == [False, False, True]


def test_a_new_run_gives_every_logger_another_chance() -> None:
    loggers._troubles["mlflow"] = loggers._Trouble(2, given_up=True)
    loggers.bbn_modify_plan(config=None, cells=[])  # type: ignore[arg-type]
    assert loggers._troubles == {}
