"""Finding and using what is on the inspector's page."""

from __future__ import annotations

import base64
import time
from typing import Any
from urllib.parse import parse_qs, urlparse

import numpy as np
from selenium.webdriver import ActionChains, Chrome, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from tests.browser.chromium import settle

# A little more than PAUSE_MS of the page.
PAUSE_S = 0.12


def unpack(text: str, dtype: str, *shape: int) -> np.ndarray:
    """An array of the page's data."""
    return np.frombuffer(base64.b64decode(text), dtype).reshape(shape or -1)


def active_of(run: dict[str, Any]) -> np.ndarray:
    packed = unpack(run["active"], "u1", run["layers"], len(run["ids"]), -1)
    return np.unpackbits(packed, axis=-1, count=run["experts"]).astype(bool)


def find(place: Chrome | WebElement, selector: str) -> WebElement:
    return place.find_element(By.CSS_SELECTOR, selector)


def open_page(browser: Chrome, address: str) -> None:
    """Opens a page, also one that differs in its # alone, and waits until it shows the chosen expert."""
    browser.get("about:blank")
    browser.get(address)
    WebDriverWait(browser, 20).until(lambda _: browser.find_elements(By.CSS_SELECTOR, ".side section h3"))
    settle(browser)


def state(browser: Chrome) -> dict[str, str]:
    """What the address holds; it follows when no key was pressed for a moment."""
    time.sleep(PAUSE_S)
    return {name: found[0] for name, found in parse_qs(urlparse(browser.current_url).fragment).items()}


def panel(browser: Chrome, heading: str) -> WebElement:
    return browser.find_element(By.XPATH, f"//section[h2[starts-with(., '{heading}')]]")


def told(browser: Chrome) -> str:
    """The sentence about the chosen token."""
    return find(browser, ".side > .told").text


def told_expert(browser: Chrome) -> str:
    return find(browser, ".side section").text


def press(browser: Chrome, *keys: str) -> None:
    ActionChains(browser).send_keys(*keys).perform()
    settle(browser)


def tab_to(browser: Chrome, wanted: WebElement) -> None:
    """Reaches an element by the Tab key alone."""
    browser.execute_script("document.activeElement.blur(); window.getSelection().removeAllRanges()")
    for _ in range(80):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        if browser.switch_to.active_element == wanted:
            settle(browser)
            return
    raise AssertionError(f"the Tab key does not reach {wanted.tag_name} {wanted.text[:40]}")


def table_rows(box: WebElement) -> list[list[str]]:
    """The first table of a box; white space at the ends of cells is left out."""
    rows = "[...arguments[0].querySelector('tbody').rows]"
    cells = f"{rows}.map((row) => [...row.cells].map((cell) => cell.textContent.trim()))"
    return box.parent.execute_script(f"return {cells}", box)


def open_table(box: WebElement) -> list[list[str]]:
    """The table of the first picture in a box."""
    details = find(box, "details")
    if details.get_attribute("open") is None:
        box.parent.execute_script("arguments[0].open = true", details)
        WebDriverWait(box.parent, 5).until(lambda _: details.find_elements(By.TAG_NAME, "td"))
    return table_rows(details)


def pick(browser: Chrome, box: WebElement, x: float, y: float) -> None:
    """Clicks into a picture, at a place in its plot's coordinates of ECharts."""
    plot = find(box, ".plot")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", plot)
    settle(browser)
    chart = "echarts.getInstanceByDom(arguments[0])"
    script = f"return {chart}.convertToPixel({{seriesIndex: 0}}, [arguments[1], arguments[2]])"
    left, top = browser.execute_script(script, plot, float(x), float(y))
    size = plot.size
    offset = (round(left - size["width"] / 2), round(top - size["height"] / 2))
    ActionChains(browser).move_to_element_with_offset(plot, *offset).click().perform()
    settle(browser)


def choose_token(browser: Chrome, token: int, run: int = 0) -> None:
    browser.execute_script("arguments[0].click()", find(browser, f"#token-{run}-{token}"))
    time.sleep(PAUSE_S)
    settle(browser)


def tints(browser: Chrome, run: int = 0) -> list[tuple[float, bool]]:
    """How strongly each token is coloured, in percent, and whether as less than the mean."""
    spans = f"[...document.querySelectorAll('[id^=token-{run}-]')]"
    tint = "parseFloat(span.style.getPropertyValue('--tint'))"
    script = f"return {spans}.map((span) => [{tint}, span.classList.contains('less')])"
    return [(tint, less) for tint, less in browser.execute_script(script)]
