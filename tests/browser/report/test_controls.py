"""Every control of the page of `lte report`, by mouse and by keyboard."""

from __future__ import annotations

import csv
import io

from selenium.webdriver import ActionChains, Chrome, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

from lte.report.points import find_tradeoffs
from lte.report.tables import csv_rows
from tests.browser.chromium import settle
from tests.browser.report.page import (
    MARKED,
    address,
    button,
    choose,
    click,
    drawn,
    focused,
    lm_records,
    move_to,
    panel,
    pinned,
    plot,
)
from tests.report.test_points import runs_of

LOSS = "Quality lost against cost, lm"


def press(page: Chrome, *keys: str) -> None:
    ActionChains(page).send_keys(*keys).perform()
    settle(page)


def open_results(page: Chrome) -> None:
    click(page, page.find_element(By.XPATH, "//summary[starts-with(., 'All results')]"))


def test_a_cell_leads_to_its_task(page: Chrome) -> None:
    choose(page, "Quality lost where", "80%")
    choose(page, "Cost", "FLOPs")
    click(page, page.find_element(By.CSS_SELECTOR, ".heat tr:last-child a"))
    WebDriverWait(page, 5).until(lambda _: page.execute_script("return document.body.dataset.shown") == "sst2")
    WebDriverWait(page, 5).until(lambda _: focused(page).text == "sst2")
    assert address(page) == {"share": "80%", "cost": "FLOPs", "task": "sst2", "pins": "1"}
    assert pinned(page) == ["A: lte, target 50%"]
    page.back()
    WebDriverWait(page, 5).until(lambda _: page.execute_script("return document.body.dataset.shown") == "lm")


def test_a_reload_keeps_what_was_chosen(page: Chrome) -> None:
    choose(page, "Task", "sst2")
    WebDriverWait(page, 5).until(lambda _: page.execute_script("return document.body.dataset.shown") == "sst2")
    choose(page, "Cost", "FLOPs")
    choose(page, "Range", "everything")
    choose(page, "Colours", "dark")
    kept = {"task": "sst2", "cost": "FLOPs", "range": "everything", "theme": "dark"}
    assert address(page) == kept
    page.refresh()
    WebDriverWait(page, 10).until(lambda _: page.execute_script("return document.body.dataset.ready"))
    assert address(page) == kept
    assert page.execute_script("return document.documentElement.dataset.theme") == "dark"
    assert page.find_element(By.ID, "task-name").text == "sst2"
    assert drawn(page, "Quality lost")["lte"] == [[0.5, 0.020000000000000018]]


def test_the_theme_changes_pictures_too(page: Chrome) -> None:
    script = "return echarts.getInstanceByDom(arguments[0]).getOption().series.map(({itemStyle}) => itemStyle?.color)"
    before = page.execute_script(script, plot(page, LOSS))
    choose(page, "Colours", "dark")
    after = page.execute_script(script, plot(page, LOSS))
    assert before[0] != after[0]
    choose(page, "Colours", "light")
    assert page.execute_script(script, plot(page, LOSS)) == before


def test_the_mouse_says_and_pins_a_point(page: Chrome) -> None:
    for name in ("Unpin lte, target 50%", "Unpin wanda, target 50%"):
        click(page, button(page, name))
    assert "Choose a point" in panel(page)
    assert address(page)["pins"] == "none"
    move_to(page, LOSS, [0.4, 1.0]).perform()
    script = """return echarts.getInstanceByDom(arguments[0]).getZr().storage.getDisplayList()
      .map(({style}) => style.text).filter((text) => text)"""
    wanted = {"lte, target 80%", "1.00 perplexity lost (1 seed)", "40% of the bytes read"}
    WebDriverWait(page, 5).until(lambda _: wanted <= set(page.execute_script(script, plot(page, LOSS))))
    move_to(page, LOSS, [0.4, 1.0]).click().perform()
    assert pinned(page) == ["A: lte, target 80%"]
    move_to(page, LOSS, [0.6, 0.5]).click().perform()
    assert pinned(page) == ["A: lte, target 80%", "B: lte, target 50%"]
    assert "config.train.eta 0.5 0.25" in " ".join(panel(page).split())


def test_the_keyboard_alone_reaches_cells_points_and_tables(page: Chrome) -> None:
    stops: dict[str, str] = {}
    for _ in range(60):
        press(page, Keys.TAB)
        place = focused(page)
        if place.tag_name == "body":
            break
        assert place.id not in stops, "each is reached once"
        stops[place.id] = place.accessible_name
        if place.get_attribute("class") == "plot" and stops[place.id].startswith(LOSS):
            press(page, Keys.ARROW_RIGHT, Keys.ARROW_DOWN, Keys.ARROW_RIGHT, Keys.ENTER)
            told = place.find_element(By.XPATH, "following::p[@aria-live][1]").get_property("textContent")
            assert "perplexity lost" in str(told)
            assert str(told).split("\n")[0] in " ".join(pinned(page))
    assert len(stops) < 30, stops
    cell = page.find_element(By.CSS_SELECTOR, ".heat a")
    page.execute_script("arguments[0].focus()", cell)
    press(page, Keys.ARROW_RIGHT)
    assert "wanda" in focused(page).get_attribute("title")
    press(page, Keys.HOME, Keys.ENTER)
    WebDriverWait(page, 5).until(lambda _: focused(page).get_attribute("id") == "task-name")


def test_zooming_and_back(page: Chrome) -> None:
    script = "return echarts.getInstanceByDom(arguments[0]).getOption().dataZoom.map(({start, end}) => end - start)"

    def shown() -> list[float]:
        return [round(each) for each in page.execute_script(script, plot(page, LOSS))]

    assert shown() == [100, 100]
    click(page, button(page, "Zoom in"))
    assert shown() == [70, 70]
    click(page, button(page, "Zoom out"))
    assert shown() == [98, 98]
    click(page, button(page, "Reset"))
    assert shown() == [100, 100]


def test_a_table_sorts_the_best_first_and_pins(page: Chrome) -> None:
    open_results(page)
    table = page.find_element(By.CSS_SELECTOR, "table.sortable")
    orders = {}
    for name in ("perplexity", "FFN sparsity", "bytes"):
        heading = table.find_element(By.XPATH, f".//th[button[.='{name}']]")
        orders[name] = []
        for _ in range(2):
            click(page, heading.find_element(By.TAG_NAME, "button"))
            column = table.find_elements(By.XPATH, ".//thead//th").index(heading)
            cells = [
                row.find_elements(By.XPATH, "*")[column].text
                for row in table.find_elements(By.CSS_SELECTOR, "tbody tr")
            ]
            orders[name].append((heading.get_attribute("aria-sort"), cells[0], cells[-1]))
    assert orders["perplexity"] == [("ascending", "20.00 ± 1.41", "30.00"), ("descending", "30.00", "20.00 ± 1.41")]
    assert orders["FFN sparsity"] == [("descending", "75.0%", "0.0%"), ("ascending", "0.0%", "75.0%")]
    assert orders["bytes"] == [("ascending", "40.0%", "-"), ("descending", "100.0%", "-")], "what is not known is last"
    click(page, table.find_element(By.XPATH, ".//button[.='lte-frozen']"))
    assert pinned(page)[-1] == "B: lte-frozen, target 80%"


def test_a_table_is_copied_unrounded_or_shown(page: Chrome) -> None:
    allowed = {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    page.execute_cdp_cmd("Browser.grantPermissions", allowed)
    open_results(page)
    copy = page.find_element(By.XPATH, "//button[.='Copy as CSV']")
    click(page, copy)
    state = page.find_element(By.CSS_SELECTOR, ".controls [role=status]")
    WebDriverWait(page, 5).until(lambda _: "6 rows" in state.text)
    text = page.execute_async_script("navigator.clipboard.readText().then(arguments[0])")
    found = list(csv.DictReader(io.StringIO(text)))
    expected = csv_rows(find_tradeoffs(runs_of(*lm_records()))[0])
    assert [row["curve"] for row in found] == [row["curve"] for row in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert float(ours["value"]) == theirs["value"]
        assert (ours["megabytes"] == "") == (theirs["megabytes"] is None)
    page.execute_script("navigator.clipboard.writeText = () => Promise.reject(new Error('refused'))")
    click(page, copy)
    area = WebDriverWait(page, 5).until(lambda _: page.find_element(By.CSS_SELECTOR, "textarea"))
    assert str(area.get_property("value")).startswith("task,split,model,metric,curve")


def test_a_picture_is_saved(page: Chrome) -> None:
    page.execute_script(
        "window.saved = []; HTMLAnchorElement.prototype.click = function () { saved.push([this.download, this.href]); }"
    )
    click(page, plot(page, LOSS).find_element(By.XPATH, "following::summary[1]"))
    for kind in ("PNG", "SVG"):
        click(page, button(page, f"Save as {kind}"))
    (png, image), (svg, drawing) = page.execute_script("return saved")
    assert (png, svg) == tuple(f"quality-lost-against-cost-lm-test-tiny-perplexity.{kind}" for kind in ("png", "svg"))
    assert image.startswith("data:image/png;base64,")
    assert drawing.startswith("data:image/svg+xml")
    assert "LTE" in drawing


def test_failed_runs_are_listed_with_their_command(page: Chrome) -> None:
    click(page, page.find_element(By.XPATH, "//summary[contains(., 'failed runs')]"))
    text = page.find_element(By.ID, "task").text
    assert "cats, seed 0: out of memory lte eval cats" in text
    assert MARKED in text
