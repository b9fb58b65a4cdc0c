"""The report in headless Chromium: it works with mouse, keyboard and screen reader, and asks nobody for anything."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from synthetic import synthetic_records, write_records

from backdoor_bench_none.contracts.cell import AXES
from backdoor_bench_none.contracts.record import Cost, Failure, Record
from backdoor_bench_none.planning.plan import Plan
from backdoor_bench_none.planning.stage_table import record_key
from backdoor_bench_none.report.html.build import build_report
from backdoor_bench_none.report.html.previews import make_previews
from backdoor_bench_none.report.html.source import Source, source_of_plan

pytest.importorskip("selenium")
if TYPE_CHECKING:
    from conftest import Browser

MakeRecord = Callable[..., Record]
MakeSource = Callable[[Sequence[Record]], Source]
Open = Callable[..., "Browser"]
ESCAPE, ENTER, TAB, SPACE = "\ue00c", "\ue007", "\ue004", " "
CELLS = 240
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"


@pytest.fixture
def open_page(browser: Browser, tmp_path: Path) -> Open:
    """Writes a page and opens it; `alert` only counts its calls."""

    def open_it(page: str, name: str = "report.html") -> Browser:
        path = tmp_path / name
        path.write_text(page, encoding="utf-8")
        browser.open(path)
        return browser

    return open_it


@pytest.fixture(scope="module")
def pages() -> dict[int, str]:
    """Reports that were made before, by the number of their cells."""
    return {}


@pytest.fixture
def page(pages: dict[int, str], make_record: MakeRecord, make_source: MakeSource) -> str:
    """The report of 240 cells on one seed."""
    if CELLS not in pages:
        pages[CELLS] = build_report(make_source(synthetic_records(make_record, CELLS)))
    return pages[CELLS]


@pytest.fixture
def report(page: str, open_page: Open) -> Browser:
    """That report, open."""
    return open_page(page)


def choose(browser: Browser, control: str, value: str) -> None:
    browser.find(f"#{control} option[value='{value}']").click()


def rows(browser: Browser) -> int:
    return len(browser.texts("#matrix tbody tr"))


def test_what_is_first_shown_is_what_was_written(page: str, open_page: Open) -> None:
    """The matrix that JavaScript makes and the one of the file are the same."""
    browser = open_page(page)
    made = browser.probe("matrix")
    without = page.replace("startControls();\nstartDrawer();\nupdate();", "")
    policy = without.split('http-equiv="Content-Security-Policy"')[1].split(">")[0]
    browser = open_page(without.replace(f' http-equiv="Content-Security-Policy"{policy}', ""), "without.html")
    assert browser.run("return document.getElementById('controls').hidden")
    assert browser.probe("matrix") == made


def test_metric(report: Browser) -> None:
    before = report.probe("cells")
    assert all(len(tiles) == 2 for tiles in before if tiles[0] not in ("failed",))
    choose(report, "metric", "asr")
    after = report.probe("cells")
    assert all(len(tiles) == 1 for tiles in after)
    assert [tiles[-1] for tiles in before] == [tiles[-1] for tiles in after]
    assert report.find("#matrix caption").text.startswith("ASR ↓")
    assert report.find("#legend-low").text == "worse (100)"
    choose(report, "metric", "seconds")
    assert all(tile.startswith(("s ", "failed")) for (tile,) in report.probe("cells"))
    assert (
        report.run("return new Set([...document.querySelectorAll('#matrix .tile')].map((t) => t.className)).size") > 10
    )


def test_columns_and_lines(report: Browser) -> None:
    assert report.texts("#matrix thead th")[:3] == ["attack", "architecture", "activation"]
    choose(report, "columns", "activation")
    assert report.texts("#matrix thead th") == ["attack", "defense", "architecture", "elu", "relu", "selu"]
    choose(report, "lines", "architecture")
    assert report.texts("#matrix thead th")[:3] == ["architecture", "attack", "defense"]
    first = report.texts("#matrix tbody th:first-child")
    assert first == sorted(first)
    assert len(report.probe("cells")) == 240


def test_filters(report: Browser) -> None:
    summary = report.find(".filter[data-axis=architecture] summary")
    summary.click()
    report.find(".filter[data-axis=architecture] input[value='1']").click()
    assert summary.text.startswith("architecture: 4 of 5")
    assert report.find("#status").text == "Showing 192 of 240 combinations."
    assert "nin" not in report.texts("#matrix tbody th:nth-child(2)")
    assert report.run("return document.querySelectorAll('#scatter g').length") == sum(
        1 for cell in report.probe("cells") if cell != ["failed"]
    )
    report.find(".filter[data-axis=architecture] fieldset button").click()
    assert report.find("#status").text == "Showing 240 of 240 combinations."
    report.find(".filter[data-axis=architecture] fieldset button").click()
    assert report.find("#status").text == "Showing 0 of 240 combinations."
    report.press(ESCAPE)
    assert report.run("return document.querySelector('.filter[open]')") is None
    assert report.run("return document.activeElement.tagName") == "SUMMARY"
    report.find("#reset").click()
    assert report.find("#status").text == "Showing 240 of 240 combinations."


def test_drawer_by_keyboard(report: Browser) -> None:
    report.run("document.querySelector('#matrix .cell').focus()")
    focused = report.driver.switch_to.active_element
    report.press(ENTER)
    assert report.run("return document.getElementById('drawer').open")
    assert report.run("return document.activeElement.id") == "close"
    for _ in range(12):
        report.press(TAB)
        assert report.run(
            "const e = document.activeElement; return e === document.body || e.closest('dialog') !== null"
        )
    report.press(ESCAPE)
    assert not report.run("return document.getElementById('drawer').open")
    assert report.driver.switch_to.active_element == focused
    report.press(SPACE)
    report.find("#close").click()
    assert report.driver.switch_to.active_element == focused


def test_drawer_shows_everything(tiny_plan: Callable[..., Plan], tmp_path: Path, open_page: Open) -> None:
    plan = tiny_plan(seeds="0, 1")
    done, failed = plan.cells[:2], plan.cells[2]
    failure = Failure(type="E", message="m", traceback="Traceback: here")
    counts = {
        part: {"hits": 90, "total": 100} for part in ("benign_accuracy", "attack_success_rate", "robust_accuracy")
    }
    write_records(
        [
            *(
                Record.of(
                    cell, record_key(cell), "done", counts=counts,
                    costs={"defense": Cost(seconds=1.5, peak_memory=2**30)},
                    victim_losses=[2.0, 1.0, 0.5 + cell.seed], provenance={"device": f"device {cell.seed}"},
                    warnings=["take care"],
                )
                for cell in done
            ),
            Record.of(failed, record_key(failed), "failed", reason="it broke", failure=failure),
        ],
        tmp_path / "results",
    )  # fmt: skip
    source = source_of_plan(plan, tmp_path / "results", Path("benchmark.yaml"))
    browser = open_page(build_report(source, make_previews(source.pairs)))
    browser.find("#matrix .cell").click()
    text = browser.find("#drawer").text
    for part in (
        "90.0 ±0.0", "90 of 100", "poison_rate=", "4 test images of digits", "one line for each of 2 seeds", "device 1",
        "bbn run benchmark.yaml --dataset digits -a badnets -d no_defense", "Provenance, seed 0", "take care",
        "1.50 s, 1024 MiB", record_key(plan.cells[0]), "epochs",
    ):  # fmt: skip
        assert part in text
    assert browser.run(
        "const i = document.querySelector('#drawer img'); return i.complete && i.naturalWidth > 20 && i.alt.length > 20"
    )
    assert len(browser.driver.find_elements("css selector", "#drawer .curve")) == 2
    browser.find("#drawer button:not(#close)").click()
    browser.press(ESCAPE)
    browser.run("document.querySelectorAll('#failures ~ .failures .link')[0].click()")
    assert "Seed 0 failed: it broke" in browser.find("#drawer").text
    assert "Traceback: here" in browser.run("return document.getElementById('drawer').textContent")


def test_hostile_labels_are_shown_and_not_run(
    make_record: MakeRecord, make_source: MakeSource, open_page: Open
) -> None:
    axes = dict.fromkeys(AXES, HOSTILE)
    record = make_record(
        "1" * 16, axes=axes, warnings=[HOSTILE], extras={HOSTILE: HOSTILE}, provenance={HOSTILE: HOSTILE}
    )
    failed = make_record("2" * 16, ba=None, status="failed", reason=HOSTILE, axes={"defense": "javascript:alert(1)"})
    page = build_report(make_source([record, failed, make_record("3" * 16)]))
    page = page.replace('<script type="application/json"', '<p id="called"></p><script type="application/json"')
    browser = open_page(page)
    browser.driver.execute_cdp_cmd("Page.enable", {})
    found = browser.driver.execute_cdp_cmd(
        "Page.addScriptToEvaluateOnNewDocument",
        {"source": "window.called = 0; window.alert = () => { window.called += 1; }"},
    )
    browser.driver.refresh()
    assert HOSTILE in browser.texts("#matrix th bdi")
    for cell in browser.driver.find_elements("css selector", "#matrix .cell"):
        cell.click()
        browser.press(ESCAPE)
    browser.run("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    choose(browser, "columns", "attack")
    browser.find("#marks button").click()
    assert HOSTILE in browser.texts("#marks bdi")
    assert browser.run("return window.called") == 0
    assert browser.run("return document.scripts.length") == 2
    assert browser.run("return document.images.length") == 0
    browser.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", found)


def test_scatter(report: Browser) -> None:
    marks = report.run("return document.querySelectorAll('#scatter g').length")
    numbered = sum(1 for tiles in report.probe("cells") if tiles != ["failed"])
    assert marks == numbered
    assert len(set(report.probe("marks"))) == 8
    report.find("#marks button").click()
    assert report.find("#marks button").get_attribute("aria-pressed") == "true"
    assert 0 < report.run("return document.querySelectorAll('#scatter .dim').length") < marks
    report.find("#numbers summary").click()
    assert len(report.texts("#numbers tbody tr")) == marks
    report.run("document.querySelector('#scatter g').dispatchEvent(new MouseEvent('click', {bubbles: true}))")
    assert report.run("return document.getElementById('drawer').open")
    assert report.probe("marksAreInside")


def test_everything_has_a_name_and_headings_are_in_order(report: Browser) -> None:
    assert report.probe("nameless") == []
    report.find("#matrix .cell").click()
    assert report.probe("nameless") == []
    levels = report.run("return [...document.querySelectorAll('h1, h2, h3')].map((h) => Number(h.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(later - earlier <= 1 for earlier, later in pairwise(levels))
    ids = report.run("return [...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(ids) == len(set(ids))
    assert report.run("return [...document.querySelectorAll('th')].every((th) => th.scope)")
    assert report.run("return document.documentElement.lang") == "en"


def test_skip_link_and_sections_by_keyboard(report: Browser) -> None:
    report.run("document.body.focus()")
    report.press(TAB)
    assert report.run("return document.activeElement.className") == "skip"
    assert report.run("return document.activeElement.getBoundingClientRect().x") >= 0
    report.press(ENTER)
    assert report.run("return document.activeElement.id") == "main"
    targets = report.probe("sectionsOfLinks")
    assert targets
    assert all(targets)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_of_all_texts(scheme: str, report: Browser) -> None:
    report.emulate(prefers_color_scheme=scheme)
    assert (
        report.run("return getComputedStyle(document.body).backgroundColor")
        == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}[scheme]
    )
    assert report.probe("faint") == []
    report.find("#matrix .cell").click()
    assert report.probe("faint") == []


def test_narrow_screens_do_not_scroll_sideways(report: Browser) -> None:
    report.resize(400, 800)
    assert report.run("return document.documentElement.scrollWidth") <= 400
    report.find("#matrix .cell").click()
    assert report.run("return document.getElementById('drawer').scrollWidth") <= 400
    report.press(ESCAPE)
    for box in report.driver.find_elements("css selector", ".filter summary"):
        box.click()
        assert report.run("return document.documentElement.scrollWidth") <= 400


def test_print(report: Browser) -> None:
    report.emulate()
    report.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    shown = "return [...document.querySelectorAll(arguments[0])].some((e) => e.getClientRects().length > 0)"
    for selector in ("#matrix", ".failures", ".hardware", ".facts", "#scatter", "#notes"):
        assert report.run(shown, selector), selector
    for selector in (".controls", "nav", "dialog", ".skip", "#status"):
        assert not report.run(shown, selector), selector
    report.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    made: dict[str, Any] = report.driver.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})
    assert base64.b64decode(made["data"]).startswith(b"%PDF-")


def test_without_motion_nothing_moves(report: Browser) -> None:
    report.emulate(prefers_reduced_motion="reduce")
    report.find("#matrix .cell").click()
    assert report.run("return getComputedStyle(document.getElementById('drawer')).animationName") == "none"


def test_a_policy_that_works(report: Browser) -> None:
    """The page could not send anything even if a text of a stranger ran as a script."""
    directive, ran = report.probe("violate")
    assert directive.startswith("img-src")
    assert not ran
    assert len(report.complaints()) == 2
    report.requests()


def test_requests_are_seen(open_page: Open) -> None:
    """What the other tests rest on: a page that asks for something is caught."""
    browser = open_page("<img src='http://127.0.0.1:9/x.png'>")
    assert "http://127.0.0.1:9/x.png" in browser.requests()
    assert browser.complaints()


def test_a_report_of_nothing(open_page: Open) -> None:
    browser = open_page(build_report(Source("nothing", [], [])))
    assert browser.find("#matrix").text
