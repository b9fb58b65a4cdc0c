"""bbn report of 1,000 cells: seconds to build, bytes, and milliseconds until it can be used in Chromium."""

from __future__ import annotations

import shutil
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

sys.path.insert(0, str(Path(__file__).parents[1] / "report"))
from synthetic import synthetic_records, write_records

from backdoor_bench_none.contracts.record import Record
from backdoor_bench_none.report.html.build import build_report, write_report
from backdoor_bench_none.report.html.source import source_of_records
from backdoor_bench_none.results.index import read_measurements

TIMES = """
const {timing} = performance, [mark] = performance.getEntriesByName("interactive");
const [paint] = performance.getEntriesByName("first-contentful-paint");
return [timing.domInteractive - timing.navigationStart, mark.startTime, paint ? paint.startTime : null];
"""
WAIT = """
const done = arguments[0];
const look = () => (performance.getEntriesByName("interactive").length ? done() : setTimeout(look, 20));
look();
"""
LOADS = 7


def make_page(folder: Path) -> str:
    return build_report(source_of_records(read_measurements(folder), folder))


def test_report_of_a_thousand_cells(
    benchmark: BenchmarkFixture, tmp_path: Path, make_record: Callable[..., Record]
) -> None:
    folder = write_records(synthetic_records(make_record, 1000), tmp_path / "results")
    page = benchmark.pedantic(make_page, args=(folder,), rounds=5, warmup_rounds=1)
    benchmark.extra_info["bytes"] = len(page.encode())
    assert len(page.encode()) < 2_000_000
    assert benchmark.stats.stats.median < 5.0
    write_report(page, tmp_path / "report.html")
    benchmark.extra_info.update(measure_loading(tmp_path / "report.html"))
    print(benchmark.extra_info)
    assert benchmark.extra_info["ms to interactive"] < 3000


def measure_loading(path: Path) -> dict[str, float | None]:
    """Medians over some loads of a new page in a warm browser."""
    binary, driver_path = (shutil.which(name) for name in ("chromium", "chromedriver"))
    if binary is None or driver_path is None:
        pytest.skip("chromium and chromedriver are not installed")
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    options.binary_location = binary
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"):
        options.add_argument(flag)
    driver = Chrome(options=options, service=Service(driver_path))
    try:
        times = []
        for _ in range(LOADS + 1):
            driver.get("about:blank")
            driver.get(path.as_uri())
            driver.execute_async_script(WAIT)
            times.append(driver.execute_script(TIMES))
    finally:
        driver.quit()
    names = ("ms to domInteractive", "ms to interactive", "ms to first paint")
    columns = [[value for value in column if value is not None] for column in zip(*times[1:], strict=True)]
    return {name: statistics.median(column) if column else None for name, column in zip(names, columns, strict=True)}
