"""The page of `lte report` in a real browser: its numbers, and every control by mouse and by keyboard."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import ActionChains, Chrome, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.select import Select
from selenium.webdriver.support.wait import WebDriverWait

from lte.report.comparison_tables import csv_rows
from lte.report.html_report import write_html_report
from lte.report.inputs import Bench
from lte.report.tradeoff import compare_runs
from tests.browser.chromium import set_screen, settle
from tests.report.sample_benches import bench
from tests.report.sample_records import measurement, record
from tests.report.test_html_report import MARKUP, many_runs
from tests.report.test_tradeoff import runs_of

MARKED = f"{MARKUP} " + "a-very-long-name_without_any_break" * 6
HISTORY = {"step": [0, 50, 100], "stage": [1, 1, 2], "active_fraction": [[1.0, 1.0], [0.8, 0.6], [0.5, 0.25]]}


def lm_records() -> list[dict[str, Any]]:
    """Dense with two seeds; LTE with two points, the first with two seeds; a method with a nasty name; a failed run."""
    routed = {"measurement": measurement().to_dict(), "layer_history": HISTORY, "config": {"train": {"eta": 0.25}}}
    lte = [
        record(seed=0, value=24.0, command="lte eval a --seed 0", git_commit="c0ffee", latency_ms=3.0, **routed),
        record(seed=1, value=26.0, command="lte eval a --seed 1", latency_ms=4.0, **routed),
        record(target_sparsity=0.8, sparsity=0.75, value=28.0, flops_per_token=2.0**29, config={"train": {"eta": 0.5}}),
    ]
    odd = record(MARKED, value=22.0, command=MARKUP, hardware=MARKUP, sparsity=0.25, bytes_per_token=None)
    failed = record("cats", value=None, failure="out of memory", command="lte eval cats")
    return [record("dense", seed=0, value=19.0), record("dense", seed=1, value=21.0), *lte, odd, failed]


def other_task() -> list[dict[str, Any]]:
    shared = {"task": "sst2", "metric": "accuracy"}
    return [record("dense", **shared, value=0.92), record(**shared, value=0.9)]


Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes the page of records and benchmarks and tells its address."""

    def written(*records: dict[str, Any], benches: tuple[Bench, ...] = ()) -> str:
        comparisons = compare_runs(runs_of(*records)) if records else []
        return write_html_report(tmp_path / "report.html", comparisons, benches).as_uri()

    return written


@pytest.fixture
def page(browser: Chrome, write: Write) -> Chrome:
    """The page of two tasks and a benchmark."""
    browser.get(write(*lm_records(), *other_task(), benches=(bench(),)))
    settle(browser)
    return browser


def section(browser: Chrome, identifier: str) -> WebElement:
    return browser.find_element(By.CSS_SELECTOR, f"section[aria-labelledby={identifier}]")


def plots(place: WebElement) -> list[WebElement]:
    return place.find_elements(By.CSS_SELECTOR, ".plot")


def drawn(browser: Chrome, plot: WebElement) -> dict[str, list[Any]]:
    """The values that a picture draws, by the names of its series, error bars left out."""
    script = """return echarts.getInstanceByDom(arguments[0]).getOption().series.filter(({type}) => type !== 'custom')
      .map(({name, data}) => [name, data.map((each) => each.value ?? each)])"""
    return dict(browser.execute_script(script, plot))


def looks(browser: Chrome, plot: WebElement) -> dict[str, list[str]]:
    script = """return echarts.getInstanceByDom(arguments[0]).getOption().series.filter(({type}) => type !== 'custom')
      .map(({name, symbol, itemStyle}) => [name, [symbol, itemStyle.color]])"""
    return dict(browser.execute_script(script, plot))


def table_of(place: WebElement) -> list[list[str]]:
    """The table below a picture, opened."""
    details = place.find_element(By.XPATH, ".//details[summary='Show as table']")
    if details.get_attribute("open") is None:
        details.find_element(By.TAG_NAME, "summary").click()
        WebDriverWait(place.parent, 5).until(lambda _: details.find_elements(By.CSS_SELECTOR, "tbody th, tbody td"))
    rows = details.find_elements(By.CSS_SELECTOR, "tbody tr")
    return [[str(cell.get_property("textContent")) for cell in row.find_elements(By.XPATH, "*")] for row in rows]


def chip(browser: Chrome, name: str) -> WebElement:
    return browser.find_element(By.XPATH, f"//button[@aria-pressed][normalize-space()='{name}']")


def click(browser: Chrome, element: WebElement) -> None:
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    element.click()


def move_to(browser: Chrome, plot: WebElement, point: list[float]) -> ActionChains:
    """Moves the mouse to a point of a picture's axes."""
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", plot)
    script = "return echarts.getInstanceByDom(arguments[0]).convertToPixel({seriesIndex: 0}, arguments[1])"
    left, top = browser.execute_script(script, plot, point)
    offset = round(left - plot.size["width"] / 2), round(top - plot.size["height"] / 2)
    return ActionChains(browser).move_to_element_with_offset(plot, *offset)


def details_text(browser: Chrome) -> str:
    box = section(browser, "tradeoff").find_element(By.CSS_SELECTOR, "[aria-label='Details of the chosen point']")
    return box.text if box.is_displayed() else ""


def method_column(table: WebElement) -> list[str]:
    return [each.text for each in table.find_elements(By.CSS_SELECTOR, "tbody th")]


def test_each_axis_shows_the_means_of_the_records(page: Chrome) -> None:
    place = section(page, "tradeoff")
    expected = {
        "sparsity": [[0.5, 25.0], [0.75, 28.0]],
        "gflops": [[0.5, 28.0], [1.0, 25.0]],
        "megabytes": [[3.0, 25.0], [3.0, 28.0]],
        "latency_ms": [[3.5, 25.0]],
    }
    for key, points in expected.items():
        click(page, place.find_element(By.CSS_SELECTOR, f"input[value={key}]"))
        found = drawn(page, plots(place)[0])
        assert found["lte"] == points
        assert (MARKED in found) == (key in ("sparsity", "gflops"))
        assert found["dense"] == ([] if key == "latency_ms" else found["dense"])
    rows = {row[0]: row[1:] for row in table_of(place)}
    assert rows["lte, target 50%"] == ["3.5", "0.7071", "25.00", "1.41", "2"]
    assert rows["lte, target 80%"] == ["-", "-", "28.00", "-", "1"]


def test_the_arrow_keys_switch_the_axis(page: Chrome) -> None:
    radio = section(page, "tradeoff").find_element(By.CSS_SELECTOR, "input[value=sparsity]")
    click(page, radio)
    ActionChains(page).send_keys(Keys.ARROW_RIGHT).perform()
    assert drawn(page, plots(section(page, "tradeoff"))[0])["lte"][0] == [0.5, 28.0]


def test_the_dense_model_is_a_line_with_its_spread(page: Chrome) -> None:
    script = """const {series} = echarts.getInstanceByDom(arguments[0]).getOption();
      const dense = series.find(({name}) => name === 'dense');
      return [dense.markLine.data[0].yAxis, dense.markArea.data[0].map(({yAxis}) => yAxis)]"""
    line, (low, high) = page.execute_script(script, plots(section(page, "tradeoff"))[0])
    assert line == 20.0
    assert (low, high) == pytest.approx((20 - 2**0.5, 20 + 2**0.5))


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
    expected = csv_rows(compare_runs(runs_of(*lm_records()))[0])
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


def test_layers_are_those_of_the_records(page: Chrome) -> None:
    place = section(page, "layers")
    found = drawn(page, plots(place)[0])
    assert found == {"lte, target 50%": [[0, 0.5], [1, 1.0]]}
    (map_values,) = drawn(page, plots(place)[1]).values()
    assert map_values == [
        [s, layer, share] for s, row in enumerate(HISTORY["active_fraction"]) for layer, share in enumerate(row)
    ]
    choice = Select(place.find_elements(By.TAG_NAME, "select")[1])
    assert len(choice.options) == 2


def test_routers_show_scores_and_experts(page: Chrome) -> None:
    place = section(page, "routers")
    assert "Of 8 experts 1 were never used on 1,000 tokens, and 5 by every token." in place.text
    scores, experts = drawn(page, plots(place)[1]), drawn(page, plots(place)[2])
    (bars,) = scores.values()
    assert len(bars) == 40
    assert (bars[0], bars[-1]) == (pytest.approx(0.125), pytest.approx(0.625))
    assert experts == {"never on": [1, 0], "always on": [1, 4]}
    Select(place.find_element(By.XPATH, ".//label[starts-with(., 'Layer')]/select")).select_by_visible_text("layer 1")
    (bars,) = drawn(page, plots(place)[1]).values()
    assert bars[-1] == pytest.approx(1.0)


def test_eta_is_against_sparsity(page: Chrome) -> None:
    assert drawn(page, plots(section(page, "eta"))[0]) == {"lte": [[0.25, 0.5], [0.5, 0.75]]}


def test_latency_is_against_sparsity_with_the_limit(page: Chrome) -> None:
    place = section(page, "latency")
    found = drawn(page, plots(place)[0])
    assert found["lte"] == [[0.5, 3.0], [0.8, 2.0]]
    assert found["dense eager"] == [[0.0, 4.0]]
    assert found["bytes alone"] == [[0.5, 0.75], [0.8, 0.6]]
    click(page, chip(page, "dense eager"))
    assert "dense eager" not in drawn(page, plots(place)[0])
    assert table_of(place) == [
        ["lte", "50.0%", "3", "2.7", "3.6", "0.75", "10"],
        ["lte", "80.0%", "2", "1.8", "2.4", "0.6", "10"],
    ]


def test_batches_show_union_and_break_even(page: Chrome) -> None:
    place = section(page, "batch")
    union, ratios = (drawn(page, plot) for plot in plots(place))
    assert union["measured"] == [[0, 0.75], [1, 0.5]]
    assert union["if independent"] == [[0, 0.75], [1, pytest.approx(0.32)]]
    assert ratios == {"decode, 50% sparsity": [[0, 0.75], [1, 1.1]], "decode, 80% sparsity": [[0, 0.5], [1, 0.9]]}
    assert "decode, 50% sparsity: no longer faster than dense from batch 4." in place.text
    assert "decode, 80% sparsity: faster than dense up to batch 4, the largest that was measured." in place.text


def test_failed_runs_are_listed_with_their_command(page: Chrome) -> None:
    place = section(page, "tables")
    assert "out of memory" in place.text
    click(page, place.find_element(By.XPATH, ".//tbody//button[.='cats']"))
    assert "lte eval cats" in place.text


def test_text_from_files_stays_text(page: Chrome) -> None:
    assert page.title == "What skipping neurons costs and saves"
    assert not page.find_elements(By.CSS_SELECTOR, "main img")
    opener = section(page, "tradeoff").find_element(By.XPATH, ".//tbody//button[contains(., 'onerror')]")
    assert opener.text == MARKED
    click(page, opener)
    assert details_text(page).count(MARKUP) == 3


@pytest.mark.parametrize("width", [360, 900, 1600])
def test_nothing_scrolls_sideways(page: Chrome, width: int) -> None:
    set_screen(page, width, 900)
    settle(page)
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    for plot in plots(page.find_element(By.ID, "main")):
        assert page.execute_script("return arguments[0].querySelector('canvas').clientWidth", plot) <= width


@pytest.mark.parametrize(
    "records",
    [[], [record()], [record(value=None)], [record(sparsity=None, flops_per_token=None, bytes_per_token=None)]],
    ids=["nothing", "one run", "a failed run", "no costs"],
)
def test_little_input_still_makes_a_page(browser: Chrome, write: Write, records: list[dict[str, Any]]) -> None:
    browser.get(write(*records))
    settle(browser)
    assert len(browser.find_elements(By.CSS_SELECTOR, "section[aria-labelledby]")) >= 7
    folded = section(browser, "latency").find_element(By.TAG_NAME, "details")
    assert folded.get_attribute("open") is None
    folded.find_element(By.TAG_NAME, "summary").click()
    assert "lte bench" in folded.text


def test_200_runs_load_within_2_seconds(browser: Chrome, write: Write) -> None:
    address = write(record("dense"), *many_runs(200))
    times = []
    for _ in range(2):  # the faster one, whatever else the machine does
        start = time.monotonic()
        browser.get(address)
        settle(browser)
        times.append(time.monotonic() - start)
    assert min(times) < 2
    assert len(drawn(browser, plots(section(browser, "tradeoff"))[0])) == 11
