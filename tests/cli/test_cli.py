"""Every verb of `bbn`: what it prints, what it returns, and that a user's fault is told without a traceback."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from backdoor_bench_none.cli.init import default_benchmark
from backdoor_bench_none.contracts.cell import Cell
from backdoor_bench_none.contracts.record import Record
from backdoor_bench_none.planning.plan import Plan, make_plan
from backdoor_bench_none.planning.stage_table import defense_key, poison_key, record_key
from backdoor_bench_none.registry.components import Registry
from backdoor_bench_none.registry.plugins import Plugins, PluginWarning
from backdoor_bench_none.results.store import Store

#: `untrained` takes no time; `broken` raises until there is a file `mended`; ELU is skipped while there is one `skip`
BBNFILE = '''
from pathlib import Path
from typing import ClassVar
from backdoor_bench_none.api import Defense, DefenseResult, Stage, hookimpl

class Untrained(Defense):
    """Returns a fresh network."""

    stage: ClassVar[Stage] = Stage.IN_TRAINING
    number: int = 0

    def run(self, task, context):
        return DefenseResult(task.new_model())

class Broken(Untrained):
    """Raises."""

    def run(self, task, context):
        if not Path("mended").exists():
            raise ValueError("it broke")
        return super().run(task, context)

@hookimpl
def bbn_defenses():
    return {"untrained": Untrained, "broken": Broken}

@hookimpl
def bbn_cell_skip(cell):
    return "not on a Sunday" if cell.activation.name == "elu" and Path("skip").exists() else None
'''
KINDS = ("attacks", "defenses", "architectures", "activations", "datasets", "trainers", "metrics", "executors")
ENTRIES = Plugins(external=False).entries


class Said(NamedTuple):
    code: int
    out: str
    err: str


Bbn = Callable[..., Said]
Write = Callable[..., Path]
MakeRecord = Callable[..., Record]


@pytest.fixture
def write(write_benchmark: Write, tmp_path: Path) -> Write:
    """As `write_benchmark`, with the defenses above and nothing that trains."""
    (tmp_path / "bbnfile.py").write_text(BBNFILE)
    return lambda **keywords: write_benchmark(**{"defense": "untrained", **keywords})


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(path: Path) -> Plan:
    return make_plan(path, Registry.default(path.parent))


def fault(said: Said, message: str, hint: str = "") -> None:
    """`said` tells of a user's fault: on stderr, with a hint, without a traceback."""
    assert said.code == 2
    assert said.out == ""
    assert "Traceback" not in said.err
    lines = said.err.splitlines()
    assert any(re.search(f"^error: .*{message}", line) for line in lines), said.err
    assert not hint or any(re.search(f"^hint: .*{hint}", line) for line in lines), said.err


# init, list, show, doctor


def test_init(here: Path, bbn: Bbn) -> None:
    said = bbn("init")
    assert said.code == 0
    assert "bbn run" in said.out
    assert (here / "benchmark.yaml").read_text() == default_benchmark()


def test_init_does_not_overwrite(here: Path, bbn: Bbn) -> None:
    (here / "benchmark.yaml").write_text("mine")
    fault(bbn("init"), "'benchmark.yaml' exists already", "--force")
    assert (here / "benchmark.yaml").read_text() == "mine"
    assert bbn("init", "--force").code == 0
    assert (here / "benchmark.yaml").read_text() == default_benchmark()


@pytest.mark.usefixtures("here")
def test_init_elsewhere(bbn: Bbn) -> None:
    assert bbn("init", "other.yaml").code == 0
    assert bbn("plan", "other.yaml").code == 0
    fault(bbn("init", "absent/b.yaml"), "'absent/b.yaml' cannot be written: No such file")


@pytest.mark.usefixtures("here")
def test_list_names_everything_with_its_provider(bbn: Bbn) -> None:
    said = bbn("list")
    assert said.code == 0
    lines = [line.split() for line in said.out.splitlines()]
    assert [line[:2] for line in sorted(lines)] == sorted([e.kind, e.name] for e in ENTRIES)
    assert {line[2] for line in lines} == {"backdoor-bench-none"}


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("kind", KINDS)
def test_list_of_a_kind(kind: str, bbn: Bbn) -> None:
    listed = json.loads(bbn("list", kind, "--json").out)
    assert [row["name"] for row in listed] == [e.name for e in ENTRIES if kind.startswith(e.kind[:-1])]
    assert [line.split()[1] for line in bbn("list", kind).out.splitlines() if line] == [row["name"] for row in listed]


@pytest.mark.usefixtures("here")
def test_list_plugins(bbn: Bbn) -> None:
    listed = json.loads(bbn("list", "plugins", "--json").out)
    assert {"bbn_attacks", "bbn_defenses"} <= {row["plugin"] for row in listed}
    assert {row["status"] for row in listed} == {"loaded"}


def test_list_shows_the_bbnfile(write: Write, bbn: Bbn) -> None:
    write()
    assert re.search(r"defense +untrained +bbnfile\.py", bbn("list", "defenses").out)


@pytest.mark.usefixtures("here")
def test_unknown_kind(bbn: Bbn) -> None:
    fault(bbn("list", "atacks"), "unknown kind 'atacks'", "did you mean 'attacks'")


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: f"{entry.kind}-{entry.name}")
def test_show_documents_every_parameter(entry: Any, bbn: Bbn) -> None:
    said = bbn("show", entry.name)
    assert said.code == 0
    assert f"{entry.kind} {entry.name}\n" in said.out
    assert "provider    backdoor-bench-none" in said.out
    component = entry.load()
    assert component.__doc__
    for name, field in component.model_fields.items():
        if name == "clean_fraction" and field.default == 0:
            continue  # a defense that asks for none cannot be given any
        assert field.description, f"{name} has no description"
        assert re.search(rf"^  {name} .*(default|required).*: {re.escape(field.description)}$", said.out, re.MULTILINE)


@pytest.mark.usefixtures("here")
def test_show_none_has_bounds_defaults_and_paper(bbn: Bbn) -> None:
    said = bbn("show", "none").out
    assert re.search(r"  r1 +0 < number ≤ 1, default 0.03: ", said)
    assert "arXiv:2202.06382" in said
    assert re.search(r"source .*none\.py:\d+", said)


@pytest.mark.usefixtures("here")
def test_show_an_unknown_name(bbn: Bbn) -> None:
    fault(bbn("show", "nnoe"), "unknown component 'nnoe'", "did you mean 'none'")


def test_preview_is_a_sheet_of_clean_and_triggered_images(here: Path, bbn: Bbn) -> None:
    said = bbn("show", "badnets", "--preview", "sheet.png", "-p", "trigger_kind=corner", "-p", "size=4")
    assert said.code == 0
    sheet = np.asarray(Image.open(here / "sheet.png").convert("L")).astype(int)
    clean, triggered, difference = np.split(sheet, 3)
    changed = np.argwhere(clean != triggered)
    assert len(changed)
    assert changed[:, 0].max() < 30  # four of 16 pixels, enlarged to 96, at the top
    assert (difference > 0).any()


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("none --preview x.png", "attack 'none'"),
        ("badnets --preview x.png -p sise=4", "sise.*did you mean 'size'"),
        ("badnets --preview x.png -p size", "'size' is not NAME=VALUE"),
        ("badnets --preview x.png -p size=40", "40"),
        ("badnets --preview x.png -p 'size=[4'", "size"),
        ("badnets --preview x.png --dataset digit", "did you mean|unknown dataset 'digit'"),
        ("badnets --preview /proc/x.png", "'/proc/x.png' cannot be written"),
    ],
)
def test_a_preview_that_cannot_be_made(arguments: str, message: str, bbn: Bbn) -> None:
    said = bbn("show", *shlex.split(arguments))
    assert said.code == 2
    assert "Traceback" not in said.err
    assert re.search(f"error: .*({message})", said.err)


@pytest.mark.usefixtures("here")
def test_doctor(bbn: Bbn) -> None:
    said = bbn("doctor")
    assert said.code == 0
    for word in ("torch ", "torchvision ", "cpu ", "cores ", "disk ", "'bbn_defenses' (backdoor-bench-none"):
        assert word in said.out


def test_doctor_names_a_broken_plugin(here: Path, bbn: Bbn) -> None:
    (here / "bbnfile.py").write_text("import nothing_of_the_kind")
    with pytest.warns(PluginWarning, match="nothing_of_the_kind"):
        said = bbn("doctor")
    assert said.code == 2
    assert re.search(r"^! plugin .*bbnfile.*nothing_of_the_kind", said.out, re.MULTILINE)


# plan


def test_plan_counts_and_runs_nothing(write: Write, bbn: Bbn, tmp_path: Path) -> None:
    write(attack="clean, badnets", defense="no_defense, none", activation="relu, elu", seeds="0, 1",
          rest="exclude: [{attack: clean, activation: elu}]\n")  # fmt: skip
    said = bbn("plan")
    assert said.code == 0
    assert "12 cells" in said.out
    assert "4 excluded" in said.out
    assert "12 cells, and what they share: 1 data set, 4 poisoned sets, 6 victims" in said.out
    assert "Nothing was run" in said.out
    assert not (tmp_path / "results").exists()


def test_plan_verbose_names_every_cell_and_its_state(
    write: Write, bbn: Bbn, tmp_path: Path, make_record: MakeRecord
) -> None:
    plan = load(write(activation="relu, gelu, elu"))
    Store(tmp_path / "results").write_record(make_record(record_key(plan.cells[0])))
    (tmp_path / "skip").touch()
    lines = bbn("plan", "-v").out.splitlines()
    states = {cell.title: line.split()[0] for cell in plan.cells for line in lines if record_key(cell) in line}
    assert [state for _, state in states.items()] == ["done", "run", "skip"]
    assert any("1: not on a Sunday" in line for line in lines)


def test_plan_with_an_absent_data_set(write: Write, bbn: Bbn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BBN_DATA", str(tmp_path / "nothing"))
    write(dataset="mnist")
    said = bbn("plan")
    assert said.code == 0
    assert "mnist" in said.out
    assert "absent" in said.out


def test_plan_counts_the_product_of_its_axes_only_where_it_is_one(write: Write, bbn: Bbn) -> None:
    include = "include: [{attack: clean, defense: untrained, architecture: vgg11, activation: elu}]\n"
    write(rest=include)
    first = bbn("plan").out.splitlines()[0]
    sizes = [int(size) for size in re.findall(r"(\d+) [a-z]+", first.partition("=")[2].partition(", less")[0])]
    assert "2 cells" in first
    assert not sizes or np.prod(sizes) == 2, first


# run


def test_run_prints_a_line_per_cell_and_the_matrix(write: Write, bbn: Bbn, tmp_path: Path) -> None:
    plan = load(write(attack="clean, badnets"))
    said = bbn("run")
    assert said.code == 0
    assert said.err == ""
    for cell in plan.cells:
        assert len(re.findall(rf"^done +{record_key(cell)}  {cell.title} ", said.out, re.MULTILINE)) == 1
    assert "untrained" in said.out
    assert re.search(r"^2 done in \d+ s$", said.out, re.MULTILINE)
    assert {record.status for record in Store(tmp_path / "results").records()} == {"done"}


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "results").rglob("*.json")}


def test_a_second_run_does_nothing_and_says_so(write: Write, bbn: Bbn, tmp_path: Path) -> None:
    write()
    bbn("run")
    before = times(tmp_path)
    said = bbn("run")
    assert said.code == 0
    assert "0 cells to run, 1 done before" in said.out
    assert "0 done, 1 done before" in said.out
    assert times(tmp_path) == before
    assert bbn("run", "--only", "all").code == 0
    assert times(tmp_path) != before


def test_a_failed_cell_is_told_and_run_again(write: Write, bbn: Bbn, tmp_path: Path) -> None:
    good, broken = load(write(defense="untrained, broken")).cells
    key = record_key(broken)
    said = bbn("run")
    assert said.code == 1
    assert re.search(rf"^FAILED +{key}  {broken.title} - ValueError: it broke", said.out, re.MULTILINE)
    assert "[1] failed: ValueError: it broke" in said.out
    assert f"bbn results show {key}" in said.out
    assert 'raise ValueError("it broke")' in bbn("results", "show", key).out
    before = times(tmp_path)
    (tmp_path / "mended").touch()
    said = bbn("run", "--only", "failed")
    assert said.code == 0
    assert re.search(rf"^done +{key}", said.out, re.MULTILINE)
    assert times(tmp_path)[f"{record_key(good)}.json"] == before[f"{record_key(good)}.json"]


def test_only_failed_does_not_call_what_is_missing_done(write: Write, bbn: Bbn) -> None:
    write()
    said = bbn("run", "--only", "failed")
    assert said.code in (0, 5)
    assert "1 done before" not in said.out


@pytest.mark.parametrize(("option", "failed"), [("-x", 1), ("--maxfail=2", 2)])
def test_stop_after_failures(option: str, failed: int, write: Write, bbn: Bbn) -> None:
    write(defense="broken", activation="relu, elu, gelu, silu")
    said = bbn("run", option, "-j", 1)
    assert said.code == 1
    assert f"0 done, {failed} failed, {4 - failed} not run" in said.out


def test_skipped_cells_say_why(write: Write, bbn: Bbn, tmp_path: Path) -> None:
    write(activation="relu, elu")
    (tmp_path / "skip").touch()
    said = bbn("run")
    assert said.code == 0
    assert "1 done, 1 skipped" in said.out
    assert "[1] skipped: not on a Sunday" in said.out


def test_counts_are_those_of_the_selection(write: Write, bbn: Bbn, tmp_path: Path) -> None:
    write(activation="relu, elu", seeds="0, 1")
    (tmp_path / "skip").touch()
    said = bbn("run", "--activation", "relu", "-s", 0)
    assert "1 cell to run, 0 done before, 0 skipped" in said.out
    assert re.search(r"^1 done in", said.out, re.MULTILINE)


def test_a_timeout_is_told(write: Write, bbn: Bbn) -> None:
    write(defense="no_defense", epochs=100_000, rest="budget: {cell_timeout: 2s}\n")
    said = bbn("run")
    assert said.code == 1
    assert re.search(r"^TIMEOUT .*no_defense.* - the time limit", said.out, re.MULTILINE)


def test_a_network_that_does_not_train_is_a_failed_cell(write: Write, bbn: Bbn) -> None:
    write(defense="no_defense, none", dataset="{name: digits, params: {image_size: 8}, recipe: {lr: 1.0e-9}}")
    said = bbn("run", "-q")
    assert said.code == 1
    assert len(re.findall(r"^FAILED .*failed to train: the loss stayed at chance", said.out, re.MULTILINE)) >= 2
    assert "[1] failed: failed to train" in said.out


def test_a_damaged_artifact_is_told(write: Write, bbn: Bbn, tmp_path: Path) -> None:
    (cell,) = load(write()).cells
    bbn("run")
    store = Store(tmp_path / "results")
    path = store.find_artifact("poison", poison_key(cell))
    assert path is not None
    path.write_bytes(path.read_bytes()[:-1])
    store.record_path(record_key(cell)).unlink()
    defense = store.find_artifact("defense", defense_key(cell))
    assert defense is not None
    defense.unlink()
    said = bbn("run")
    assert said.code == 0
    assert re.search(f"poison {poison_key(cell)} is damaged", said.out + said.err)


SELECTIONS = {
    "-a clean": {"clean"},
    "-a bad* -m mlp": {"badnets"},
    "-d untrained --dataset digits --activation relu -s 0": {"clean", "badnets"},
    "-k clean": {"clean"},
    "-k 'not clean and (mlp or vgg11)'": {"badnets"},
}


@pytest.mark.parametrize("options", SELECTIONS)
@pytest.mark.parametrize("verb", ["plan -v", "status", "table --format csv"])
def test_selections(verb: str, options: str, write: Write, bbn: Bbn) -> None:
    write(attack="clean, badnets", activation="relu, elu", seeds="0, 1")
    said = bbn(*verb.split(), *shlex.split(options))
    assert said.code == 0
    if verb.startswith("table"):
        assert {row["attack"] for row in csv.DictReader(io.StringIO(said.out))} == SELECTIONS[options]
    elif verb.startswith("plan"):
        assert set(re.findall(r"digits/(\w+)/", said.out)) == SELECTIONS[options]


def test_run_a_selection(write: Write, bbn: Bbn, tmp_path: Path) -> None:
    plan = load(write(attack="clean, badnets", activation="relu, elu"))
    assert bbn("run", "-a", "clean", "--activation", "elu").code == 0
    (wanted,) = (record_key(cell) for cell in plan.cells if "clean" in cell.title and "elu" in cell.title.split("/"))
    assert [record.key for record in Store(tmp_path / "results").records()] == [wanted]


@pytest.mark.parametrize("verb", ["plan", "run", "status", "table"])
def test_nothing_selected(verb: str, write: Write, bbn: Bbn) -> None:
    write()
    said = bbn(verb, "-k", "nowhere")
    assert said.code == 5
    assert said.err.startswith("error: no cell of 1 is selected\nhint: ")


# status, table, results


@pytest.fixture
def recorded(write: Write, tmp_path: Path, make_record: MakeRecord) -> list[Cell]:
    """badnets and clean x untrained and broken: done, failed, done, missing."""
    cells = load(write(attack="badnets, clean", defense="untrained, broken")).cells
    store = Store(tmp_path / "results")
    store.write_record(make_record(record_key(cells[0]), ba=90, asr=25, clean_fraction=0.05))
    store.write_record(Record.of(cells[1], record_key(cells[1]), "failed", reason="ValueError: <b> & more"))
    store.write_record(make_record(record_key(cells[2]), ba=95, asr=None))
    return cells


def test_status(recorded: list[Cell], bbn: Bbn) -> None:
    said = bbn("status")
    assert said.code == 0
    assert "4 cells, 2 done, 1 failed, 1 left" in said.out
    assert f"FAILED {record_key(recorded[1])}  {recorded[1].title} - ValueError: <b> & more" in said.out


@pytest.mark.usefixtures("recorded")
def test_table_json(bbn: Bbn) -> None:
    rows = json.loads(bbn("table", "--format", "json").out)
    assert [row["status"] for row in rows] == ["done", "failed", "done", "missing"]
    expected = {"dataset": "digits", "attack": "badnets", "defense": "untrained", "architecture": "mlp",
                "activation": "relu", "seeds": [0], "ba": 0.9, "asr": 0.25, "ra": 0.25, "status": "done"}  # fmt: skip
    assert expected.items() <= rows[0].items()
    assert (rows[1]["reason"], rows[1]["ba"]) == ("ValueError: <b> & more", None)


@pytest.mark.usefixtures("recorded")
def test_table_csv(bbn: Bbn) -> None:
    rows = list(csv.DictReader(io.StringIO(bbn("table", "--format", "csv").out)))
    assert [(row["status"], row["ba"], row["asr"]) for row in rows] == [
        ("done", "0.9", "0.25"), ("failed", "", ""), ("done", "0.95", ""), ("missing", "", ""),
    ]  # fmt: skip


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("form", ["terminal", "markdown", "latex", "html"])
def test_table_shows_numbers_and_what_is_not_there(form: str, bbn: Bbn) -> None:
    said = bbn("table", "--format", form)
    assert said.code == 0
    for text in (
        "90.0 / 25.0",
        "95.0 / --" if form == "latex" else "95.0 / –",
        "failed [1]",
        "missing [2]",
        "[1] failed: ValueError",
        "[2] missing: not run",
    ):
        assert text in said.out
    assert re.search(r"untrained was given 5 \\?% of the training set as clean data", said.out)
    assert "BA benign accuracy" in said.out


@pytest.mark.usefixtures("recorded")
def test_latex_is_a_booktabs_table(bbn: Bbn) -> None:
    said = bbn("table", "--format", "latex").out
    for text in (r"\begin{tabular}", r"\toprule", r"\midrule", r"\bottomrule", r"\end{tabular}"):
        assert text in said


@pytest.mark.usefixtures("recorded")
def test_html_is_escaped(bbn: Bbn) -> None:
    assert "&lt;b&gt; &amp; more" in bbn("table", "--format", "html").out


@pytest.mark.usefixtures("recorded")
def test_table_of_all_records(bbn: Bbn, tmp_path: Path) -> None:
    (tmp_path / "benchmark.yaml").unlink()
    rows = json.loads(bbn("table", "--all", "--format", "json").out)
    assert len(rows) >= 2


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("form", ["terminal", "markdown", "latex", "csv", "json", "html"])
def test_table_of_no_records(form: str, bbn: Bbn) -> None:
    assert bbn("table", "--all", "--format", form).code == 0


def test_a_wide_table_is_whole_without_a_terminal(
    write: Write, bbn: Bbn, tmp_path: Path, make_record: MakeRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = [f"defense_number_{number}" for number in range(8)]
    entries = ", ".join(f"{{name: untrained, params: {{number: {label[-1]}}}, as: {label}}}" for label in labels)
    for cell in load(write(attack="clean, badnets", defense=entries)).cells:
        Store(tmp_path / "results").write_record(make_record(record_key(cell), ba=91, asr=77))
    monkeypatch.delenv("COLUMNS")
    said = bbn("table").out
    assert said.count("91.0 / 77.0") == 16
    assert all(label in said for label in labels)


def test_a_label_with_brackets_stands_in_the_title(write: Write, bbn: Bbn) -> None:
    write(architecture="{name: mlp, params: {depth: 1}, sweep: {hidden: [8]}}")
    assert "mlp[hidden=8]" in bbn("table").out


def test_a_small_share_of_clean_data_is_not_shown_as_none(
    write: Write, bbn: Bbn, tmp_path: Path, make_record: MakeRecord
) -> None:
    (cell,) = load(write()).cells
    Store(tmp_path / "results").write_record(make_record(record_key(cell), clean_fraction=0.004))
    assert "0.4 % of the training set as clean data" in bbn("table").out


def test_results_show(recorded: list[Cell], bbn: Bbn) -> None:
    key = record_key(recorded[0])
    said = bbn("results", "show", key[:8])
    assert said.code == 0
    for text in (key, "0.9000 = 90 of 100", "0.2500 = 25 of 100", "1.00 s"):
        assert text in said.out
    whole = json.loads(bbn("results", "show", key[:8], "--json").out)
    assert (whole["schema"], whole["key"], whole["counts"]["benign_accuracy"]["hits"]) == (1, key, 90)


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("prefix", ["zz", "*", ""])
def test_results_show_unknown(prefix: str, bbn: Bbn) -> None:
    fault(bbn("results", "show", prefix), "there is no record", ".")


@pytest.mark.usefixtures("here")
def test_results_show_without_results(bbn: Bbn) -> None:
    fault(bbn("results", "show", "ab"), "there is no record 'ab' in 'results'", "bbn run")


@pytest.mark.parametrize("options", ["", "--results elsewhere", "other.yaml"])
def test_the_commands_a_run_suggests_work_as_printed(options: str, write: Write, bbn: Bbn) -> None:
    """Also with another folder, in the file or on the command line, and with another file."""
    write(file="other.yaml" if "other" in options else "benchmark.yaml", defense="broken",
          rest="" if "elsewhere" in options else "results: out\n")  # fmt: skip
    said = bbn("run", *options.split())
    ((look, again),) = re.findall(r"^look: bbn (.*?)    again: bbn (.*)$", said.out, re.MULTILINE)
    assert "it broke" in bbn(*shlex.split(look)).out
    assert "FAILED" in bbn(*shlex.split(again)).out


# faults of the user


FAULTS = {
    "run nofile.yaml": ("there is no file 'nofile.yaml'", ""),
    "run --device foo": ("device 'foo'", "."),
    "run --device cuda:x": ("device 'cuda:x'", "."),
    "run --device meta": ("device 'meta'", "."),
    "run --device cuda:99": ("there is no device 'cuda:99'", "--device cpu"),
    "run -k 'a + b'": ("'a \\+ b' is not an expression", "and, or, not"),
    "rnu": ("unknown command 'rnu'", "did you mean 'run'"),
    "reslts show x": ("unknown command 'reslts'", "did you mean 'results'"),
}


@pytest.mark.parametrize("command", FAULTS)
def test_faults_of_the_command_line(command: str, write: Write, bbn: Bbn) -> None:
    write()
    fault(bbn(*shlex.split(command)), *FAULTS[command])


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("verb", ["plan", "run", "status", "table"])
def test_no_benchmark_file(verb: str, bbn: Bbn) -> None:
    fault(bbn(verb), "there is no file 'benchmark.yaml'", "bbn init")


@pytest.mark.parametrize("command", ["run --nope", "run -j 0", "run --only some", "table --format pdf", "results show"])
def test_wrong_options(command: str, write: Write, bbn: Bbn) -> None:
    write()
    said = bbn(*command.split())
    assert said.code == 2
    assert "Traceback" not in said.err
    assert "error:" in said.err.lower()


def test_results_folder_that_is_a_file(write: Write, bbn: Bbn, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    said = bbn("run", "--results", "taken")
    assert said.code == 2
    assert "taken" in said.err
    assert "Traceback" not in said.err
    write(rest="results: taken\n")
    fault(bbn("run"), "'taken' cannot be written", "--results")
    assert (tmp_path / "taken").read_text() == "mine"


def test_faults_of_the_file_stand_with_line_and_column_all_at_once(write: Write, bbn: Bbn, tmp_path: Path) -> None:
    write(defense="nnoe", activation="relu", rest="bugdet: {}\n", architecture="{name: mlp, params: {hiden: 3}}")
    said = bbn("run")
    fault(said, r"benchmark.yaml:11:9: bugdet: unknown key, did you mean 'budget'")
    write(defense="nnoe", architecture="{name: mlp, params: {hiden: 3}}")
    said = bbn("run")
    fault(said, r"benchmark.yaml:7:\d+: .*unknown defense 'nnoe'.*did you mean 'none'")
    fault(said, r"benchmark.yaml:8:\d+: .*hiden.*did you mean 'hidden'")
    assert not (tmp_path / "results").exists()


def test_an_absent_data_set_is_an_error_before_any_work(
    write: Write, bbn: Bbn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(dataset="{name: npz, params: {path: nothing.npz}}")
    said = bbn("run")
    assert said.code == 2
    assert "Traceback" not in said.err
    assert "nothing.npz" in said.err
    assert not (tmp_path / "results").exists()


# the real console


def console(*arguments: str, cwd: Path) -> Said:
    bbn = Path(sys.executable).parent / "bbn"
    done = subprocess.run([bbn, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120, check=False)
    return Said(done.returncode, done.stdout, done.stderr)


def test_console_version_and_unknown_command(tmp_path: Path) -> None:
    assert re.fullmatch(r"bbn, version \S+\n", console("--version", cwd=tmp_path).out)
    fault(console("tabel", cwd=tmp_path), "unknown command 'tabel'", "did you mean 'table'")


def test_console_warns_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "bbnfile.py").write_text("1 / 0")
    said = console("list", "attacks", cwd=tmp_path)
    assert said.code == 0
    assert "badnets" in said.out
    assert said.err.count("\n") == 1
    assert re.match("warning: plugin 'bbnfile'.*ZeroDivisionError", said.err)


def test_console_help_names_every_verb(tmp_path: Path) -> None:
    said = console("--help", cwd=tmp_path)
    assert said.code == 0
    for verb in ("init", "list", "show", "plan", "run", "status", "table", "results", "paper", "doctor"):
        assert re.search(rf"^  {verb} ", said.out, re.MULTILINE)


def test_show_lists_the_parameters_of_a_parameter(bbn: Callable[..., Said]) -> None:
    out = bbn("show", "label_consistent").out
    assert re.search(r"crafter\.epsilon +0 ≤ number ≤ 255, default 8\.0: Linf bound", out)
    assert re.search(r"crafter +mapping, default .*: the adversarially trained network", out)


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [{"PYTHONIOENCODING": "latin-1"}, {"PYTHONIOENCODING": "cp1252"}, {"PYTHONIOENCODING": "ascii"},
     {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
    ids=["latin-1", "cp1252", "ascii", "C"],
)  # fmt: skip
def test_output_of_any_encoding(environment: dict[str, str], write_benchmark: Callable[..., Path]) -> None:
    """What an encoding lacks is shown as a question mark; `none`'s parameters have a sign for "at most"."""
    write_benchmark(attack="{name: badnets, as: größer 漢}")
    program = str(Path(sys.executable).with_name("bbn"))
    verbs = (["show", "none"], ["show", "badnets"], ["list"], ["doctor"], ["plan"], ["run"], ["table"], ["status"])
    for verb in verbs:
        done = subprocess.run([program, *verb], capture_output=True, env={**os.environ, **environment}, timeout=120)
        assert done.returncode == 0, (verb, done.stderr)
        assert b"Traceback" not in done.stderr
