"""The site in a real browser: sorting, filters, links, the keyboard; no request, no error, no stranger's script."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from backdoor_bench_none.cli.main import run_cli

selenium = pytest.importorskip("selenium", reason="Selenium drives the browser")
from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.remote.webdriver import WebDriver  # noqa: E402
from selenium.webdriver.remote.webelement import WebElement  # noqa: E402
from selenium.webdriver.support.ui import Select  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed")
HOSTILE = "</script><script>alert(1)</script><img src=https://example.org/x onerror=alert(2)>"


class Site(NamedTuple):
    """A built site, and its address."""

    folder: Path

    @property
    def url(self) -> str:
        return self.folder.resolve().as_uri()


@pytest.fixture(scope="session")
def browser() -> Iterator[WebDriver]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=str(DRIVER))) as driver:
        driver.set_window_size(1200, 900)
        yield driver


@pytest.fixture(scope="module")
def site(arena: Any, track_folder: Path, tmp_path_factory: pytest.TempPathFactory, forgery: Any) -> Site:
    """Three submissions, one of them verified, a refused one, and one with a hostile name."""
    from backdoor_bench_none.leaderboard import track as tracks

    base = tmp_path_factory.mktemp("site")
    shutil.copytree(arena.submissions, base / "submissions")
    for name, change in (("hostile", hostile), ("cheat", cheat)):
        shutil.copytree(arena.submissions / "none", base / "submissions" / name)
        change(forged := forgery(base / "submissions" / name))
        forged.seal()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracks, "FOLDER", track_folder)
        patch.chdir(base)
        for name, code in (("no_defense", 0), ("fine_tune", 0), ("cheat", 1)):
            results = str(base / "work")
            arguments = ["leaderboard", "verify", f"submissions/{name}", "--results", results, "--cells", "0"]
            assert run_cli(arguments) == code
        assert run_cli(["leaderboard", "build", "submissions"]) == 0
    return Site(base / "site")


def hostile(forged: Any) -> None:
    forged.manifest["defense"] |= {"name": HOSTILE, "label": HOSTILE}
    forged.manifest |= {"authors": HOSTILE, "code": "javascript:alert(3)", "paper": "https://example.org/paper"}
    for cell in forged.keys:
        record = forged.record(cell)
        record["counts"]["benign_accuracy"]["hits"] -= 50
        forged.write_record(cell, record)


def cheat(forged: Any) -> None:
    record = forged.record("badnets/s0")
    record["counts"]["attack_success_rate"]["hits"] = 0
    forged.write_record("badnets/s0", record)


@pytest.fixture
def page(browser: WebDriver, site: Site) -> Iterator[WebDriver]:
    """The track's page; whatever a test does there ends without errors, dialogs and requests to anywhere."""
    browser.get_log("browser"), browser.get_log("performance")
    browser.get(f"{site.url}/tiny-v1/index.html")
    yield browser
    assert browser.get_log("browser") == []
    messages = [json.loads(line["message"])["message"] for line in browser.get_log("performance")]
    requested = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert requested
    assert all(url.startswith((site.url, "data:")) for url in requested)


def headers(page: WebDriver) -> list[WebElement]:
    return page.find_elements(By.CSS_SELECTOR, "#standings thead th")


def column(page: WebDriver, index: int) -> list[str]:
    """The values of a column, as sorting sees them, of the rows that are shown."""
    script = """
    return [...document.querySelectorAll("#standings tbody tr")].filter(row => !row.hidden).map(row => {
      const cell = row.cells[arguments[0]];
      return cell.dataset.value === undefined ? cell.textContent.trim().toLowerCase() : cell.dataset.value;
    });
    """
    texts: list[str] = page.execute_script(script, index)  # type: ignore[no-untyped-call]
    return texts


def names(page: WebDriver) -> list[str]:
    return [link.text for link in page.find_elements(By.CSS_SELECTOR, "#standings tbody th a") if link.is_displayed()]


def in_order(values: list[str], descending: bool) -> list[str]:
    """Sorted as numbers where they are, with what is not known at the end either way."""
    known = [value for value in values if value != ""]
    try:
        ordered = sorted(known, key=float, reverse=descending)
    except ValueError:
        ordered = sorted(known, reverse=descending)
    return ordered + [""] * (len(values) - len(known))


def test_every_header_sorts_both_ways(page: WebDriver) -> None:
    assert len(headers(page)) == 10
    for index, header in enumerate(headers(page)):
        assert header.get_attribute("aria-sort") is None
        before = column(page, index)
        for direction in ("ascending", "descending", "ascending"):
            header.find_element(By.TAG_NAME, "button").click()
            assert header.get_attribute("aria-sort") == direction
            assert column(page, index) == in_order(before, direction == "descending")
        others = [other.get_attribute("aria-sort") for other in headers(page) if other != header]
        assert others == [None] * 9


def test_the_keyboard_sorts_and_reaches_every_control(page: WebDriver) -> None:
    body = page.find_element(By.TAG_NAME, "body")
    body.send_keys(Keys.TAB)
    assert page.switch_to.active_element.text == "Skip to the content"
    assert page.switch_to.active_element.rect["x"] >= 0
    reached = []
    for _ in range(30):
        page.switch_to.active_element.send_keys(Keys.TAB)
        active = page.switch_to.active_element
        reached.append(active.get_attribute("id") or active.text)
        if active.text.startswith("DER"):
            break
    assert reached[:4] == ["backdoor-bench-none leaderboard", "CSV", "JSON", "filter"]
    assert {"status", "Rank", "Defense", "Status"} < set(reached)
    outline = page.switch_to.active_element.value_of_css_property("outline-style")
    assert outline == "solid"
    before = column(page, 3)
    for key, descending in ((Keys.ENTER, False), (Keys.SPACE, True)):
        page.switch_to.active_element.send_keys(key)
        assert column(page, 3) == in_order(before, descending)


def test_filters_by_text_and_status(page: WebDriver) -> None:
    shown, box = page.find_element(By.ID, "shown"), page.find_element(By.ID, "filter")
    status = Select(page.find_element(By.ID, "status"))
    assert shown.text == "5 of 5 submissions"
    box.send_keys("FINE")
    assert names(page) == ["fine_tune"]
    assert shown.text == "1 of 5 submissions"
    box.clear()
    box.send_keys("backdoor-bench-none 0.1.0")
    assert len(names(page)) == 5
    status.select_by_visible_text("reevaluated")
    assert sorted(names(page)) == ["fine_tune", "no_defense"]
    status.select_by_visible_text("refused")
    assert names(page) == ["none"]
    box.clear()
    box.send_keys("nobody")
    assert names(page) == []
    assert shown.text == "0 of 5 submissions"
    box.clear()
    status.select_by_visible_text("all")
    box.send_keys(" ")
    assert len(names(page)) == 5


def test_sorting_keeps_the_filter(page: WebDriver) -> None:
    page.find_element(By.ID, "filter").send_keys("n")
    Select(page.find_element(By.ID, "status")).select_by_visible_text("unverified")
    before = sorted(names(page))
    headers(page)[5].find_element(By.TAG_NAME, "button").click()
    assert sorted(names(page)) == before
    assert len(before) == 2


def test_a_hostile_name_is_a_name(page: WebDriver, site: Site) -> None:
    assert HOSTILE in names(page)
    assert page.execute_script("return document.scripts.length") == 1  # type: ignore[no-untyped-call]
    page.find_element(By.LINK_TEXT, HOSTILE).click()
    assert page.find_element(By.TAG_NAME, "h1").text == f"{HOSTILE} (backdoor-bench-none 0.1.0)"
    assert page.title.startswith(HOSTILE)
    assert page.find_elements(By.TAG_NAME, "img") == []
    facts = page.find_element(By.TAG_NAME, "dl")
    assert HOSTILE in facts.text
    assert "javascript:alert(3)" in facts.text
    links = [link.get_attribute("href") for link in facts.find_elements(By.TAG_NAME, "a")]
    assert links == ["https://example.org/paper"]


def test_all_links_lead_somewhere(page: WebDriver, site: Site) -> None:
    todo, seen = [f"{site.url}/index.html"], set[str]()
    while todo:
        url = todo.pop()
        seen.add(url)
        page.get(url)
        assert page.find_element(By.TAG_NAME, "h1").text
        for link in page.find_elements(By.TAG_NAME, "a"):
            target = (link.get_attribute("href") or "").partition("#")[0]
            if target.startswith("https://example.org/"):
                assert link.get_attribute("rel") == "noopener noreferrer nofollow"
                continue
            path = Path(target.removeprefix("file://"))
            assert path.is_file(), target
            if path.suffix == ".html" and target not in seen | set(todo):
                todo.append(target)
    assert len(seen) == 7


def test_a_page_shows_claimed_submitted_and_verified_apart(page: WebDriver) -> None:
    page.find_element(By.LINK_TEXT, "fine_tune").click()
    table = page.find_element(By.TAG_NAME, "table")
    head = [cell.text for cell in table.find_elements(By.CSS_SELECTOR, "thead th")]
    assert head == ["Metric", "Claimed", "Submitted", "Verified"]
    rows = {
        row.find_element(By.TAG_NAME, "th").text: [cell.text for cell in row.find_elements(By.TAG_NAME, "td")]
        for row in table.find_elements(By.CSS_SELECTOR, "tbody tr")
    }
    assert rows["ASR ↓"][0] == "50.0"
    assert rows["ASR ↓"][1] == rows["ASR ↓"][2] != "–"
    assert (rows["BA ↑"][0], rows["cost ↓"][2]) == ("–", "–")
    assert (
        "6 models evaluated again from their weights, 0 cells run again" in page.find_element(By.TAG_NAME, "main").text
    )


def test_a_refused_page_says_why(page: WebDriver) -> None:
    Select(page.find_element(By.ID, "status")).select_by_visible_text("refused")
    page.find_element(By.LINK_TEXT, "none").click()
    text = page.find_element(By.TAG_NAME, "main").text
    assert "numbers of digits/badnets/none/mlp/relu/s0: attack_success_rate: the record says 0 of" in text
    assert "Rank" not in text


@pytest.mark.parametrize("width", [400, 1200])
def test_no_page_is_wider_than_its_window(width: int, page: WebDriver, site: Site) -> None:
    """Wide tables scroll in themselves."""
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        for path in sorted(site.folder.rglob("*.html")):
            page.get(path.as_uri())
            wide = "return [document.documentElement.scrollWidth, window.innerWidth]"
            scroll, window = page.execute_script(wide)  # type: ignore[no-untyped-call]
            assert window == width
            assert scroll <= window, path
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_texts_have_contrast_in_light_and_in_dark(page: WebDriver) -> None:
    """At least 4.5 to 1, as WCAG asks for."""
    script = Path(__file__).with_name("contrast.js").read_text()
    try:
        for scheme in ("light", "dark"):
            features = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
            page.execute_cdp_cmd("Emulation.setEmulatedMedia", features)
            assert page.execute_script(script) == []  # type: ignore[no-untyped-call]
    finally:
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
