"""The page of `lte report` on a few records, and on all that are committed."""

from __future__ import annotations

from pathlib import Path

import pytest
from selenium.webdriver import Chrome

from lte.records import ResultRecord
from lte.report.inputs import Bench, load_inputs
from lte.report.points import find_tradeoffs
from lte.report.report_page import write_html_report
from tests.browser.report.page import Write, lm_records, opened, other_task
from tests.report.sample_benches import bench
from tests.report.test_points import runs_of

RESULTS = Path(__file__).parents[3] / "results"


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes the page of records and benchmarks and tells its address."""

    def written(*records: ResultRecord, benches: tuple[Bench, ...] = ()) -> str:
        tradeoffs = find_tradeoffs(runs_of(*records)) if records else []
        return write_html_report(tmp_path / "report.html", tradeoffs, benches).as_uri()

    return written


@pytest.fixture
def page(browser: Chrome, write: Write) -> Chrome:
    """The page of two tasks and a benchmark."""
    return opened(browser, write(*lm_records(), *other_task(), benches=(bench(),)))


@pytest.fixture(scope="package")
def committed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of all committed results."""
    inputs = load_inputs([RESULTS])
    folder = tmp_path_factory.mktemp("committed")
    return write_html_report(folder / "report.html", find_tradeoffs(inputs.records), inputs.benches)
