"""How long a page takes until it is drawn, by the browser's own clocks."""

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

# The pictures whose upper edge is on the screen and that are not drawn.
EMPTY = """return [...document.querySelectorAll('.plot')].filter((plot) => {
  const { x, y } = plot.getBoundingClientRect();
  return plot.contains(document.elementFromPoint(x + 2, y + 2)) && !plot.querySelector('canvas');
}).map((plot) => plot.getAttribute('aria-label'));"""


def drawn_after_ms(browser: Chrome, address: str) -> tuple[float, float]:
    """Opens a page at the size of a laptop's screen until it is drawn.

    Returns:
        The CPU time of the page's main thread, which other work on the machine hardly changes, and the time on the
        clock since the start of the navigation.
    """
    set_screen(browser, 1600, 900)
    browser.get("about:blank")
    browser.execute_cdp_cmd("Performance.disable", {})
    browser.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
    script = browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": MARK})
    browser.get(address)
    marks = "return performance.getEntriesByName('drawn').map(({startTime}) => startTime)"
    (time,) = WebDriverWait(browser, 60).until(lambda _: browser.execute_script(marks))
    metrics = browser.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)
    assert browser.execute_script(EMPTY) == [], "a picture on the screen was not drawn"
    return 1000 * next(each["value"] for each in metrics if each["name"] == "TaskDuration"), time


def check_loads_within_ms(browser: Chrome, address: str, limit: float, loads: int = 3) -> None:
    """Prints how long a page takes, and fails where the least CPU time of some loads is above a limit; in CI, which is
    no place to time anything, it only prints.
    """
    times = [drawn_after_ms(browser, address) for _ in range(loads)]
    print("; ".join(f"drawn after {clock:.0f} ms, {cpu:.0f} ms of the CPU" for cpu, clock in times))
    least = min(cpu for cpu, _ in times)
    assert in_ci() or least < limit, f"drawn after {least:.0f} ms of the CPU, the limit is {limit:.0f}"
