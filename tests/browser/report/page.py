"""The records of the report's tests; finding and using what is on the page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from selenium.webdriver import ActionChains, Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.select import Select
from selenium.webdriver.support.wait import WebDriverWait

from lte.records import ResultRecord
from tests.browser.chromium import settle
from tests.report.sample_records import measurement, record
from tests.report.test_report_page import MARKUP

MARKED = f"{MARKUP} " + "a-very-long-name_without_any_break" * 6
HISTORY = {"step": [0, 50, 100], "stage": [1, 1, 2], "active_fraction": [[1.0, 1.0], [0.8, 0.6], [0.5, 0.25]]}
Write = Callable[..., str]


def lm_records() -> list[ResultRecord]:
    """Dense with two seeds; LTE with two points, the first with two seeds, and a variant; Wanda, which fails; a method
    with a nasty name; a failed run.
    """
    routed = {"measurement": measurement().to_dict(), "layer_history": HISTORY, "config": {"train": {"eta": 0.25}}}
    routed |= {"latency_dense_ms": 4.0, "bytes_per_token": 2.4e6}
    cheap = {"target_sparsity": 0.8, "sparsity": 0.75, "flops_per_token": 2.0**29, "bytes_per_token": 1.6e6}
    lte = [
        record(seed=0, value=20.25, command="lte eval a --seed 0", git_commit="c0ffee", latency_ms=3.0, **routed),
        record(seed=1, value=20.75, command="lte eval a --seed 1", latency_ms=4.0, **routed),
        record(value=21.0, config={"train": {"eta": 0.5}}, **cheap),
        record(value=22.0, label="lte-frozen", **cheap),
    ]
    wanda = record("wanda", value=30.0, sparsity=0.0, bytes_per_token=2e6, config={"train": {"eta": None}})
    odd = record(MARKED, value=20.5, command=MARKUP, hardware=MARKUP, sparsity=0.25, bytes_per_token=None)
    failed = record("cats", value=None, failure="out of memory", command="lte eval cats")
    return [record("dense", seed=0, value=19.0), record("dense", seed=1, value=21.0), *lte, wanda, odd, failed]


def other_task() -> list[ResultRecord]:
    shared = {"task": "sst2", "metric": "accuracy"}
    return [record("dense", **shared, value=0.92), record(**shared, value=0.9)]


def opened(browser: Chrome, address: str) -> Chrome:
    """The page of an address, drawn."""
    browser.get("about:blank")
    browser.get(address)
    WebDriverWait(browser, 10).until(lambda _: browser.execute_script("return document.body.dataset.ready"))
    settle(browser)
    return browser


def address(browser: Chrome) -> dict[str, str]:
    """What the address keeps."""
    return dict(browser.execute_script("return [...new URLSearchParams(location.hash.slice(1))]"))


def plot(browser: Chrome, label: str) -> WebElement:
    """A picture whose label begins so, in sight; the folded part that it lies in is opened."""
    found = browser.find_element(By.CSS_SELECTOR, f".plot[aria-label^='{label}']")
    browser.execute_script("arguments[0].closest('details.folded')?.setAttribute('open', '')", found)
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", found)
    WebDriverWait(browser, 5).until(lambda _: found.find_elements(By.TAG_NAME, "canvas"))
    settle(browser)
    return found


def drawn(browser: Chrome, label: str) -> dict[str, list[Any]]:
    """The values that a picture draws, by the names of its series."""
    script = """return echarts.getInstanceByDom(arguments[0]).getOption().series.map(({name, data}) =>
      [name, data.map((each) => each.value ?? each)])"""
    return dict(browser.execute_script(script, plot(browser, label)))


def choose(browser: Chrome, label: str, text: str) -> None:
    """Chooses from the drop-down list of a label."""
    Select(browser.find_element(By.XPATH, f"//label[starts-with(., '{label}')]/select")).select_by_visible_text(text)
    settle(browser)


def click(browser: Chrome, element: WebElement) -> None:
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    element.click()
    settle(browser)


def button(browser: Chrome, text: str) -> WebElement:
    return browser.find_element(By.XPATH, f"//button[normalize-space()='{text}' or @aria-label='{text}']")


def move_to(browser: Chrome, label: str, point: list[float]) -> ActionChains:
    """Moves the mouse to a point of a picture's axes."""
    found = plot(browser, label)
    script = "return echarts.getInstanceByDom(arguments[0]).convertToPixel({seriesIndex: 0}, arguments[1])"
    left, top = browser.execute_script(script, found, point)
    offset = round(left - found.size["width"] / 2), round(top - found.size["height"] / 2)
    return ActionChains(browser).move_to_element_with_offset(found, *offset)


def panel(browser: Chrome) -> str:
    """What the panel of pinned points says."""
    return browser.find_element(By.CSS_SELECTOR, "aside.pins").text


def pinned(browser: Chrome) -> list[str]:
    return [each.text for each in browser.find_elements(By.CSS_SELECTOR, ".pin strong")]


def focused(browser: Chrome) -> WebElement:
    return browser.switch_to.active_element
