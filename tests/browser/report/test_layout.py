"""How the page of `lte report` fits the screen, whatever the files hold."""

from __future__ import annotations

from typing import Any

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By

from tests.browser.chromium import set_screen, settle
from tests.browser.labels import cut_labels
from tests.browser.loading import check_loads_within_ms
from tests.browser.report.page import MARKED, Write, click, details_text, drawn, plots, section
from tests.report.sample_records import record
from tests.report.test_report_page import MARKUP, many_runs


def test_text_from_files_stays_text(page: Chrome) -> None:
    assert page.title == "What skipping neurons costs and saves"
    assert not page.find_elements(By.CSS_SELECTOR, "main img")
    opener = section(page, "tradeoff").find_element(By.XPATH, ".//tbody//button[contains(., 'onerror')]")
    assert opener.text == MARKED
    click(page, opener)
    assert details_text(page).count(MARKUP) == 3


@pytest.mark.parametrize("width", [360, 900, 1600])
def test_nothing_scrolls_sideways(page: Chrome, width: int) -> None:
    set_screen(page, width, 900)
    settle(page)
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    for plot in plots(page.find_element(By.ID, "main")):
        assert page.execute_script("return arguments[0].querySelector('canvas').clientWidth", plot) <= width
    assert cut_labels(page) == []


@pytest.mark.parametrize(
    "records",
    [[], [record()], [record(value=None)], [record(sparsity=None, flops_per_token=None, bytes_per_token=None)]],
    ids=["nothing", "one run", "a failed run", "no costs"],
)
def test_little_input_still_makes_a_page(browser: Chrome, write: Write, records: list[dict[str, Any]]) -> None:
    browser.get(write(*records))
    settle(browser)
    assert len(browser.find_elements(By.CSS_SELECTOR, "section[aria-labelledby]")) >= 7
    folded = section(browser, "latency").find_element(By.TAG_NAME, "details")
    assert folded.get_attribute("open") is None
    folded.find_element(By.TAG_NAME, "summary").click()
    assert "lte bench" in folded.text


def test_names_break_between_their_words(browser: Chrome, write: Write) -> None:
    set_screen(browser, 360, 900)
    browser.get(write(record("dense"), record("straight_through_with_distillation_of_every_layer")))
    settle(browser)
    script = """return [...document.querySelectorAll('table.sortable tbody th')].flatMap((cell) => {
      const [texts, range] = [document.createTreeWalker(cell, NodeFilter.SHOW_TEXT), document.createRange()];
      const lines = [];
      while (texts.nextNode()) {
        range.selectNodeContents(texts.currentNode);
        lines.push([texts.currentNode.data, range.getClientRects().length]);
      }
      return lines;
    })"""
    lines = browser.execute_script(script)
    assert ["distillation_", 1] in lines
    assert {count for text, count in lines if " " not in text} == {1}


def test_the_title_of_a_wide_table_is_seen_whole(browser: Chrome, write: Write) -> None:
    set_screen(browser, 360, 900)
    browser.get(write(*(record(name, model="a-model-with-quite-a-long-name " * 2) for name in ("dense", "lte"))))
    settle(browser)
    box = section(browser, "tradeoff").find_element(By.CSS_SELECTOR, ".scroll:has(table.sortable)")
    title = box.find_element(By.CSS_SELECTOR, "caption span")
    for left in (0, 60):
        browser.execute_script("arguments[0].scrollLeft = arguments[1]", box, left)
        assert browser.execute_script("return arguments[0].scrollLeft", box) == left
        inside = "const [a, b] = [...arguments].map((each) => each.getBoundingClientRect()); return [a.left >= b.left,"
        assert browser.execute_script(f"{inside} a.right <= b.right]", title, box) == [True, True]


def test_200_runs_load_within_2_seconds(browser: Chrome, write: Write) -> None:
    check_loads_within_ms(browser, write(record("dense"), *many_runs(200)), 2000)
    assert len(drawn(browser, plots(section(browser, "tradeoff"))[0])) == 11
