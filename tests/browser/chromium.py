"""Debian's Chromium, driven by selenium: headless, with an empty profile and nothing running in the background."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
]
MISSING = "browser tests need Chromium and its driver, not found here: apt-get install chromium chromium-driver"


def in_ci() -> bool:
    """Whether this runs in continuous integration, which sets `CI`."""
    return os.environ.get("CI", "") not in ("", "0", "false")


def find_chromium() -> tuple[str, str] | None:
    """The paths of the browser and of its driver, if both are installed."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    driver = shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


def require_chromium() -> tuple[str, str]:
    """As `find_chromium`; without it tests are skipped, and fail in continuous integration."""
    found = find_chromium()
    if found is None:
        if in_ci():
            pytest.fail(MISSING)
        pytest.skip(MISSING)
    return found


@contextmanager
def chromium(browser: str, driver: str) -> Iterator[webdriver.Chrome]:
    """A browser in a new, empty profile."""
    with tempfile.TemporaryDirectory() as profile:
        options = Options()
        options.binary_location = browser
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        started = webdriver.Chrome(options=options, service=Service(driver))
        try:
            yield started
        finally:
            started.quit()


def set_screen(browser: webdriver.Chrome, width: int, height: int, dark: bool = False) -> None:
    """Gives the page a width and height in CSS pixels, and the system a theme."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [theme]})


def save_screenshot(browser: webdriver.Chrome, path: Path, width: int, dark: bool = False) -> None:
    """The whole page at a width, as a PNG."""
    set_screen(browser, width, 1000, dark)
    settle(browser)
    set_screen(browser, width, browser.execute_script("return document.documentElement.scrollHeight"), dark)
    settle(browser)
    path.parent.mkdir(parents=True, exist_ok=True)
    browser.save_screenshot(str(path))


def settle(browser: webdriver.Chrome) -> None:
    """Waits until the page is not busy any more, and two frames were drawn."""
    browser.execute_async_script("""const [done] = arguments;
      const next = (frames) => requestAnimationFrame(() =>
        ('busy' in document.body.dataset ? next(2) : frames ? next(frames - 1) : done()));
      next(1);""")
