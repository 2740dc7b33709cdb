"""The inspector's page in a real browser: its numbers, and every control by mouse and by keyboard."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from selenium.webdriver import ActionChains, Chrome, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.select import Select
from selenium.webdriver.support.wait import WebDriverWait

from tests.browser.chromium import save_screenshot, set_screen, settle
from tests.report.inspected import NASTY


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


@pytest.fixture
def page(browser: Chrome, pages: dict[str, str]) -> Chrome:
    open_page(browser, pages["one"])
    return browser


class TestNumbers:
    def test_the_overview(self, page: Chrome, run: dict[str, Any]) -> None:
        rows = dict(table_rows(find(page, "#overview .scroll")))
        active = active_of(run)
        shares = active.mean((0, 2))
        assert rows["tokens"] == str(len(run["ids"]))
        assert rows["FFN neurons used per token"] == f"{100 * active.mean():.2f}%"
        least, most = (float(value.strip(" %")) for value in rows["least, most of a token"].split(","))
        assert (least, most) == pytest.approx((100 * shares.min(), 100 * shares.max()), abs=0.051)
        flops = sum(run["cost"]["flops"].values()) / sum(run["cost"]["dense_flops"].values())
        assert rows["FLOPs over dense"] == f"{100 * flops:.2f}%"

    def test_every_token_and_its_experts(self, page: Chrome, run: dict[str, Any]) -> None:
        active = active_of(run)
        layers, _, experts = active.shape
        for token in (0, 3, 40):
            choose_token(page, token)
            on = int(active[:, token].sum())
            assert f": {on} of {layers * experts} experts are on, {100 * on / (layers * experts):.1f}%" in told(
                page, "The text"
            )
            rows = open_table(page, "Experts of the token")
            lists = [", ".join(map(str, np.flatnonzero(active[layer, token]))) or "none" for layer in range(layers)]
            counts = active[:, token].sum(-1)
            assert rows == [[str(i), f"{counts[i]} of {experts}", lists[i]] for i in range(layers)]

    def test_the_map(self, page: Chrome, run: dict[str, Any]) -> None:
        counts = active_of(run).sum(-1)
        rows = open_table(page, "Layer by layer")
        assert 5 < len(rows) < len(run["ids"])
        for row in rows:
            assert [int(value) for value in row[2:]] == counts[:, int(row[0]) - 1].tolist()

    def test_an_expert(self, page: Chrome, run: dict[str, Any]) -> None:
        reference = run["reference"]
        shape = (run["layers"], run["experts"])
        use = np.frombuffer(base64.b64decode(reference["use"]), "<f4").reshape(shape)
        positions = np.frombuffer(base64.b64decode(reference["positions"]), "<i4").reshape(*shape, -1)
        scores = np.frombuffer(base64.b64decode(reference["scores"]), "<f4").reshape(*shape, -1)
        box = panel(page, "One expert")
        layer, expert = (Select(each) for each in box.find_elements(By.TAG_NAME, "select"))
        layer.select_by_index(1)
        expert.select_by_index(4)
        total = len(reference["tokens"]["ids"])
        assert f"Expert 4 of layer 1 is on for {100 * use[1, 4]:.1f}% of the {total} tokens" in told(page, "One expert")
        kept = positions[1, 4][positions[1, 4] >= 0]
        rows = table_rows(find(box, ".scroll"))
        assert [row[2] for row in rows] == [f"{score:.3f}" for score in scores[1, 4][: len(kept)]]
        assert [row[0] for row in rows] == [reference["tokens"]["tokens"][position].strip() for position in kept]
        assert "The reference text is book.txt." in box.text
        assert len(open_table(page, "One expert")) == run["experts"]

    def test_costs(self, page: Chrome, run: dict[str, Any]) -> None:
        rows = {row[0]: [float(value) for value in row[1:]] for row in open_table(page, "What the routers cost")}
        cost = run["cost"]
        for part, name in (("attention", "attention"), ("ffn", "FFN"), ("routers", "routers")):
            expected = [cost["dense_flops"][part] / 2**30, cost["flops"][part] / 2**30]
            expected += [cost["dense_bytes"][part] / 2**20, cost["bytes"][part] / 2**20]
            assert rows[name] == pytest.approx(expected, rel=1e-3)
        assert rows["together"][1] == pytest.approx(sum(cost["flops"].values()) / 2**30, rel=1e-3)


class TestText:
    def test_a_prompt_stays_text(self, page: Chrome, run: dict[str, Any]) -> None:
        assert page.title == "What a model learned to skip"
        assert not page.find_elements(By.CSS_SELECTOR, "#main script, #main b, #main i")
        assert "<i>text</i>.txt" in page.find_element(By.CSS_SELECTOR, ".run h2").text
        shown = find(page, ".token-text").get_attribute("textContent")
        assert "<script>document.title = 'taken'</script> & <b>open</b>" in shown
        options = page.find_elements(By.CSS_SELECTOR, "[role=option]")
        assert len(options) == len(run["ids"])

    def test_signs_for_what_has_none(self, page: Chrome) -> None:
        shown = find(page, ".token-text").get_attribute("textContent")
        assert "⏎\n" in shown
        assert "⇥" in shown
        # A smiley is four tokens: the character, and its three further bytes as the vocabulary writes them.
        assert re.search("😀(\u2039[^\u203a]+\u203a){3}", shown)
        assert "\n" in NASTY
        assert "◌\u0301" in shown


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


class TestReading:
    def test_every_control_has_a_name_and_every_picture_a_sentence(self, page: Chrome) -> None:
        for control in page.find_elements(By.CSS_SELECTOR, "select, input, button, summary, [role=listbox]"):
            if control.is_displayed():
                assert control.accessible_name, control.get_attribute("outerHTML")[:80]
        plots = page.find_elements(By.CSS_SELECTOR, ".plot")
        assert len(plots) == 5
        for plot in plots:
            assert plot.get_attribute("role") == "img"
            assert plot.accessible_name
            captions = plot.find_elements(By.XPATH, "following::p[@class='caption'][1]")
            assert len(captions[0].text.split(".")) == 2 or captions[0].text.endswith("expert.")
        levels = [
            int(each.tag_name[1]) for each in page.find_elements(By.CSS_SELECTOR, "h1, h2, h3") if each.is_displayed()
        ]
        assert levels[0] == 1
        assert all(after - before <= 1 for before, after in pairwise(levels))
        assert len(page.find_elements(By.CSS_SELECTOR, "[aria-live=polite]")) == 2

    @pytest.mark.parametrize("name", ["one", "two"])
    @pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
    @pytest.mark.parametrize("width", [360, 900, 1600])
    def test_it_fits_the_screen(
        self, width: int, dark: bool, name: str, browser: Chrome, pages: dict[str, str], screenshots: Path
    ) -> None:
        set_screen(browser, width, 900, dark)
        open_page(browser, pages[name])
        save_screenshot(browser, screenshots / f"{name}.png", width, dark)
        for details in browser.find_elements(By.TAG_NAME, "details"):
            browser.execute_script("arguments[0].open = true", details)
        settle(browser)
        assert browser.execute_script("return document.documentElement.scrollWidth") == width
        with Image.open(screenshots / f"{name}.png") as image:
            assert image.width == width
            red, green, blue = image.convert("RGB").getpixel((2, 2))
            assert (red + green + blue < 200) == dark

    def test_how_long_it_loads(self, page: Chrome) -> None:
        def loaded(_: Chrome) -> float:
            return page.execute_script("return performance.getEntriesByType('navigation')[0].loadEventEnd")

        print(f"the page loaded in {WebDriverWait(page, 10).until(loaded):.0f} ms")


class TestComparison:
    def test_two_texts(self, browser: Chrome, pages: dict[str, str], run: dict[str, Any]) -> None:
        set_screen(browser, 1600, 900)
        open_page(browser, pages["two"])
        columns = browser.find_elements(By.CSS_SELECTOR, ".run")
        assert [find(column, "h2").text for column in columns] == ["A: <i>text</i>.txt, tiny", "B: other.txt, tiny"]
        assert columns[0].location["y"] == columns[1].location["y"]
        rows = table_rows(find(browser, "#overview .scroll"))
        tokens = rows[0]
        assert int(tokens[1]) == len(run["ids"])
        assert tokens[3] == f"\N{MINUS SIGN}{int(tokens[1]) - int(tokens[2])}"
        used = next(row for row in rows if row[0] == "FFN neurons used per token")
        difference = float(used[2][:-1]) - float(used[1][:-1])
        assert float(used[3].removesuffix(" points").replace("\N{MINUS SIGN}", "-")) == pytest.approx(
            difference, abs=0.011
        )
        before = columns[1].find_element(By.CSS_SELECTOR, ".told").text
        find(browser, "#token-0-9").click()
        assert columns[1].find_element(By.CSS_SELECTOR, ".told").text == before

    def test_two_models_choose_the_same_token(self, browser: Chrome, pages: dict[str, str]) -> None:
        open_page(browser, pages["models"])
        choose_token(browser, 11)
        texts = [find(column, ".told").text for column in browser.find_elements(By.CSS_SELECTOR, ".run")]
        assert all(text.startswith("Token 12 of ") for text in texts)
        assert texts[0] != texts[1]


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
