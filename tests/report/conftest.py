"""A browser without a window, and reports to open in it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from backdoor_bench_none.contracts.record import Record
from backdoor_bench_none.report.html.source import Source

sys.path.insert(0, str(Path(__file__).parent))

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

PROBES = Path(__file__).with_name("probes.js")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage",
         "--force-prefers-reduced-motion", "--window-size=1280,900", "--disable-background-networking")  # fmt: skip


@pytest.fixture
def make_source(tmp_path: Path) -> Callable[[Sequence[Record]], Source]:
    """The source of a report on these records."""
    from synthetic import source_of

    return lambda records: source_of(records, tmp_path / "results")


@dataclass
class Browser:
    """Chromium, what its pages wrote on the console and what they asked the network for."""

    driver: Chrome

    def open(self, path: Path) -> None:
        self.driver.get_log("browser")
        self.driver.get_log("performance")
        self.driver.get(path.as_uri())

    def run(self, script: str, *arguments: object) -> Any:
        return self.driver.execute_script(script, *arguments)

    def probe(self, name: str) -> Any:
        """What a function of `probes.js` returns."""
        return self.run(f"{PROBES.read_text()}\nreturn {name}();")

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def texts(self, selector: str) -> list[str]:
        contrasts: list[str] = self.run(
            "return [...document.querySelectorAll(arguments[0])].map(element => element.textContent)", selector
        )
        return contrasts

    def press(self, *keys: str) -> None:
        self.driver.switch_to.active_element.send_keys(*keys)

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]

    def requests(self) -> list[str]:
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]

    def emulate(self, **features: str) -> None:
        """Media features, as prefers_color_scheme='dark'; none for the browser's own."""
        values = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": values})

    def resize(self, width: int, height: int = 900) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """One browser for all tests."""
    binary, driver_path = (shutil.which(name) for name in ("chromium", "chromedriver"))
    if binary is None or driver_path is None:
        pytest.skip("chromium and chromedriver are not installed")
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    options.binary_location = binary
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = Chrome(options=options, service=Service(driver_path))
    yield Browser(driver)
    driver.quit()


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    """The browser; it is an error if a page complains or asks for anything but files and data."""
    yield chromium
    chromium.emulate()
    chromium.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert chromium.complaints() == []
    assert [url for url in chromium.requests() if not url.startswith(("file:", "data:"))] == []
