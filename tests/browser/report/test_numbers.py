"""The numbers in the pictures and tables of the page of `lte report`."""

from __future__ import annotations

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.support.select import Select

from tests.browser.report.page import HISTORY, MARKED, chip, click, drawn, plots, section, table_of


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


def test_the_dense_model_is_a_line_with_its_spread(page: Chrome) -> None:
    script = """const {series} = echarts.getInstanceByDom(arguments[0]).getOption();
      const dense = series.find(({name}) => name === 'dense');
      return [dense.markLine.data[0].yAxis, dense.markArea.data[0].map(({yAxis}) => yAxis)]"""
    line, (low, high) = page.execute_script(script, plots(section(page, "tradeoff"))[0])
    assert line == 20.0
    assert (low, high) == pytest.approx((20 - 2**0.5, 20 + 2**0.5))


def test_a_line_lies_where_its_point_does(page: Chrome) -> None:
    """Also where the values need more than two decimals."""
    script = """const chart = echarts.getInstanceByDom(arguments[0]);
      const {series, yAxis: [axis]} = chart.getOption();
      const value = axis.min + 0.004;
      chart.setOption({series: series.map(({name}) => ({name, markLine: name === 'dense'
        ? {data: [{yAxis: value}]} : undefined})), yAxis: {max: axis.min + 0.01}});
      const place = chart.convertToPixel({yAxisIndex: 0}, value);
      const lines = chart.getZr().storage.getDisplayList(true).filter(({shape}) => shape && shape.percent !== undefined
        && shape.y1 !== undefined && shape.y1 === shape.y2).map(({shape}) => shape.y1);
      return [place, lines]"""
    place, lines = page.execute_script(script, plots(section(page, "tradeoff"))[0])
    assert min(abs(line - place) for line in lines) < 1.5


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
