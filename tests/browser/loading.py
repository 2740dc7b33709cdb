"""How long a page takes until it is drawn, by the browser's own clock."""

from __future__ import annotations

from selenium.webdriver import Chrome
from selenium.webdriver.support.wait import WebDriverWait

from tests.browser.chromium import in_ci, set_screen

# Milliseconds since the navigation began, at the third frame after all scripts ran: what they drew in the first two,
# in frames that they asked for too, is on the screen. A page that unpacks its data first says that it is busy.
MARK = """addEventListener('load', () => {
  let frames = 3;
  const isBusy = () => 'busy' in document.body.dataset || frames-- > 0;
  const next = () => (isBusy() ? requestAnimationFrame(next) : performance.mark('drawn'));
  next();
});"""


def drawn_after_ms(browser: Chrome, address: str) -> float:
    """Opens a page at the size of a laptop's screen; the time from the start of the navigation until it is drawn."""
    set_screen(browser, 1600, 900)
    browser.get("about:blank")
    script = browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": MARK})
    browser.get(address)
    marks = "return performance.getEntriesByName('drawn').map(({startTime}) => startTime)"
    (time,) = WebDriverWait(browser, 60).until(lambda _: browser.execute_script(marks))
    browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)
    empty = "return [...document.querySelectorAll('.plot')].filter((plot) => plot.checkVisibility() && "
    empty += "!plot.querySelector('canvas')).length"
    assert browser.execute_script(empty) == 0, "a picture was not drawn"
    return time


def check_loads_within_ms(browser: Chrome, address: str, limit: float, loads: int = 3) -> None:
    """Prints how long a page takes, the fastest of some loads, and fails above a limit; in CI, which is no place to
    time anything, it only prints.
    """
    times = [drawn_after_ms(browser, address) for _ in range(loads)]
    print(f"drawn after {', '.join(f'{time:.0f}' for time in times)} ms")
    assert in_ci() or min(times) < limit, f"drawn after {min(times):.0f} ms, the limit is {limit:.0f}"
