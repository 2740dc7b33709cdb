"""Every control of the inspector's page by mouse and by keyboard."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from selenium.webdriver import ActionChains, Chrome, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.support.select import Select
from selenium.webdriver.support.wait import WebDriverWait

from tests.browser.chromium import set_screen, settle
from tests.browser.inspector.page import (
    active_of,
    choose_token,
    find,
    open_page,
    open_table,
    panel,
    pick,
    press,
    state,
    tab_to,
    tints,
    told,
    told_expert,
    unpack,
)


class TestControls:
    def test_choosing_a_token_by_mouse_and_keys(self, page: Chrome, run: dict[str, Any]) -> None:
        find(page, "#token-0-4").click()
        assert told(page).startswith("This is token 5 of ")
        box = find(page, ".token-text")
        tab_to(page, box)
        last = len(run["ids"])
        steps = [(Keys.ARROW_RIGHT, 6), (Keys.ARROW_LEFT, 5), (Keys.PAGE_DOWN, 15), (Keys.PAGE_UP, 5)]
        for key, expected in [*steps, (Keys.END, last), (Keys.ARROW_RIGHT, last), (Keys.HOME, 1), (Keys.ARROW_LEFT, 1)]:
            press(page, key)
            assert told(page).startswith(f"This is token {expected} of "), key
            chosen = page.find_elements(By.CSS_SELECTOR, "[aria-selected=true]")
            assert [each.get_attribute("id") for each in chosen] == [f"token-0-{expected - 1}"]
            assert box.get_attribute("aria-activedescendant") == f"token-0-{expected - 1}"
            assert state(page)["token"] == str(expected - 1)
        press(page, Keys.ARROW_DOWN)
        assert int(state(page)["token"]) > 0
        press(page, Keys.ARROW_UP)
        assert told(page).startswith("This is token 1 of ")

    def test_the_chosen_token_is_in_sight_at_once(
        self, browser: Chrome, pages: dict[str, str], run: dict[str, Any]
    ) -> None:
        set_screen(browser, 500, 400)
        open_page(browser, f"{pages['one']}#token={len(run['ids']) - 1}")
        inside = """const [box, token] = ['.token-text', '[aria-selected=true]'].map((name) =>
            document.querySelector(name).getBoundingClientRect());
            return token.top >= box.top && token.bottom <= box.bottom"""
        assert browser.execute_script(inside)

    def test_colouring(self, page: Chrome, run: dict[str, Any]) -> None:
        colouring = find(page, ".text select")
        assert len({tint for tint, _ in tints(page)}) > 5
        active = active_of(run)
        tab_to(page, colouring)
        press(page, "whether")
        layer, expert = (
            int(Select(find(page, f"[data-pick={name}]")).first_selected_option.text) for name in ("layer", "expert")
        )
        on = active[layer, :, expert]
        strong = [tint for tint, _ in tints(page)]
        assert {strong[i] for i in np.flatnonzero(~on)} == {0}
        assert min(strong[i] for i in np.flatnonzero(on)) > 20
        for name in ("surprise", "entropy", "layer"):
            Select(colouring).select_by_value(name)
            assert state(page)["colour"] == name
            assert len({tint for tint, _ in tints(page)}) > 2
            assert ", more" in find(page, ".text .legend").text
        entropy = unpack(run["next"]["entropy"], "<f4")
        Select(colouring).select_by_value("entropy")
        assert [less for _, less in tints(page)] == (entropy < entropy.mean()).tolist()

    def test_the_slider_of_the_threshold(self, page: Chrome, run: dict[str, Any]) -> None:
        steps = run["what_if"]
        slider, reset = find(page, ".text input[type=range]"), find(page, ".text button")
        assert not reset.is_enabled()
        before = tints(page)
        tab_to(page, slider)
        press(page, Keys.HOME)
        share = unpack(steps["counts"], "<u2", len(steps["thresholds"]), -1)[0].mean() / run["layers"] / run["experts"]
        assert f"threshold {steps['thresholds'][0]:.3f}: {100 * share:.1f}% of the neurons" in find(page, "output").text
        assert state(page)["step"] == "0"
        assert tints(page) != before
        assert "at the slider" in find(page, ".side .sideways").text
        reset.click()
        assert tints(page) == before
        assert "step" not in state(page)
        assert "the model\N{RIGHT SINGLE QUOTATION MARK}s own" in find(page, "output").text

    def test_picking_in_the_pictures(self, page: Chrome, run: dict[str, Any]) -> None:
        choose_token(page, 0)
        box = panel(page, "The whole text")
        pick(page, box, 7, 1)
        assert state(page)["layer"] == "1"
        # Of the tokens of the column it is the one that used most.
        group = -(-len(run["ids"]) // len(open_table(box)))
        totals = active_of(run).sum((0, 2))[7 * group : 8 * group]
        assert state(page)["token"] == str(7 * group + int(totals.argmax()))
        pick(page, find(page, ".side"), 5, 0)
        assert told_expert(page).startswith("Expert 5 of layer 0")
        entropy, shares = unpack(run["next"]["entropy"], "<f4"), active_of(run).mean((0, 2))
        extreme = int(entropy.argmin())
        pick(page, find(panel(page, "Does it spend"), ".columns > :last-child"), entropy[extreme], shares[extreme])
        assert state(page)["token"] == str(extreme)
        thresholds = run["what_if"]["thresholds"]
        share = unpack(run["what_if"]["counts"], "<u2", len(thresholds), -1)[8].mean() / run["layers"] / run["experts"]
        pick(page, panel(page, "What other thresholds"), thresholds[8], float(share))
        assert state(page)["step"] == "8"

    def test_pictures_by_keyboard(self, page: Chrome) -> None:
        plot = find(find(page, ".side"), ".plot")
        tab_to(page, plot)
        press(page, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ENTER)
        assert told_expert(page).startswith("Expert 1 of layer 0")
        plot = find(panel(page, "The whole text"), ".plot")
        tab_to(page, plot)
        press(page, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ENTER)
        assert state(page)["layer"] == "1"

    def test_finding_an_expert(self, page: Chrome, run: dict[str, Any]) -> None:
        box = panel(page, "Atlas")
        field = find(box, "input")
        tab_to(page, field)
        press(page, "1.3")
        found = box.find_elements(By.CSS_SELECTOR, ".experts button")
        assert [each.text.split(" ")[0] for each in found] == ["1.3"]
        press(page, Keys.TAB)
        press(page, Keys.ENTER)
        assert told_expert(page).startswith("Expert 3 of layer 1")
        field.clear()
        field.send_keys("3")
        assert f"{run['layers']} of " in find(box, "p[aria-live]").text
        field.clear()
        field.send_keys("e")
        words = [each.text for each in box.find_elements(By.CSS_SELECTOR, ".experts button")]
        assert words
        field.clear()
        field.send_keys("dead")
        use = unpack(run["reference"]["use"], "<f4")
        assert f"{(use == 0).sum()} of {use.size} experts" in find(box, "p[aria-live]").text
        assert state(page)["find"] == "dead"

    def test_unusual_experts(self, page: Chrome, run: dict[str, Any]) -> None:
        active = active_of(run)
        use = unpack(run["reference"]["use"], "<f4", run["layers"], run["experts"])
        rare = (active & (use <= 0.25)[:, None]).any((0, 2))
        choose_token(page, int(np.flatnonzero(rare)[0]))
        button = find(page, ".side .choices button")
        name = button.text.split(",")[0].split(".")
        page.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
        button.click()
        assert told_expert(page).startswith(f"Expert {name[1]} of layer {name[0]}")

    def test_the_address_brings_everything_back(self, page: Chrome) -> None:
        choose_token(page, 9)
        Select(find(page, ".text select")).select_by_value("surprise")
        Select(find(page, ".page-header select")).select_by_visible_text("dark")
        find(page, "[type=search]").send_keys("1.2")
        assert state(page)["find"] == "1.2"
        address = page.current_url
        open_page(page, address)
        assert told(page).startswith("This is token 10 of ")
        assert Select(find(page, ".text select")).first_selected_option.text == "surprise of what came"
        assert page.execute_script("return document.documentElement.dataset.theme") == "dark"
        assert len(page.find_elements(By.CSS_SELECTOR, ".experts button")) == 1
        # One that says what is not there is as one that says nothing.
        open_page(page, address.partition("#")[0] + "#token=99999&layer=x&colour=none&step=500&expert=-1")
        assert "token " in told(page)

    def test_pictures_are_saved(self, page: Chrome) -> None:
        page.execute_script(
            "HTMLAnchorElement.prototype.click = function () { window.saved = [this.download, this.href.slice(0, 40)] }"
        )
        box = panel(page, "The whole text")
        page.execute_script("arguments[0].open = true", find(box, "details"))
        for kind, head in (("PNG", "data:image/png;base64"), ("SVG", "data:image/svg+xml")):
            page.execute_script("arguments[0].click()", box.find_element(By.XPATH, f".//button[.='Save as {kind}']"))
            name, address = page.execute_script("return window.saved")
            assert name.endswith(f".{kind.lower()}")
            assert address.startswith(head)
        # Also one that was not on the screen yet.
        plots = page.find_elements(By.CSS_SELECTOR, ".plot")
        undrawn = [plot for plot in plots if not plot.find_elements(By.TAG_NAME, "canvas")]
        assert undrawn
        page.execute_script(
            "saved = null; arguments[0].parentNode.querySelector('details button').click()", undrawn[-1]
        )
        assert page.execute_script("return window.saved")[1].startswith("data:image/png;base64")


class TestServed:
    def test_a_text_that_is_typed(self, browser: Chrome, serve: Callable[[], str]) -> None:
        browser.get(serve())
        assert not browser.find_elements(By.CSS_SELECTOR, ".inspector")
        field = find(browser, "#ask-text")
        tab_to(browser, field)
        press(browser, "while <b>the</b> file")
        ActionChains(browser).key_down(Keys.CONTROL).send_keys(Keys.ENTER).key_up(Keys.CONTROL).perform()
        wait = WebDriverWait(browser, 20)
        wait.until(lambda _: browser.find_elements(By.CSS_SELECTOR, ".inspector"))
        assert (
            "while <b>the</b> file" in find(browser, ".token-text").get_attribute("textContent")
            or "while" in browser.page_source
        )
        browser.refresh()
        assert find(browser, "#ask-text").get_attribute("value") == "while <b>the</b> file"
        wait.until(lambda _: browser.find_elements(By.CSS_SELECTOR, ".inspector"))
        find(browser, "#ask summary").click()
        find(browser, "#ask-compare").send_keys("while another file")
        find(browser, "#ask-inspect").click()
        wait.until(lambda _: len(browser.find_elements(By.CSS_SELECTOR, ".inspector .token-text")) == 2)

    def test_an_example_and_a_text_that_the_model_continues(self, browser: Chrome, serve: Callable[[], str]) -> None:
        browser.get(serve())
        example = find(browser, "[data-example]")
        example.click()
        wait = WebDriverWait(browser, 20)
        wait.until(lambda _: browser.find_elements(By.CSS_SELECTOR, ".inspector"))
        assert find(browser, "#ask-text").get_attribute("value") == example.get_attribute("data-example")
        read = len(browser.find_elements(By.CSS_SELECTOR, "[id^=token-0-]"))
        wait.until(lambda _: find(browser, "#ask-generate").is_enabled())
        find(browser, "#ask-generate").click()
        wait.until(lambda _: "continued" in find(browser, "#page > .told").text)
        assert len(browser.find_elements(By.CSS_SELECTOR, ".live")) > 3
        assert len(browser.find_elements(By.CSS_SELECTOR, "[id^=token-0-]")) > read
        assert find(browser, ".live").get_attribute("title").endswith("%")

    def test_a_text_that_is_stopped(self, browser: Chrome, serve: Callable[[], str]) -> None:
        browser.get(serve())
        find(browser, "#ask-text").send_keys("while")
        browser.execute_script(
            "for (const name of ['generate', 'stop']) document.getElementById(`ask-${name}`).click()"
        )
        wait = WebDriverWait(browser, 20)
        wait.until(lambda _: find(browser, "#ask-state").text == "Stopped.")
        assert not find(browser, "#ask-problem").is_displayed()
        assert not find(browser, "#ask-stop").is_displayed()
        tab_to(browser, find(browser, "#ask-inspect"))
        press(browser, Keys.ENTER)
        wait.until(lambda _: browser.find_elements(By.CSS_SELECTOR, ".inspector"))

    def test_a_page_that_is_not_served_has_no_form(self, page: Chrome) -> None:
        assert not find(page, "#ask").is_displayed()


def test_an_empty_text_is_a_sentence(started: Chrome, serve: Callable[[], str]) -> None:
    # Not with the fixture `browser`: Chromium logs each answer of 400.
    started.get(serve())
    find(started, "#ask-inspect").click()
    problem = find(started, "#ask-problem")
    WebDriverWait(started, 10).until(lambda _: problem.is_displayed())
    assert problem.text.startswith("text must hold at least one token")
    assert problem.get_attribute("role") == "alert"
    settle(started)
