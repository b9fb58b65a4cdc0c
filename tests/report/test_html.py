"""The report as a text: its size, its bytes, and what strangers' texts and numbers become in it."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from markupsafe import escape
from synthetic import parse, synthetic_records, write_records

from backdoor_bench_none.contracts.measures import Count, Counts
from backdoor_bench_none.contracts.record import AxisValue, Cost, Failure, Record
from backdoor_bench_none.planning.plan import Plan, make_plan
from backdoor_bench_none.planning.stage_table import record_key
from backdoor_bench_none.registry.components import Registry
from backdoor_bench_none.report.html import previews as html_previews
from backdoor_bench_none.report.html import summary
from backdoor_bench_none.report.html.build import SCRIPTS, build_report
from backdoor_bench_none.report.html.colours import STEPS, colour_of, contrast, step_of, text_on
from backdoor_bench_none.report.html.data import embed, shorten
from backdoor_bench_none.report.html.previews import Preview
from backdoor_bench_none.report.html.source import Source, source_of_plan
from backdoor_bench_none.report.html.texts import clean_line, clean_lines, show_number
from backdoor_bench_none.results.metrics import METRICS

MakeRecord = Callable[..., Record]
MakeSource = Callable[[Sequence[Record]], Source]
HOSTILE = (
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "javascript:alert(1)",
    "<!--<script>",
    "]]>{{ 7*7 }}{% raw %}&lt;b&gt;",
)
PACKAGE = Path(html_previews.__file__).parent


class Tags(HTMLParser):
    """All tags and attributes, and whether scripts hold what they should."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def check_harmless(page: str) -> None:
    """Nothing in `page` runs but our one script, and nothing loads."""
    tags = Tags(page).tags
    scripts = [attributes for tag, attributes in tags if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "data"}, {}]
    assert not [tag for tag, _ in tags if tag in ("img", "iframe", "object", "link", "base", "embed")]
    attributes = [(name, value) for _, attrs in tags for name, value in attrs.items()]
    assert not [name for name, _ in attributes if name.startswith("on") or name in ("style", "src", "srcdoc", "action")]
    assert all(str(value).startswith("#") for name, value in attributes if name == "href")


# size and bytes


def test_a_thousand_cells_are_less_than_two_megabytes(make_record: MakeRecord, make_source: MakeSource) -> None:
    source = make_source(synthetic_records(make_record, 1000))
    pairs = {(row.dataset, row.attack) for row in source.rows}
    previews = {pair: Preview("data:image/png;base64," + "A" * (390_000 // len(pairs)), "a picture") for pair in pairs}
    page = build_report(source, previews)
    assert len(source.rows) == 1000
    assert sum(len(preview.source) for preview in previews.values()) > 0.9 * html_previews.BUDGET
    assert 500_000 < len(page.encode()) < 2_000_000


def test_equal_input_makes_equal_bytes(make_record: MakeRecord, make_source: MakeSource) -> None:
    records = synthetic_records(make_record, 48)
    assert build_report(make_source(records)) == build_report(make_source(records))


def test_what_cells_share_stands_once(make_record: MakeRecord, make_source: MakeSource) -> None:
    page = build_report(make_source(synthetic_records(make_record, 200)))
    assert page.count("NVIDIA H100") == 2  # in the header and in the data
    assert len(parse(page)["blocks"]) < 100


def test_outcomes_are_left_out(make_record: MakeRecord, make_source: MakeSource) -> None:
    record = make_record(outcomes={"benign": "ABCDEFGH", "attacked": None})
    assert "ABCDEFGH" not in build_report(make_source([record]))


def test_curves_have_sixty_points_of_four_digits() -> None:
    curve = shorten([2 + math.sin(epoch) / 7 for epoch in range(1000)])
    assert len(curve) == 60
    assert (curve[0], curve[-1]) == (2.0, float(f"{2 + math.sin(999) / 7:.4g}"))
    assert all(value == float(f"{value:.4g}") for value in curve if value is not None)
    assert shorten([1.23456]) == (1.235,)
    assert shorten([]) == ()
    assert shorten([1.0, math.nan, math.inf]) == (1.0, None, None)


# strangers' texts


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_labels_are_texts(text: str, make_record: MakeRecord, make_source: MakeSource) -> None:
    axes = {axis: f"{text}{axis}" for axis in ("dataset", "attack", "defense", "architecture", "activation", "trainer")}
    seeds = [make_record(f"{seed:016x}", seed=seed, axes=axes) for seed in range(2)]
    other = make_record("f" * 16, axes={"defense": "other"})
    page = build_report(make_source([*seeds, other]))
    check_harmless(page)
    assert f"<bdi>{escape(clean_line(text))}attack</bdi>" in page
    assert f"{clean_line(text)}attack" in parse(page)["labels"]["attack"]


@pytest.mark.parametrize("text", HOSTILE)
def test_every_other_text_of_a_record_is_a_text(text: str, make_record: MakeRecord, make_source: MakeSource) -> None:
    params = AxisValue(name=text, label="badnets", revision=1, params={text: text, "list": [text]})
    record = make_record(
        reason=text, warnings=[text], extras={text: {text: text}}, metrics={text: 1.0}, triggers=[{text: text}],
        provenance={text: text, "device": text, "libraries": {"torch": text}, "providers": {text: text}},
        seconds={text: 1.0},
    )  # fmt: skip
    record = record.model_copy(
        update={"axes": {**record.axes, "attack": params}, "recipe": {text: text}, "title": text}
    )
    failed = make_record(
        "e" * 16, ba=None, status="failed", reason=text, axes={"defense": "abl"},
        failure=Failure(type=text, message=text, traceback=text),
    )  # fmt: skip
    source = make_source([record, failed])
    page = build_report(
        Source(text, source.rows, source.groups, Path(text)), {("digits", "badnets"): Preview("", text)}
    )
    check_harmless(page)
    assert text in parse(page)["texts"]
    assert f"<h1><bdi>{escape(text)}</bdi></h1>" in page


def test_data_cannot_end_its_script() -> None:
    made = embed({"a": "</script><!--\u2028&", "b": "\ud800"})
    assert made.isascii()
    assert not set("<>&") & set(made)


def test_scripts_make_no_markup_of_texts() -> None:
    for name in SCRIPTS:
        script = (PACKAGE / name).read_text()
        for word in (
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "Function(",
            ".href",
            "fetch(",
        ):
            assert word not in script
        assert "</script" not in script


def test_only_our_script_and_style_may_run(make_record: MakeRecord, make_source: MakeSource) -> None:
    page = build_report(make_source([make_record()]))
    policy = html.unescape(page.split('Content-Security-Policy" content="')[1].split('"')[0])
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    assert "http" not in policy


def test_control_characters_and_directions_are_replaced() -> None:
    assert clean_line("a\x1b[31m\u202eb\nc\td\ud800") == "a�[31m�b c d�"
    assert clean_line("x" * 2000) == "x" * 999 + "…"
    assert clean_lines("one\n\ttwo\x00") == "one\n    two�"
    assert clean_lines("a" * 5000 + "end").endswith("end")
    assert len(clean_lines("a" * 5000)) == 4000


# strangers' numbers


def test_huge_counts_are_shown_and_larger_ones_refused(make_record: MakeRecord, make_source: MakeSource) -> None:
    whole = Count(hits=2**40, total=2**40)
    counts = Counts(benign_accuracy=whole, attack_success_rate=whole, robust_accuracy=None)
    page = build_report(make_source([make_record(ba=None, counts=counts)]))
    assert parse(page)["rows"][0]["trials"][0]["counts"] == ["1,099,511,627,776 of 1,099,511,627,776"] * 2 + ["–"]


@pytest.mark.parametrize(
    ("part", "value"), [("total", "1e400"), ("total", str(2**41)), ("hits", "NaN"), ("hits", "-1")]
)
def test_counts_that_are_none_are_refused(
    part: str, value: str, make_record: MakeRecord, tmp_path: Path, bbn: Callable[..., Any]
) -> None:
    write_records(synthetic_records(make_record, 2), tmp_path / "results")
    path = min((tmp_path / "results" / "records").glob("*/*.json"))
    path.write_text(re.sub(rf'"{part}": \d+', f'"{part}": {value}', path.read_text(), count=1))
    with pytest.warns(UserWarning, match="cannot be read and counts as missing"):
        said = bbn("report", "--all", "--results", tmp_path / "results", "--output", tmp_path / "out.html")
    assert said.code == 0
    assert len(parse((tmp_path / "out.html").read_text())["rows"]) == 1


def test_huge_numbers_do_not_fill_the_page(make_record: MakeRecord, make_source: MakeSource) -> None:
    record = make_record(seconds={"defense": 1e308, "victim": 1.0})
    page = build_report(make_source([record.model_copy(update={"victim_losses": [2.5, 1e300]})]))
    data = parse(page)
    assert "e+308" in str(data["rows"])
    assert data["curves"] == [[2.5, 1e300]]
    assert not re.search(r"\d{40}", page)
    assert "NaN" not in page.split('id="data">')[1].split("</script>")[0]


def test_numbers_as_shown() -> None:
    seconds = METRICS["seconds"]
    assert show_number(1e308, seconds) == "1e+308"
    assert [show_number(value, seconds) for value in (math.nan, math.inf, None)] == ["–"] * 3
    assert show_number(-0.001, seconds) == "0.0"
    assert show_number(0.912, METRICS["ba"]) == "91.2"
    assert show_number(10**400, METRICS["peak_memory"]) == "–"


# colours


def test_text_on_every_colour_can_be_read() -> None:
    assert all(contrast(colour_of(step), text_on(colour_of(step))) >= 4.5 for step in range(STEPS + 1))


def test_colours_run_evenly_from_dark_to_bright() -> None:
    black = [contrast(colour_of(step), (0, 0, 0)) for step in range(STEPS + 1)]
    assert black == sorted(black)
    assert (step_of(0.0, False), step_of(1.0, False), step_of(1.0, True), step_of(7.0, False)) == (0, STEPS, 0, STEPS)


# words


def test_the_summary_says_who_is_best_and_how_sure_that_is(make_record: MakeRecord, make_source: MakeSource) -> None:
    numbers = {"none": [(91, 2), (92, 4), (90, 3)], "nad": [(80, 3), (82, 9), (81, 2)], "no_defense": [(93, 99)] * 3}
    records = [
        make_record(f"{len(defense)}{seed}{'0' * 14}", ba=ba, asr=asr, seed=seed, axes={"defense": defense})
        for defense, seeds in numbers.items()
        for seed, (ba, asr) in enumerate(seeds)
    ]
    best = dict(summary.describe_best(make_source(records).rows))
    assert best["BA ↑"] == "'none' is highest: 91.0 % (95 %: 88.5 to 93.5)"
    assert best["ASR ↓"].startswith("'none' is lowest: 3.0 % (95 %: 0.5 to 5.5). There another is not distinguishable")
    assert set(best) == {"ASR ↓", "BA ↑", "DER ↑"}


def test_the_summary_warns(make_record: MakeRecord, make_source: MakeSource) -> None:
    records = [
        make_record("1" * 16, axes={"defense": "oracle"}, sees_ground_truth=True, provenance={"device": "one"}),
        make_record("2" * 16, axes={"defense": "nad"}, clean_fraction=0.05, provenance={"device": "two"}),
        make_record("3" * 16, axes={"defense": "no_defense"}, asr=3),
    ]
    cautions = "\n".join(summary.describe_cautions(make_source(records)))
    for text in (
        "3 of 3 combinations rest on one seed",
        "'oracle': told which",
        "'nad': given 5 %",
        "In 1 combination ",
    ):
        assert text in cautions
    assert "2 different settings" in cautions


def test_cells_without_numbers_are_listed_with_reasons(tiny_plan: Callable[..., Plan], tmp_path: Path) -> None:
    plan = tiny_plan(defense="no_defense, nad", seeds="0, 1")
    source = source_of_plan(plan, tmp_path / "results", tmp_path / "benchmark.yaml")
    page = build_report(source)
    reasons = {(group.status, group.reason): group.count for group in summary.group_failures(source)}
    assert reasons == {
        ("skipped", "nad: a network without convolutions has no attention map"): 2, ("missing", "not run yet"): 2,
    }  # fmt: skip
    assert "Of 4 cells, 0 have numbers, 2 were skipped, 2 are missing" in page
    assert "a network without convolutions has no attention map" in re.sub(r"(?s)<script.*", "", page)


def test_no_records() -> None:
    page = build_report(Source("nothing", [], []))
    assert "No cells." in page
    assert "Of 0 cells" in page


def test_the_matrix_is_there_without_javascript(make_record: MakeRecord, make_source: MakeSource) -> None:
    records = [make_record("1" * 16, ba=91, asr=7), make_record("2" * 16, axes={"defense": "nad"}, ba=82, asr=30)]
    table = build_report(make_source(records)).split('<table id="matrix">')[1].split("</table>")[0]
    assert re.findall(r"</span>([\d.]+)<", table) == ["82.0", "30.0", "91.0", "7.0"]
    assert table.count('scope="col"') == 3
    assert table.count('scope="row"') == 1
    assert f'class="tile v{step_of(0.07, True)} best"' in table


# bbn report


def test_bbn_report(write_benchmark: Callable[..., Path], bbn: Callable[..., Any], make_record: MakeRecord) -> None:
    path = write_benchmark(seeds="0, 1")
    plan = make_plan(path, Registry.default(path.parent))
    for cell in plan.cells:
        counts = {"benign_accuracy": {"hits": 90, "total": 100}, "attack_success_rate": None, "robust_accuracy": None}
        costs = {"defense": Cost(seconds=1)}
        record = Record.of(cell, record_key(cell), "done", counts=counts, costs=costs, victim_losses=[2.0, 1.0])
        write_records([record], path.parent / "results")
    said = bbn("report", path, "--output", "out/report.html")
    assert said.code == 0, said.err
    assert "4 of 4 cells have numbers" in said.out
    data = parse(Path("out/report.html").read_text())
    assert [row["status"] for row in data["rows"]] == ["done"] * 2
    assert data["curves"] == [[2.0, 1.0]]
    assert next(iter(data["previews"].values()))[0].startswith("data:image/png")
    before = Path("out/report.html").read_bytes()
    assert bbn("report", path, "--output", "out/report.html").code == 0  # its own file may be replaced
    assert Path("out/report.html").read_bytes() == before
    assert bbn("report", path, "-d", "none", "--no-previews").code == 0
    assert [*parse(Path("report.html").read_text())["labels"]["defense"]] == ["none"]


def test_bbn_report_of_all_records(make_record: MakeRecord, tmp_path: Path, bbn: Callable[..., Any]) -> None:
    folder = write_records(synthetic_records(make_record, 32), tmp_path / "results")
    said = bbn("report", "--all", "--results", folder, "--output", tmp_path / "a.html", "-a", "badnets", "-d", "n*")
    assert said.code == 0, said.err
    data = parse((tmp_path / "a.html").read_text())
    assert data["labels"]["defense"] == ["nad", "no_defense", "none"]
    assert data["previews"]  # cifar10 of these records may not be here, and then there is a reason


def test_a_path_that_cannot_be_written(write_benchmark: Callable[..., Path], bbn: Callable[..., Any]) -> None:
    path = write_benchmark()
    Path("file").write_text("mine")
    Path("folder").mkdir()
    for output in ("file/report.html", "folder"):
        said = bbn("report", path, "--no-previews", "--output", output)
        assert said.code == 2
        assert re.search(r"^error: .*cannot be written", said.err, re.MULTILINE)
        assert "hint: choose another file with --output" in said.err
    assert Path("file").read_text() == "mine"
    assert not [p for p in Path().iterdir() if p.name.startswith(".folder")]


def test_nothing_is_selected(write_benchmark: Callable[..., Path], bbn: Callable[..., Any]) -> None:
    assert bbn("report", write_benchmark(), "-d", "absent").code == 5
