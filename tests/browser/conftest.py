"""A browser for all pages, and the inspector's page on tiny models."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from selenium import webdriver

from tests.browser.chromium import chromium, require_chromium, set_screen
from tests.report.inspected import NASTY, PLAIN

# Enough that the map has to be moved.
LONG = NASTY + PLAIN * 6


@pytest.fixture(scope="session")
def started() -> Iterator[webdriver.Chrome]:
    """One browser for all tests."""
    with chromium(*require_chromium()) as running:
        yield running


@pytest.fixture
def browser(started: webdriver.Chrome) -> Iterator[webdriver.Chrome]:
    """The browser at 900 pixels, light; what it complained of in the test fails the test."""
    set_screen(started, 900, 900)
    started.get_log("browser")
    yield started
    complaints = [entry["message"] for entry in started.get_log("browser")]
    started.get("about:blank")  # nothing of this page is there for the next test
    assert complaints == []
