"""Every control of the page of `lte report` by mouse and by keyboard."""

from __future__ import annotations

import csv
import io

from selenium.webdriver import ActionChains, Chrome, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.support.select import Select
from selenium.webdriver.support.wait import WebDriverWait

from lte.report.points import find_tradeoffs
from lte.report.tables import csv_rows
from tests.browser.report.page import (
    MARKED,
    chip,
    click,
    details_text,
    drawn,
    lm_records,
    looks,
    method_column,
    move_to,
    plots,
    section,
)
from tests.report.test_points import runs_of


def test_the_arrow_keys_switch_the_axis(page: Chrome) -> None:
    radio = section(page, "tradeoff").find_element(By.CSS_SELECTOR, "input[value=sparsity]")
    click(page, radio)
    ActionChains(page).send_keys(Keys.ARROW_RIGHT).perform()
    assert drawn(page, plots(section(page, "tradeoff"))[0])["lte"][0] == [0.5, 28.0]


def test_a_method_is_switched_off_and_keeps_its_look(page: Chrome) -> None:
    plot = plots(section(page, "tradeoff"))[0]
    before = looks(page, plot)
    click(page, chip(page, "lte"))
    assert chip(page, "lte").get_attribute("aria-pressed") == "false"
    assert "lte" not in drawn(page, plot)
    assert "lte" not in drawn(page, plots(section(page, "eta"))[0])
    click(page, chip(page, "lte"))
    assert looks(page, plot) == before
    assert len({tuple(look) for look in before.values()}) == len(before)


def test_all_methods_are_switched_off_and_on(page: Chrome) -> None:
    place = section(page, "tradeoff")
    click(page, place.find_element(By.XPATH, ".//button[.='Hide all']"))
    assert drawn(page, plots(place)[0]) == {}
    click(page, place.find_element(By.XPATH, ".//button[.='Show all']"))
    assert set(drawn(page, plots(place)[0])) == {"dense", "lte", MARKED}


def test_a_click_on_a_point_shows_its_runs(page: Chrome) -> None:
    move_to(page, plots(section(page, "tradeoff"))[0], [0.5, 25]).click().perform()
    text = details_text(page)
    for part in ("lte, target 50%", "Seed 0: perplexity 24.00", "Seed 1: perplexity 26.00", "lte eval a --seed 1"):
        assert part in text
    for part in ("c0ffee", "a CPU, 2 cores", "python 3.11, torch 2.13", '"eta": 0.25', "12,000,000", "3.json"):
        assert part in text


def test_enter_on_a_row_shows_its_runs_and_closing_goes_back(page: Chrome) -> None:
    opener = section(page, "tradeoff").find_element(By.XPATH, ".//tbody//button[.='lte']")
    page.execute_script("arguments[0].focus()", opener)
    ActionChains(page).send_keys(Keys.ENTER).perform()
    assert "Seed 0: perplexity 24.00" in details_text(page)
    ActionChains(page).send_keys(Keys.ESCAPE).perform()
    assert details_text(page) == ""
    assert page.switch_to.active_element == opener


def test_hovering_says_the_runs(page: Chrome) -> None:
    plot = plots(section(page, "tradeoff"))[0]
    move_to(page, plot, [0.5, 25]).perform()
    script = """return echarts.getInstanceByDom(arguments[0]).getZr().storage.getDisplayList()
      .map(({style}) => style.text).filter((text) => text)"""
    wanted = [
        "lte, target 50%",
        "perplexity 25.00 ± 1.41",
        "FFN sparsity 50.0% ± 0.0%",
        "seed 0: 24.00",
        "seed 1: 26.00",
    ]
    WebDriverWait(page, 5).until(lambda _: set(wanted) <= set(page.execute_script(script, plot)))


def test_a_table_sorts_both_ways(page: Chrome) -> None:
    table = section(page, "tradeoff").find_element(By.CSS_SELECTOR, "table.sortable")
    heading = table.find_element(By.XPATH, ".//th[button[.='perplexity']]")
    assert heading.get_attribute("aria-sort") == "none"
    orders = []
    for direction in ("ascending", "descending"):
        click(page, heading.find_element(By.TAG_NAME, "button"))
        assert heading.get_attribute("aria-sort") == direction
        orders.append([row.text for row in table.find_elements(By.CSS_SELECTOR, "tbody td:nth-of-type(2)")])
    assert orders[0] == ["20.00 ± 1.41", "22.00", "25.00 ± 1.41", "28.00"]
    assert orders[1] == orders[0][::-1]
    click(page, table.find_element(By.XPATH, ".//th/button[.='bytes']"))
    assert method_column(table)[-1] == MARKED, "what is not known comes last"


def test_a_table_is_copied_unrounded(page: Chrome) -> None:
    allowed = {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    page.execute_cdp_cmd("Browser.grantPermissions", allowed)
    place = section(page, "tradeoff")
    click(page, place.find_element(By.XPATH, ".//button[.='Copy as CSV']"))
    WebDriverWait(page, 5).until(lambda _: "4 rows" in place.find_element(By.CSS_SELECTOR, "[role=status]").text)
    text = page.execute_async_script("navigator.clipboard.readText().then(arguments[0])")
    found = list(csv.DictReader(io.StringIO(text)))
    expected = csv_rows(find_tradeoffs(runs_of(*lm_records()))[0])
    assert [row["curve"] for row in found] == [row["curve"] for row in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert float(ours["value"]) == theirs["value"]
        assert (ours["megabytes"] == "") == (theirs["megabytes"] is None)


def test_a_refused_clipboard_shows_the_text(page: Chrome) -> None:
    page.execute_script("navigator.clipboard.writeText = () => Promise.reject(new Error('refused'))")
    place = section(page, "tradeoff")
    click(page, place.find_element(By.XPATH, ".//button[.='Copy as CSV']"))
    area = WebDriverWait(page, 5).until(lambda _: place.find_element(By.CSS_SELECTOR, "textarea"))
    assert str(area.get_property("value")).startswith("task,split,model,metric,curve")


def test_the_theme_changes_pictures_too(page: Chrome) -> None:
    plot = plots(section(page, "tradeoff"))[0]
    before = looks(page, plot)["lte"]
    Select(page.find_element(By.ID, "theme")).select_by_visible_text("dark")
    after = looks(page, plot)["lte"]
    assert before[0] == after[0]
    assert before[1] != after[1]


def test_the_task_is_chosen(page: Chrome) -> None:
    choice = Select(page.find_element(By.CSS_SELECTOR, "#comparison > .controls select"))
    assert [each.text for each in choice.options] == ["lm, test: tiny, perplexity", "sst2, test: tiny, accuracy"]
    choice.select_by_index(1)
    assert drawn(page, plots(section(page, "tradeoff"))[0])["lte"] == [[0.5, 0.9]]
    assert "Nothing to show yet" in section(page, "routers").text
    choice.select_by_index(0)
    assert drawn(page, plots(section(page, "tradeoff"))[0])["lte"][0] == [0.5, 25.0]


def test_failed_runs_are_listed_with_their_command(page: Chrome) -> None:
    place = section(page, "tables")
    assert "out of memory" in place.text
    click(page, place.find_element(By.XPATH, ".//tbody//button[.='cats']"))
    assert "lte eval cats" in place.text
