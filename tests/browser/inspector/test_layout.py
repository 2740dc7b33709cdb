"""How the inspector's page reads and fits the screen."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By

from lte.report.inspector import inspector_data, inspector_page
from tests.browser.chromium import save_screenshot, set_screen, settle
from tests.browser.inspector.page import open_page
from tests.browser.labels import cut_labels
from tests.browser.loading import check_loads_within_ms
from tests.report.inspected import large_run


class TestReading:
    def test_every_control_has_a_name_and_every_picture_a_sentence(self, page: Chrome) -> None:
        for control in page.find_elements(By.CSS_SELECTOR, "select, input, button, summary, [role=listbox]"):
            if control.is_displayed():
                assert control.accessible_name, control.get_attribute("outerHTML")[:80]
        plots = page.find_elements(By.CSS_SELECTOR, ".plot")
        assert len(plots) == 5
        for plot in plots:
            assert plot.get_attribute("role") == "application"
            assert plot.accessible_name
            captions = plot.find_elements(By.XPATH, "following::p[@class='caption'][1]")
            assert len(captions[0].text.split(".")) == 2 or captions[0].text.endswith("expert.")
        levels = [
            int(each.tag_name[1]) for each in page.find_elements(By.CSS_SELECTOR, "h1, h2, h3") if each.is_displayed()
        ]
        assert levels[0] == 1
        assert all(after - before <= 1 for before, after in pairwise(levels))
        assert len(page.find_elements(By.CSS_SELECTOR, "[aria-live=polite]:not(.unseen)")) == 2

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
        assert cut_labels(browser) == []
        with Image.open(screenshots / f"{name}.png") as image:
            assert image.width == width
            red, green, blue = image.convert("RGB").getpixel((2, 2))
            assert (red + green + blue < 200) == dark


def test_2000_tokens_load_within_2_seconds(browser: Chrome, run: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "large.html"
    path.write_text(inspector_page(inspector_data([large_run(run)])), encoding="utf-8")
    check_loads_within_ms(browser, path.as_uri(), 2000)
    assert len(browser.find_elements(By.CSS_SELECTOR, "[role=option]")) == 2000
