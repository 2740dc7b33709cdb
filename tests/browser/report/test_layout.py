"""How the page of `lte report` fits the screen and its readers, whatever the files hold."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By

from lte.records import ResultRecord
from tests.browser.axe import serious_findings
from tests.browser.chromium import set_screen, settle
from tests.browser.labels import cut_labels
from tests.browser.loading import check_loads_within_ms
from tests.browser.report.page import Write, click, drawn, opened, panel, plot
from tests.report.sample_records import record
from tests.report.test_report_page import MARKUP, many_runs

OPEN = "document.querySelectorAll('details.folded').forEach((each) => { each.open = true; })"


def test_text_from_files_stays_text(page: Chrome) -> None:
    assert page.title == "What skipping neurons costs and saves"
    assert not page.find_elements(By.CSS_SELECTOR, "main img")
    page.execute_script(OPEN)
    click(page, page.find_element(By.XPATH, "//tbody//button[contains(., 'onerror')]"))
    click(page, page.find_element(By.XPATH, "//summary[.='Runs of B']"))
    assert panel(page).count(MARKUP) >= 3


@pytest.mark.parametrize("width", [390, 800, 1440])
def test_nothing_is_cut_or_scrolls_sideways(page: Chrome, width: int) -> None:
    # High enough that all pictures are on the screen, and drawn.
    set_screen(page, width, 20_000)
    page.execute_script(OPEN)
    plot(page, "Experts that")
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    for each in page.find_elements(By.CSS_SELECTOR, ".plot canvas"):
        assert each.size["width"] <= width
    assert cut_labels(page) == []


def test_the_first_screen_answers(browser: Chrome, committed: Path) -> None:
    """All committed results: small, quick, the sentence and the heat map in sight, no table cut, nothing serious."""
    assert committed.stat().st_size < 3_000_000
    check_loads_within_ms(browser, committed.as_uri(), 300)
    set_screen(browser, 1440, 900)
    opened(browser, committed.as_uri())
    script = (
        "return [...document.querySelectorAll('.answer, .heat')].map((each) => each.getBoundingClientRect().bottom)"
    )
    assert max(browser.execute_script(script)) < 900
    browser.execute_script(OPEN)
    settle(browser)
    wide = (
        "return [...document.querySelectorAll('.scroll')].filter((each) => each.scrollWidth > each.clientWidth).length"
    )
    assert browser.execute_script(wide) == 0
    for dark in (False, True):
        set_screen(browser, 1440, 900, dark)
        settle(browser)
        assert serious_findings(browser) == []


def test_names_at_the_ends_of_lines_are_apart(browser: Chrome, committed: Path) -> None:
    opened(browser, f"{committed.as_uri()}#task=stsb")
    script = """return echarts.getInstanceByDom(arguments[0]).getZr().storage.getDisplayList(true).filter(
      ({type, style}) => type === 'tspan' && arguments[1].includes(style.text)).map((each) => {
      const box = each.getBoundingRect().clone();
      if (each.transform) box.applyTransform(each.transform); return [each.style.text, box.y]; })"""
    names = ["LTE", "static pruning", "wanda", "teal", "wina", "cats", "kla", "deja vu", "moefication", "noisy topk"]
    found = sorted(browser.execute_script(script, plot(browser, "Quality lost"), names), key=lambda pair: pair[1])
    assert len(found) == len(names)
    assert min(after[1] - before[1] for before, after in pairwise(found)) > 12


@pytest.mark.parametrize(
    "records",
    [[], [record()], [record(value=math.nan)], [record(sparsity=None, flops_per_token=None, bytes_per_token=None)]],
    ids=["nothing", "one run", "a failed run", "no costs"],
)
def test_little_input_makes_a_page_without_empty_sections(
    browser: Chrome, write: Write, records: list[ResultRecord]
) -> None:
    opened(browser, write(*records))
    assert browser.find_element(By.CSS_SELECTOR, ".answer").text.startswith("No method can be compared here")
    assert browser.find_element(By.ID, "task").is_displayed() == bool(records)
    assert not browser.find_element(By.ID, "speed").is_displayed()
    assert not browser.find_elements(By.CSS_SELECTOR, ".plot, .heat")
    headings = (
        "return [...document.querySelectorAll('details.folded')].filter((each) => each.children.length < 2).length"
    )
    assert browser.execute_script(headings) == 0


def test_200_runs_load_quickly(browser: Chrome, write: Write) -> None:
    address = write(record("dense"), *many_runs(200))
    check_loads_within_ms(browser, address, 300)
    opened(browser, address)
    assert len([name for name in drawn(browser, "Quality lost") if name.startswith("method")]) == 10
