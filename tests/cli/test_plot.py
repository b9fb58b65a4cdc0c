"""`bbn plot` on a real run: what the pictures say of its records, and what is told of what cannot be drawn."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from backdoor_bench_none.cli.main import run_cli
from backdoor_bench_none.contracts.context import Context
from backdoor_bench_none.contracts.network import Pixels
from backdoor_bench_none.inspection.neurons import collect_activations, find_layers
from backdoor_bench_none.maths.natural_break import find_breaks
from backdoor_bench_none.planning.plan import Plan, make_plan
from backdoor_bench_none.planning.stage_table import defense_key, record_key
from backdoor_bench_none.registry.components import Registry
from backdoor_bench_none.report.plots.activations import compare_values, read_activations
from backdoor_bench_none.report.plots.finished import open_cell
from backdoor_bench_none.report.plots.scores import read_scores
from backdoor_bench_none.report.plots.triggers import make_sheets
from backdoor_bench_none.results.store import DamagedArtifactWarning, Store

#: labels hold what matplotlib, XML and a terminal would read as commands
BENCHMARK = r"""
version: 1
name: tiny
seeds: [0, 1]
matrix:
  dataset: [{name: digits, params: {image_size: 8}}]
  attack: [clean, badnets, {name: badnets, as: "$x_1$<b>é", sweep: {poison_rate: [0.02, 0.1]}}]
  defense: [no_defense, {name: none, params: {epochs: 1}}]
  architecture: [{name: mlp, params: {hidden: 16, depth: 2}}]
  activation: [relu]
defaults: {dataset: {digits: {recipe: {epochs: 2}}}}
"""
#: -a badnets would also be the others, whose name is badnets
ONE = ("-k", "badnets", "-d", "none", "-s", 0)
KINDS = {
    "scatter": (), "matrix": (), "curve": (), "sweep": ("--x", "attack.poison_rate", "-a", "$x*"),
    "activations": ONE, "triggers": (), "scores": ONE,
}  # fmt: skip


class Said(NamedTuple):
    code: int
    out: str
    err: str


Bbn = Callable[..., Said]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the benchmark file and its results."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "benchmark.yaml").write_text(BENCHMARK)
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert run_cli(["run", "-q"]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def here(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The results, looked at from an empty folder; the benchmark file lies there."""
    shutil.copy(finished / "benchmark.yaml", tmp_path)
    (tmp_path / "results").symlink_to(finished / "results")
    monkeypatch.chdir(tmp_path)
    before = sorted((finished / "results").rglob("*.safetensors"))
    yield tmp_path
    assert sorted((finished / "results").rglob("*.safetensors")) == before  # nothing was computed


@pytest.fixture
def plan(here: Path) -> Plan:
    return make_plan(here / "benchmark.yaml", Registry.default(here))


@pytest.fixture
def one(plan: Plan) -> Plan:
    """The cell of `ONE`."""
    return plan.select(lambda c: (c.attack.label, c.defense.label, c.seed) == ("badnets", "none", 0))


def texts(path: Path) -> list[str]:
    return ["".join(text.itertext()) for text in ET.parse(path).getroot().iter("{http://www.w3.org/2000/svg}text")]


def fault(said: Said, message: str, hint: str = "", code: int = 2) -> None:
    """`said` tells of a user's fault: on stderr, with a hint, without a traceback."""
    assert (said.code, said.out) == (code, ""), said
    assert "Traceback" not in said.err
    assert re.search(f"^error: .*{message}", said.err, re.MULTILINE), said.err
    assert not hint or re.search(f"^hint: .*{hint}", said.err, re.MULTILINE), said.err


# pictures


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_in_every_format(kind: str, bbn: Bbn) -> None:
    for suffix, start in (("svg", b"<?xml"), ("pdf", b"%PDF"), ("png", b"\x89PNG")):
        path = Path(f"deep/er/out.{suffix}")
        said = bbn("plot", kind, *KINDS[kind], "--output", path)
        assert (said.code, said.out) == (0, f"wrote {path}\n"), said.err
        assert path.read_bytes().startswith(start)
    again = bbn("plot", kind, *KINDS[kind], "--output", "again.png")
    assert again.code == 0
    assert Path("again.png").read_bytes() == Path("deep/er/out.png").read_bytes()
    with Image.open("deep/er/out.png") as picture:
        assert picture.width >= 600
        assert np.asarray(picture.convert("L")).std() > 5  # not empty


@pytest.mark.usefixtures("here")
@pytest.mark.slow
def test_another_process_writes_the_same_bytes(bbn: Bbn, tmp_path: Path) -> None:
    assert bbn("plot", "scatter", "--output", "here.pdf").code == 0
    code = "import sys; from backdoor_bench_none.cli.main import run_cli; sys.exit(run_cli(sys.argv[1:]))"
    arguments = ["plot", "scatter", "--all", "--output", "there.pdf"]
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    assert bbn(*arguments[:-1], "here.pdf").code == 0
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, env=environment, cwd=tmp_path)
    assert Path("here.pdf").read_bytes() == Path("there.pdf").read_bytes()


@pytest.mark.usefixtures("here")
def test_default_name(bbn: Bbn) -> None:
    assert bbn("plot", "matrix").out == "wrote matrix.png\n"


def test_matrix_shows_the_records(here: Path, bbn: Bbn) -> None:
    assert bbn("plot", "matrix", "-s", 0, "--output", "m.svg").code == 0
    said = texts(here / "m.svg")
    records = [record for record in Store(here / "results").records() if record.seed == 0]
    assert len(records) == 8
    for record in records:
        assert record.counts is not None
        assert f"{100 * record.counts.benign_accuracy.rate:.1f}" in said
        if record.counts.attack_success_rate is not None:
            assert f"{100 * record.counts.attack_success_rate.rate:.1f}" in said
    assert "$x_1$<b>é[poison_rate=0.02]" in said
    assert {"no_defense", "none", "clean", "badnets"} <= set(said)
    assert said.count("–") == 2  # the ASR of no attack


def test_scatter_of_two_other_metrics(here: Path, bbn: Bbn) -> None:
    assert bbn("plot", "scatter", "--metric", "tpr, fpr", "-d", "none", "--output", "s.svg").code == 0
    assert {"TPR (%) ↑", "FPR (%) ↓", "badnets"} <= set(texts(here / "s.svg"))


def test_sweep_shows_the_parameter(here: Path, bbn: Bbn) -> None:
    assert bbn("plot", "sweep", *KINDS["sweep"], "--metric", "asr", "--output", "s.svg").code == 0
    said = texts(here / "s.svg")
    assert {"0.02", "0.1", "attack.poison_rate", "no_defense", "none"} <= set(said)
    assert said[-1] == "none"
    assert any("$x_1$<b>é" in text for text in said)


def test_curve_has_a_line_for_each_attack(here: Path, bbn: Bbn) -> None:
    assert bbn("plot", "curve", "--output", "c.svg").code == 0
    said = texts(here / "c.svg")
    assert {"clean", "badnets", "$x_1$<b>é[poison_rate=0.1]", "epoch"} <= set(said)
    assert "mean of 2 victims; bars: standard deviation" in said


# what looks at networks


def test_scores_are_those_of_the_defense_and_its_natural_break(here: Path, one: Plan, bbn: Bbn) -> None:
    store = Store(here / "results")
    scores = read_scores(open_cell(one, store))
    artifact = store.load_artifact("defense", defense_key(one.cells[0]))
    record = store.read_record(record_key(one.cells[0]))
    assert artifact is not None
    assert record is not None
    assert record.detection is not None
    everything = artifact.tensors["scores"].numpy()
    assert scores.cut == find_breaks(everything).thresholds[0]
    assert scores.is_break
    assert len(scores.poisoned) == record.upstream["poisoned_samples"] == 65
    assert sorted([*scores.benign, *scores.poisoned]) == sorted(everything)
    assert int((scores.poisoned > scores.cut).sum()) == record.detection.true_positive
    assert int((scores.benign > scores.cut).sum()) == record.detection.false_positive
    assert bbn("plot", "scores", *ONE, "--output", "s.svg").code == 0
    assert {f"natural break at {scores.cut:.4g}", "benign (1,232)", "poisoned (65)"} <= set(texts(here / "s.svg"))


def test_activations_are_those_of_the_network(here: Path, one: Plan, bbn: Bbn) -> None:
    stages = open_cell(one, Store(here / "results"))
    activations = read_activations(stages)
    info, samples = stages.cell.info, stages.poison()[1]
    assert activations.images == len(samples) == 450
    assert [layer.name for layer in activations.layers] == ["features.0", "features.2"]
    context, model = Context(torch.device("cpu"), 0), stages.network()
    pixels = Pixels.of(info, context.device)
    layers = find_layers(model, pixels.normalize(samples.images[:1]))
    values, _ = collect_activations(model, layers, "pre_activation", samples.images, pixels, context)
    assert (activations.layers[1].triggered == values["features.2"].numpy()).all()
    clean = pixels.normalize(stages.data()[1].images[samples.indices]).flatten(1)
    first = dict(model.named_modules())["features.0"]
    assert np.allclose(activations.layers[0].benign, first(clean).detach().numpy().T, atol=1e-5)
    assert bbn("plot", "activations", *ONE, "--layers", "*.2", "--output", "a.svg").code == 0
    said = texts(here / "a.svg")
    assert {"benign", "triggered", "share of the values (%)", "value of a neuron"} <= set(said)
    compared = compare_values(activations.layers[1])
    title = f"features.2, overlap {compared['overlap']:.2f}, AUROC {compared['auroc']:.2f}"
    assert title in " ".join(said)
    assert "features.0" not in " ".join(said)


def test_trigger_sheet_shows_what_the_attack_does(plan: Plan, bbn: Bbn) -> None:
    (sheet,), notes = make_sheets(plan.cells)
    assert [line.label for line in sheet.lines] == ["badnets"]
    assert notes == [
        "clean changes none of these images",
        *(f"$x_1$<b>é[poison_rate={rate}] looks like badnets" for rate in (0.02, 0.1)),
    ]
    line = sheet.lines[0]
    change = np.abs(line.images.astype(int) - sheet.originals.astype(int))
    assert change[:, :5].max() == 0
    assert change[:, -3:, -3:].max() > 0  # the corner
    assert line.gain == pytest.approx(255 / change.max())
    assert (line.difference == np.rint(change * line.gain)).all()
    said = bbn("plot", "triggers", "--output", "t.svg")
    assert said.err.splitlines() == [f"not shown: {note}" for note in notes]
    assert {"digits, benign", "badnets", f"× {line.gain:.3g}"} <= set(texts(Path("t.svg")))


def test_trigger_sheet_needs_no_results(bbn: Bbn, write_benchmark: Callable[..., Path]) -> None:
    write_benchmark(attack="badnets, blended, natural")
    said = bbn("plot", "triggers", "--output", "t.png")
    assert said.code == 0
    assert said.err == "not shown: natural finds its triggers in finished networks\n"
    assert not Path("results").exists()


# faults


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (("pie",), "'pie' is not one of", "bbn plot -h"),
        (("matrix", "--output", "m.jpg"), "'m.jpg' is not a picture", r"\.svg, \.pdf or \.png"),
        (("matrix", "--output", "benchmark.yaml/m.png"), "'benchmark.yaml/m.png' cannot be written", "--output"),
        (("matrix", "--metric", "ars"), "unknown metric 'ars'", "asr"),
        (("scatter", "--metric", "ba"), "1 metrics are given", ""),
        (("sweep",), "sweep needs --x", "defense.lr"),
        (("sweep", "--x", "defence.lr"), "unknown axis 'defence'", "did you mean 'defense'"),
        (("sweep", "--x", "attack.rate"), "has the parameter 'rate'", "poison_rate"),
        (("matrix", "--x", "attack.size"), "--x does not go with matrix", "sweep"),
        (("curve", "--metric", "ba"), "--metric does not go with curve", "scatter, matrix, sweep"),
        (("scores", "--layers", "a"), "--layers does not go with scores", "activations"),
        (("triggers", "--all"), "--all does not go with triggers", "scatter"),
        (
            ("scores",),
            "16 cells are selected.*: digits/clean/no_defense/mlp/relu/s0, .* and 10 more",
            "-a, -d, -m.* -k",
        ),
        (("scores", *ONE[:2], "-d", "no_defense", "-s", 0), "the defense 'no_defense' gives no scores", "bbn show"),
        (("activations", "-a", "clean", *ONE[2:]), "'clean' triggers no test image", "-a"),
        (("activations", *ONE, "--layers", "conv*"), "no layer matches 'conv", "features.0, features.2"),
        (("triggers", "-a", "clean"), "clean changes none of these images", "-a"),
        (("matrix", "absent.yaml"), "there is no file 'absent.yaml'", ""),
    ],
)
def test_faults(arguments: tuple[Any, ...], message: str, hint: str, bbn: Bbn) -> None:
    fault(bbn("plot", *arguments), message, hint)
    assert not list(Path.cwd().glob("*.png"))


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_selected(kind: str, bbn: Bbn) -> None:
    fault(bbn("plot", kind, *KINDS[kind], "-k", "absent"), "no cell of 16 is selected", "bbn plan", code=5)


def test_no_records_at_all(bbn: Bbn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fault(bbn("plot", "matrix", "--all"), "no record in 'results' is selected", "bbn table --all", code=5)


@pytest.mark.parametrize("kind", ["scatter", "matrix", "curve", "sweep", "activations", "scores"])
def test_before_the_run(kind: str, bbn: Bbn, write_benchmark: Callable[..., Path]) -> None:
    write_benchmark()
    message = {"curve": "none of 1 rows has the losses"}.get(kind, "not (been )?run")
    options = KINDS[kind][:2] if kind == "sweep" else ()
    fault(bbn("plot", kind, *options, "-d", "none"), message, "bbn run")
    assert not Path("results").exists()


@pytest.fixture
def mine(finished: Path, here: Path) -> Path:
    """A copy of the results that may be changed."""
    (here / "results").unlink()
    shutil.copytree(finished / "results", here / "results")
    return here / "results"


@pytest.mark.parametrize("kind", ["scores", "activations"])
def test_a_lost_artifact_is_not_computed_again(kind: str, mine: Path, one: Plan, bbn: Bbn) -> None:
    path = Store(mine).find_artifact("defense", defense_key(one.cells[0]))
    assert path is not None
    path.unlink()
    said = bbn("plot", kind, *ONE)
    fault(said, "the defense stage of digits/badnets/none/mlp/relu/s0 is not in 'results'", "bbn run --only all")
    assert "-a badnets -d none -s 0" in said.err
    assert Store(mine).find_artifact("defense", defense_key(one.cells[0])) is None


def test_a_damaged_artifact_is_not_computed_again(mine: Path, one: Plan, bbn: Bbn) -> None:
    path = Store(mine).find_artifact("defense", defense_key(one.cells[0]))
    assert path is not None
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(DamagedArtifactWarning):
        said = bbn("plot", "scores", *ONE)
    fault(said, "the defense stage", "bbn run")


def test_a_failed_cell(mine: Path, one: Plan, bbn: Bbn) -> None:
    store = Store(mine)
    record = store.read_record(record_key(one.cells[0]))
    assert record is not None
    store.write_record(record.model_copy(update={"status": "failed", "reason": "it\x07broke", "counts": None}))
    fault(bbn("plot", "scores", *ONE), "digits/badnets/none/mlp/relu/s0 is failed: it�broke", "bbn run")
    assert bbn("plot", "matrix", "-s", 0, "--output", "m.svg").code == 0
    assert "failed [1]" in texts(Path("m.svg"))


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"attack": "natural"}, "natural: this attack finds its triggers in finished networks"),
        ({"dataset": "blobs", "attack": "coordinate"}, "images of 2 channels cannot be shown"),
    ],
)
def test_attacks_without_a_picture(
    axes: dict[str, str], message: str, bbn: Bbn, write_benchmark: Callable[..., Path]
) -> None:
    write_benchmark(**axes)
    fault(bbn("plot", "triggers"), message, "choose")


BBNFILE = '''
from backdoor_bench_none.api import hookimpl, TriggerAttack

class Odd(TriggerAttack):
    """Breaks its preview."""

    def stamp(self, images, indices, info, seed):
        return images

    def preview(self, task, context):
        WHAT

@hookimpl
def bbn_attacks():
    return {"odd": Odd}
'''


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("raise KeyError('$')", "attack 'odd': preview: KeyError: '\\$'"),
        ("return task.data.images[:1]", "attack 'odd': preview returned torch.uint8"),
        ("return None", "attack 'odd': preview returned NoneType"),
    ],
)
def test_a_stranger_breaks_its_preview(
    what: str, message: str, bbn: Bbn, write_benchmark: Callable[..., Path], tmp_path: Path
) -> None:
    write_benchmark(attack="odd")
    (tmp_path / "bbnfile.py").write_text(BBNFILE.replace("WHAT", what))
    fault(bbn("plot", "triggers"), message)


def test_help_does_not_import_matplotlib() -> None:
    code = (
        "import sys; from backdoor_bench_none.cli.main import run_cli;"
        "run_cli(['plot', '-h']); print(sorted(sys.modules))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    assert "activations" in said.stdout
    assert "'matplotlib'" not in said.stdout
    assert "'torch'" not in said.stdout
