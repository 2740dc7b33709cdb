"""Every control of the inspector's page by mouse and by keyboard."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import numpy as np
from selenium.webdriver import ActionChains, Chrome, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.support.select import Select
from selenium.webdriver.support.wait import WebDriverWait

from tests.browser.chromium import set_screen, settle
from tests.browser.inspector.page import active_of, choose_token, find, panel, pick, press, tab_to, told


class TestControls:
    def test_choosing_a_token_by_mouse_and_keys(self, page: Chrome, run: dict[str, Any]) -> None:
        find(page, "#token-0-4").click()
        assert told(page, "The text").startswith("Token 5 of ")
        box = find(page, ".token-text")
        tab_to(page, box)
        last = len(run["ids"])
        steps = [(Keys.ARROW_RIGHT, 6), (Keys.ARROW_LEFT, 5), (Keys.PAGE_DOWN, 15), (Keys.PAGE_UP, 5)]
        for key, expected in [*steps, (Keys.END, last), (Keys.ARROW_RIGHT, last), (Keys.HOME, 1), (Keys.ARROW_LEFT, 1)]:
            press(page, key)
            assert told(page, "The text").startswith(f"Token {expected} of "), key
            chosen = page.find_elements(By.CSS_SELECTOR, "[aria-selected=true]")
            assert [each.get_attribute("id") for each in chosen] == [f"token-0-{expected - 1}"]
            assert box.get_attribute("aria-activedescendant") == f"token-0-{expected - 1}"
        press(page, Keys.ARROW_DOWN)
        below = int(find(page, "[aria-selected=true]").get_attribute("id").rpartition("-")[2])
        assert below > 0
        press(page, Keys.ARROW_UP)
        assert told(page, "The text").startswith("Token 1 of ")

    def test_colouring(self, page: Chrome, run: dict[str, Any]) -> None:
        colouring = find(panel(page, "The text"), "select")
        active = active_of(run)

        def colours() -> list[str]:
            spans = "[...document.querySelectorAll('.token')].map(span => span.style.backgroundColor)"
            return page.execute_script(f"return {spans}")

        first = colours()
        assert len(set(first)) > 5
        tab_to(page, colouring)
        press(page, "whether")
        layer, expert = (
            int(Select(each).first_selected_option.text)
            for each in panel(page, "One expert").find_elements(By.TAG_NAME, "select")
        )
        now = colours()
        on = active[layer, :, expert]
        assert len({now[i] for i in np.flatnonzero(on)}) == len({now[i] for i in np.flatnonzero(~on)}) == 1
        assert now[int(np.flatnonzero(on)[0])] != now[int(np.flatnonzero(~on)[0])]
        Select(colouring).select_by_index(1)
        assert "experts in layer" in find(panel(page, "The text"), ".legend").text

    def test_moving_the_map(self, page: Chrome, run: dict[str, Any]) -> None:
        box = panel(page, "Layer by layer")
        slider = find(box, "input")
        place = find(box, "output")
        tab_to(page, slider)
        press(page, Keys.HOME)
        assert place.text.startswith("1 to ")
        press(page, Keys.ARROW_RIGHT)
        assert place.text.startswith("2 to ")
        press(page, Keys.END)
        assert place.text.endswith(f" to {len(run['ids'])} of {len(run['ids'])}")
        ActionChains(page).move_to_element_with_offset(slider, -slider.size["width"] // 2 + 8, 0).click().perform()
        assert place.text.startswith("1 to ")
        # A token that lies outside comes into the map.
        choose_token(page, len(run["ids"]) - 1)
        assert place.text.endswith(f" to {len(run['ids'])} of {len(run['ids'])}")

    def test_picking_in_the_pictures(self, page: Chrome) -> None:
        choose_token(page, 0)
        pick(page, "Layer by layer", 7, 1)
        assert told(page, "The text").startswith("Token 8 of ")
        assert " of layer 1 " in told(page, "One expert")
        pick(page, "Experts of the token", 5, 0)
        assert told(page, "One expert").startswith("Expert 5 of layer 0 ")
        choose = panel(page, "One expert").find_elements(By.TAG_NAME, "select")
        tab_to(page, choose[0])
        press(page, Keys.ARROW_DOWN)
        tab_to(page, choose[1])
        press(page, Keys.ARROW_DOWN)
        assert told(page, "One expert").startswith("Expert 6 of layer 1 ")

    def test_picking_a_bar(self, page: Chrome, run: dict[str, Any]) -> None:
        use = np.frombuffer(base64.b64decode(run["reference"]["use"]), "<f4").reshape(run["layers"], -1)
        Select(panel(page, "One expert").find_elements(By.TAG_NAME, "select")[0]).select_by_index(0)
        expert = int(use[0].argmax())
        pick(page, "One expert", expert, float(use[0, expert]) / 2)
        assert told(page, "One expert").startswith(f"Expert {expert} of layer 0 ")

    def test_tables_by_keyboard(self, page: Chrome) -> None:
        summaries = page.find_elements(By.TAG_NAME, "summary")
        shown = [each for each in summaries if each.is_displayed()]
        assert len(shown) == 5
        for summary in shown:
            tab_to(page, summary)
            press(page, Keys.ENTER)
            details = summary.find_element(By.XPATH, "..")
            WebDriverWait(page, 5).until(lambda _, box=details: box.find_elements(By.CSS_SELECTOR, "tbody td"))
            assert find(details, ".scroll").get_attribute("aria-label").endswith(", as a table")

    def test_the_theme(self, page: Chrome) -> None:
        def paper() -> str:
            return page.execute_script("return getComputedStyle(document.body).backgroundColor")

        light = paper()
        set_screen(page, 900, 900, dark=True)
        settle(page)
        dark = paper()
        assert dark != light
        theme = find(page, "#theme")
        tab_to(page, theme)
        press(page, "light")
        assert paper() == light
        Select(theme).select_by_visible_text("dark")
        set_screen(page, 900, 900)
        assert paper() == dark
        Select(theme).select_by_index(0)
        assert paper() == light

    def test_focus_is_seen(self, page: Chrome) -> None:
        for selector in ("#theme", ".token-text", ".run summary", "input[type=range]"):
            tab_to(page, find(page, selector))
            style = page.execute_script("return getComputedStyle(document.activeElement).outlineStyle")
            assert style == "solid", selector


class TestServed:
    def test_a_text_that_is_typed(self, browser: Chrome, serve: Callable[[], str]) -> None:
        browser.get(serve())
        assert not browser.find_elements(By.CSS_SELECTOR, ".run")
        field = find(browser, "#ask-text")
        tab_to(browser, field)
        press(browser, "while <b>the</b> file")
        tab_to(browser, find(browser, "#ask button"))
        press(browser, Keys.ENTER)
        WebDriverWait(browser, 20).until(lambda _: browser.find_elements(By.CSS_SELECTOR, ".run"))
        assert "while <b>the</b> file" in find(browser, ".token-text").get_attribute("textContent")
        find(browser, "#ask summary").click()
        find(browser, "#ask-compare").send_keys("another")
        find(browser, "#ask button").click()
        WebDriverWait(browser, 20).until(lambda _: len(browser.find_elements(By.CSS_SELECTOR, ".run")) == 2)

    def test_a_page_that_is_not_served_has_no_form(self, page: Chrome) -> None:
        assert not find(page, "#ask").is_displayed()


def test_an_empty_text_is_a_sentence(started: Chrome, serve: Callable[[], str]) -> None:
    # Not with the fixture `browser`: Chromium logs each answer of 400.
    started.get(serve())
    find(started, "#ask button").click()
    problem = find(started, "#ask-problem")
    WebDriverWait(started, 10).until(lambda _: problem.is_displayed())
    assert problem.text.startswith("text must hold at least one token")
    assert problem.get_attribute("role") == "alert"
