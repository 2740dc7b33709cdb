"""The page of `lte report` on a few records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome

from lte.report.inputs import Bench
from lte.report.points import find_tradeoffs
from lte.report.report_page import write_html_report
from tests.browser.chromium import settle
from tests.browser.report.page import Write, lm_records, other_task
from tests.report.sample_benches import bench
from tests.report.test_points import runs_of


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes the page of records and benchmarks and tells its address."""

    def written(*records: dict[str, Any], benches: tuple[Bench, ...] = ()) -> str:
        tradeoffs = find_tradeoffs(runs_of(*records)) if records else []
        return write_html_report(tmp_path / "report.html", tradeoffs, benches).as_uri()

    return written


@pytest.fixture
def page(browser: Chrome, write: Write) -> Chrome:
    """The page of two tasks and a benchmark."""
    browser.get(write(*lm_records(), *other_task(), benches=(bench(),)))
    settle(browser)
    return browser
