"""The numbers on the page of `lte report` are those of the records."""

from __future__ import annotations

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By

from lte.report.overview import SHARES, overview
from lte.report.points import find_tradeoffs
from tests.browser.report.page import HISTORY, button, choose, click, drawn, lm_records, other_task, panel, plot
from tests.report.test_points import runs_of

LOSS = "Quality lost against cost, lm"


def cells(browser: Chrome) -> dict[str, list[str]]:
    script = """return [...document.querySelectorAll('.heat tr')].map((row) => [...row.children].map((each) =>
      each.textContent.replace('\u00d7', 'x')))"""
    return {row[0]: row[1:] for row in browser.execute_script(script)}


def test_the_sentence_and_the_heat_map_are_those_of_the_records(page: Chrome) -> None:
    expected = overview(find_tradeoffs(runs_of(*lm_records(), *other_task())))
    assert page.find_element(By.CSS_SELECTOR, ".answer").text == expected["sentence"]
    assert cells(page) == {"task": ["LTE", "wanda"], "lm": ["✗ 0.750 x2", "✗ 10 x1"]}
    choose(page, "Quality lost where", "80%")
    assert cells(page) == {"task": ["LTE", "wanda"], "lm": ["✓ 0.500 x2", "✗ 10 x1"], "sst2": ["✗ 0.020 x1", ""]}
    place = SHARES.index(0.8)
    found = {row["name"]: row["cells"]["lte"][place] for row in expected["rows"]}
    titles = page.execute_script("return [...document.querySelectorAll('.heat a')].map(({title}) => title)")
    assert titles[0] == "lm, LTE: loses 0.5 ± 0.354 perplexity, goal of 0.5 met, 2 seeds"
    assert (found["lm"]["lost"], found["lm"]["sd"], found["lm"]["seeds"]) == (0.5, pytest.approx(0.354, abs=1e-3), 2)
    assert titles[-1] == "sst2, LTE: loses 0.02 accuracy, goal of 0.01 missed, 1 seed"
    assert "Not measured with that few bytes: </script>" in page.find_element(By.ID, "overview").text


def test_each_cost_shows_the_means_of_the_records(page: Chrome) -> None:
    expected = {
        "Bytes read": [[0.6, 0.5], [0.4, 1.0]],
        "FLOPs": [[0.5, 0.5], [0.25, 1.0]],
        "FFN sparsity": [[0.5, 0.5], [0.75, 1.0]],
        "Measured time": [[0.875, 0.5]],
    }
    said = plot(page, LOSS).find_element(By.XPATH, "following::p[@class='caption'][1]")
    for text, points in expected.items():
        choose(page, "Cost", text)
        found = drawn(page, LOSS)
        assert found["lte"] == points
        assert ("wanda" in found) == (text in ("Bytes read", "FLOPs"))
        assert ("skips no whole neurons or was not measured: wanda" in said.text) == (text == "FFN sparsity")
    choose(page, "Cost", "Bytes read")
    found = drawn(page, LOSS)
    assert found["dense"] == [[1.0, 0.0]]
    assert found["Pareto front"] == [[1.0, 0.0], [0.6, 0.5], [0.4, 1.0]]
    assert found["wanda"] == [[0.5, 10.0]]
    assert found["beyond"] == [[0.5, 1.5]], "at the edge of the range around the goal"
    choose(page, "Range", "everything")
    assert drawn(page, LOSS)["beyond"] == []
    click(page, plot(page, LOSS).find_element(By.XPATH, "following::summary[1]"))
    rows = page.find_elements(By.XPATH, "//details[@open]//tr[th='lte, target 50%']/*")
    assert [cell.text for cell in rows][1:] == ["60%", "0.5", "0.146", "0.854"]


def test_the_dense_reference_is_a_line_with_its_spread(page: Chrome) -> None:
    script = """const {series} = echarts.getInstanceByDom(arguments[0]).getOption();
      const dense = series.find(({name}) => name === 'dense');
      return [dense.markLine.data[0].yAxis, dense.markArea.data[0].map(({yAxis}) => yAxis)]"""
    line, (low, high) = page.execute_script(script, plot(page, LOSS))
    assert line == 0
    assert (low, high) == pytest.approx((-(2**0.5), 2**0.5))


def test_the_panel_says_what_the_records_say(page: Chrome) -> None:
    text = panel(page)
    for part in ("A: lte, target 50%", "B: wanda", "0.50 ± 0.35", "20.50", "30.00", "60%", "87.5%"):
        assert part in text
    assert "config.train.eta 0.25 null" in " ".join(text.split())
    click(page, page.find_element(By.XPATH, "//summary[.='Runs of A']"))
    text = panel(page)
    for part in ("Seed 0: perplexity 20.25", "Seed 1: perplexity 20.75", "lte eval a --seed 1", "c0ffee", "12000000"):
        assert part in text
    for part in ("a CPU, 2 cores", '"torch": "2.13"', '"eta": 0.25'):
        assert part in text


def test_variants_have_a_picture_of_their_own(page: Chrome) -> None:
    script = "return echarts.getInstanceByDom(arguments[0]).getOption().yAxis[0].data"
    assert page.execute_script(script, plot(page, "Variants")) == [
        "lte 80% · 40% of bytes",
        "lte-frozen 80% · 40% of bytes",
    ]
    assert [value for value, _ in drawn(page, "Variants")["settings"]] == [1.0, 2.0]


def test_layers_and_routers_are_those_of_the_records(page: Chrome) -> None:
    assert drawn(page, "Share of neurons")["lte, target 50%"] == [[0, 0.5], [1, 1.0]]
    found = drawn(page, "Over the training")
    steps, shares = HISTORY["step"], HISTORY["active_fraction"]
    for layer in (0, 1):
        assert found[f"layer {layer}"] == [[step, share[layer]] for step, share in zip(steps, shares, strict=True)]
    assert found["all layers"][-1] == [100, 0.375]
    scores = drawn(page, "Router scores")
    assert [round(value, 6) for _, value in scores["all layers"]] == [0.125] * 2 + [0] * 36 + [0.125, 0.625]
    assert scores["layer 1"][-1][1] == pytest.approx(1.0)
    assert drawn(page, "Experts that")["never on"] == [[0, 1], [1, 0]]
    assert drawn(page, "Experts that")["always on"] == [[0, 1], [1, 4]]
    assert (
        "Of 8 experts 1 were never used on 1,000 tokens, and 5 by every token." in page.find_element(By.ID, "task").text
    )


def test_times_and_batches_are_those_of_lte_bench(page: Chrome) -> None:
    found = drawn(page, "Measured time")
    assert found["lte"] == [[0.5, 3.0], [0.8, 2.0]]
    assert found["dense eager"] == [[0.0, 4.0]]
    assert found["bytes alone"] == [[0.5, 0.75], [0.8, 0.6]]
    union = drawn(page, "Weights that all")
    assert union["measured"] == [[1, 0.75], [4, 0.5]]
    assert union["if independent"] == [[1, 0.75], [4, pytest.approx(0.32)]]
    ratios = drawn(page, "Batches against")
    assert (ratios["decode, 50%"], ratios["decode, 80%"]) == ([[1, 0.75], [4, 1.1]], [[1, 0.5], [4, 0.9]])
    text = page.find_element(By.ID, "speed").text
    assert "decode, 50%: no longer faster than dense from batch 4." in text
    assert "decode, 80%: faster than dense up to batch 4, the largest measured." in text
    assert button(page, "Reset")
