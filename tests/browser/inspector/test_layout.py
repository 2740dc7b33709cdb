"""How the inspector's page reads and fits the screen."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome, Keys
from selenium.webdriver.common.by import By

from lte.report.inspector import inspector_data, inspector_page
from tests.browser.axe import serious_findings
from tests.browser.chromium import set_screen, settle
from tests.browser.inspector.page import find, open_page, press, tab_to
from tests.browser.labels import cut_labels
from tests.browser.loading import check_loads_within_ms
from tests.report.inspected import large_run


class TestReading:
    def test_every_control_has_a_name_and_every_picture_a_sentence(self, page: Chrome) -> None:
        for control in page.find_elements(By.CSS_SELECTOR, "select, input, button, summary, [role=listbox]"):
            if control.is_displayed():
                assert control.accessible_name, control.get_attribute("outerHTML")[:80]
        plots = page.find_elements(By.CSS_SELECTOR, ".plot")
        assert len(plots) == 6
        for plot in plots:
            assert plot.get_attribute("role") == "application"
            assert plot.accessible_name
            assert plot.find_element(By.XPATH, "following::p[@class='caption'][1]").text.endswith(".")
        levels = [
            int(each.tag_name[1]) for each in page.find_elements(By.CSS_SELECTOR, "h1, h2, h3") if each.is_displayed()
        ]
        assert levels[0] == 1
        assert all(after - before <= 1 for before, after in pairwise(levels))

    @pytest.mark.parametrize("name", ["one", "two"])
    def test_nothing_serious_keeps_people_out(self, browser: Chrome, pages: dict[str, str], name: str) -> None:
        for dark in (False, True):
            set_screen(browser, 1440, 900, dark)
            open_page(browser, pages[name])
            assert serious_findings(browser) == []

    @pytest.mark.parametrize("name", ["one", "two"])
    @pytest.mark.parametrize("width", [390, 800, 1440])
    def test_it_fits_the_screen(self, width: int, name: str, browser: Chrome, pages: dict[str, str]) -> None:
        # High enough that all pictures are on the screen, and drawn.
        set_screen(browser, width, 20_000, dark=width == 800)
        open_page(browser, pages[name])
        browser.execute_script("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
        settle(browser)
        assert browser.execute_script("return document.documentElement.scrollWidth") == width
        assert len(browser.find_elements(By.CSS_SELECTOR, ".plot canvas")) >= 6
        assert cut_labels(browser) == []

    def test_the_text_comes_first_and_the_panel_stays_beside_it(self, browser: Chrome, pages: dict[str, str]) -> None:
        set_screen(browser, 1440, 900)
        open_page(browser, pages["one"])
        text, side = find(browser, ".token-text"), find(browser, ".side")
        assert text.location["y"] < 400
        top = "return arguments[0].getBoundingClientRect().top"
        browser.execute_script("scrollTo(0, 1200)")
        settle(browser)
        assert 0 <= browser.execute_script(top, side) < 20

    def test_off_is_the_quiet_colour_in_both_themes(self, page: Chrome) -> None:
        def distance(name: str) -> float:
            shades = "[arguments[0], 'panel'].map((one) => Shell.colour(one).match(/\d+/g).map(Number))"
            script = f"return {shades}"
            shade, paper = page.execute_script(script, name)
            return sum(abs(a - b) for a, b in zip(shade, paper, strict=True))

        for dark in (False, True):
            set_screen(page, 900, 900, dark)
            settle(page)
            assert distance("off") < distance("usual") < distance("more")


def test_2000_tokens_load_quickly(browser: Chrome, run: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "large.html"
    path.write_text(inspector_page(inspector_data([large_run(run)])), encoding="utf-8")
    check_loads_within_ms(browser, path.as_uri(), 400)
    assert len(browser.find_elements(By.CSS_SELECTOR, "[role=option]")) == 2000
    # What is not on the screen waits: tables until they are opened, pictures until they are reached.
    assert browser.execute_script("return document.getElementsByTagName('*').length") < 2600
    drawn = browser.find_elements(By.XPATH, "//*[contains(@class, 'plot')][.//canvas]")
    assert [each.accessible_name[:11] for each in drawn] == ["Map of the "] * 2
    # An arrow key, until the next frame is drawn.
    tab_to(browser, find(browser, ".token-text"))
    press(browser, Keys.HOME)
    script = """const done = arguments[0];
        const box = document.querySelector('.token-text');
        const start = performance.now();
        let left = 20;
        const step = () => {
          if (!left--) { done((performance.now() - start) / 20); return; }
          box.dispatchEvent(new KeyboardEvent('keydown', { key: 'ArrowRight' }));
          requestAnimationFrame(step);
        };
        step();"""
    taken = browser.execute_async_script(script)
    print(f"an arrow key takes {taken:.0f} ms")
    assert find(browser, "[aria-selected=true]").get_attribute("id") == "token-0-20"
