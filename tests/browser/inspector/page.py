"""Finding and using what is on the inspector's page."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from selenium.webdriver import ActionChains, Chrome, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from tests.browser.chromium import settle


def active_of(run: dict[str, Any]) -> np.ndarray:
    packed = np.frombuffer(base64.b64decode(run["active"]), "u1").reshape(run["layers"], len(run["ids"]), -1)
    return np.unpackbits(packed, axis=-1, count=run["experts"]).astype(bool)


def find(place: Chrome | WebElement, selector: str) -> WebElement:
    return place.find_element(By.CSS_SELECTOR, selector)


def open_page(browser: Chrome, address: str) -> None:
    """Opens a page and waits until it has drawn itself."""
    browser.get(address)
    WebDriverWait(browser, 20).until(lambda _: browser.find_elements(By.CSS_SELECTOR, ".run .plot canvas"))


def panel(browser: Chrome, heading: str) -> WebElement:
    return browser.find_element(By.XPATH, f"//section[h3[starts-with(., '{heading}')]]")


def told(browser: Chrome, heading: str) -> str:
    return find(panel(browser, heading), ".told").text


def press(browser: Chrome, *keys: str) -> None:
    ActionChains(browser).send_keys(*keys).perform()
    settle(browser)


def tab_to(browser: Chrome, wanted: WebElement) -> None:
    """Reaches an element by the Tab key alone."""
    browser.execute_script("document.activeElement.blur(); window.getSelection().removeAllRanges()")
    for _ in range(60):
        press(browser, Keys.TAB)
        if browser.switch_to.active_element == wanted:
            return
    raise AssertionError(f"the Tab key does not reach {wanted.tag_name} {wanted.text[:40]}")


def table_rows(box: WebElement) -> list[list[str]]:
    """The table of a panel, opened; white space at the ends of cells is left out."""
    rows = box.find_elements(By.CSS_SELECTOR, "tbody tr")
    return [[cell.get_attribute("textContent").strip() for cell in row.find_elements(By.XPATH, "*")] for row in rows]


def open_table(browser: Chrome, heading: str) -> list[list[str]]:
    details = find(panel(browser, heading), "details")
    if details.get_attribute("open") is None:
        find(details, "summary").click()
        WebDriverWait(browser, 5).until(lambda _: details.find_elements(By.TAG_NAME, "td"))
    return table_rows(details)


def pick(browser: Chrome, heading: str, x: float, y: float) -> None:
    """Clicks into a picture, at a place in its plot's coordinates of ECharts."""
    plot = find(panel(browser, heading), ".plot")
    script = (
        "return echarts.getInstanceByDom(arguments[0]).convertToPixel({seriesIndex: 0}, [arguments[1], arguments[2]])"
    )
    left, top = browser.execute_script(script, plot, x, y)
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", plot)
    size = plot.size
    offset = (round(left - size["width"] / 2), round(top - size["height"] / 2))
    ActionChains(browser).move_to_element_with_offset(plot, *offset).click().perform()
    settle(browser)


def choose_token(browser: Chrome, token: int) -> None:
    browser.execute_script("arguments[0].click()", find(browser, f"#token-0-{token}"))
    settle(browser)
