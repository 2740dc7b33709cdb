"""The records of the report's tests; finding and using what is on the page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from selenium.webdriver import ActionChains, Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from tests.report.sample_records import measurement, record
from tests.report.test_report_page import MARKUP

MARKED = f"{MARKUP} " + "a-very-long-name_without_any_break" * 6
HISTORY = {"step": [0, 50, 100], "stage": [1, 1, 2], "active_fraction": [[1.0, 1.0], [0.8, 0.6], [0.5, 0.25]]}
Write = Callable[..., str]


def lm_records() -> list[dict[str, Any]]:
    """Dense with two seeds; LTE with two points, the first with two seeds; a method with a nasty name; a failed run."""
    routed = {"measurement": measurement().to_dict(), "layer_history": HISTORY, "config": {"train": {"eta": 0.25}}}
    lte = [
        record(seed=0, value=24.0, command="lte eval a --seed 0", git_commit="c0ffee", latency_ms=3.0, **routed),
        record(seed=1, value=26.0, command="lte eval a --seed 1", latency_ms=4.0, **routed),
        record(target_sparsity=0.8, sparsity=0.75, value=28.0, flops_per_token=2.0**29, config={"train": {"eta": 0.5}}),
    ]
    odd = record(MARKED, value=22.0, command=MARKUP, hardware=MARKUP, sparsity=0.25, bytes_per_token=None)
    failed = record("cats", value=None, failure="out of memory", command="lte eval cats")
    return [record("dense", seed=0, value=19.0), record("dense", seed=1, value=21.0), *lte, odd, failed]


def other_task() -> list[dict[str, Any]]:
    shared = {"task": "sst2", "metric": "accuracy"}
    return [record("dense", **shared, value=0.92), record(**shared, value=0.9)]


def section(browser: Chrome, identifier: str) -> WebElement:
    return browser.find_element(By.CSS_SELECTOR, f"section[aria-labelledby={identifier}]")


def plots(place: WebElement) -> list[WebElement]:
    return place.find_elements(By.CSS_SELECTOR, ".plot")


def drawn(browser: Chrome, plot: WebElement) -> dict[str, list[Any]]:
    """The values that a picture draws, by the names of its series, error bars left out."""
    script = """return echarts.getInstanceByDom(arguments[0]).getOption().series.filter(({type}) => type !== 'custom')
      .map(({name, data}) => [name, data.map((each) => each.value ?? each)])"""
    return dict(browser.execute_script(script, plot))


def looks(browser: Chrome, plot: WebElement) -> dict[str, list[str]]:
    script = """return echarts.getInstanceByDom(arguments[0]).getOption().series.filter(({type}) => type !== 'custom')
      .map(({name, symbol, itemStyle}) => [name, [symbol, itemStyle.color]])"""
    return dict(browser.execute_script(script, plot))


def table_of(place: WebElement) -> list[list[str]]:
    """The table below a picture, opened."""
    details = place.find_element(By.XPATH, ".//details[summary='Show as table']")
    if details.get_attribute("open") is None:
        details.find_element(By.TAG_NAME, "summary").click()
        WebDriverWait(place.parent, 5).until(lambda _: details.find_elements(By.CSS_SELECTOR, "tbody th, tbody td"))
    rows = details.find_elements(By.CSS_SELECTOR, "tbody tr")
    return [[str(cell.get_property("textContent")) for cell in row.find_elements(By.XPATH, "*")] for row in rows]


def chip(browser: Chrome, name: str) -> WebElement:
    return browser.find_element(By.XPATH, f"//button[@aria-pressed][normalize-space()='{name}']")


def click(browser: Chrome, element: WebElement) -> None:
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    element.click()


def move_to(browser: Chrome, plot: WebElement, point: list[float]) -> ActionChains:
    """Moves the mouse to a point of a picture's axes."""
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", plot)
    script = "return echarts.getInstanceByDom(arguments[0]).convertToPixel({seriesIndex: 0}, arguments[1])"
    left, top = browser.execute_script(script, plot, point)
    offset = round(left - plot.size["width"] / 2), round(top - plot.size["height"] / 2)
    return ActionChains(browser).move_to_element_with_offset(plot, *offset)


def details_text(browser: Chrome) -> str:
    box = section(browser, "tradeoff").find_element(By.CSS_SELECTOR, "[aria-label='Details of the chosen point']")
    return box.text if box.is_displayed() else ""


def method_column(table: WebElement) -> list[str]:
    return [each.text for each in table.find_elements(By.CSS_SELECTOR, "tbody th")]
