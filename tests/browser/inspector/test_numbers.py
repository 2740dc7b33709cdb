"""The numbers and the text on the inspector's page."""

from __future__ import annotations

import base64
import re
from typing import Any

import numpy as np
import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.support.select import Select

from tests.browser.chromium import set_screen
from tests.browser.inspector.page import active_of, choose_token, find, open_page, open_table, panel, table_rows, told
from tests.report.inspected import NASTY


class TestNumbers:
    def test_the_overview(self, page: Chrome, run: dict[str, Any]) -> None:
        rows = dict(table_rows(find(page, "#overview .scroll")))
        active = active_of(run)
        shares = active.mean((0, 2))
        assert rows["tokens"] == str(len(run["ids"]))
        assert rows["FFN neurons used per token"] == f"{100 * active.mean():.2f}%"
        least, most = (float(value.strip(" %")) for value in rows["least, most of a token"].split(","))
        assert (least, most) == pytest.approx((100 * shares.min(), 100 * shares.max()), abs=0.051)
        flops = sum(run["cost"]["flops"].values()) / sum(run["cost"]["dense_flops"].values())
        assert rows["FLOPs over dense"] == f"{100 * flops:.2f}%"

    def test_every_token_and_its_experts(self, page: Chrome, run: dict[str, Any]) -> None:
        active = active_of(run)
        layers, _, experts = active.shape
        for token in (0, 3, 40):
            choose_token(page, token)
            on = int(active[:, token].sum())
            assert f": {on} of {layers * experts} experts are on, {100 * on / (layers * experts):.1f}%" in told(
                page, "The text"
            )
            rows = open_table(page, "Experts of the token")
            lists = [", ".join(map(str, np.flatnonzero(active[layer, token]))) or "none" for layer in range(layers)]
            counts = active[:, token].sum(-1)
            assert rows == [[str(i), f"{counts[i]} of {experts}", lists[i]] for i in range(layers)]

    def test_the_map(self, page: Chrome, run: dict[str, Any]) -> None:
        counts = active_of(run).sum(-1)
        rows = open_table(page, "Layer by layer")
        assert 5 < len(rows) < len(run["ids"])
        for row in rows:
            assert [int(value) for value in row[2:]] == counts[:, int(row[0]) - 1].tolist()

    def test_an_expert(self, page: Chrome, run: dict[str, Any]) -> None:
        reference = run["reference"]
        shape = (run["layers"], run["experts"])
        use = np.frombuffer(base64.b64decode(reference["use"]), "<f4").reshape(shape)
        positions = np.frombuffer(base64.b64decode(reference["positions"]), "<i4").reshape(*shape, -1)
        scores = np.frombuffer(base64.b64decode(reference["scores"]), "<f4").reshape(*shape, -1)
        box = panel(page, "One expert")
        layer, expert = (Select(each) for each in box.find_elements(By.TAG_NAME, "select"))
        layer.select_by_index(1)
        expert.select_by_index(4)
        total = len(reference["tokens"]["ids"])
        assert f"Expert 4 of layer 1 is on for {100 * use[1, 4]:.1f}% of the {total} tokens" in told(page, "One expert")
        kept = positions[1, 4][positions[1, 4] >= 0]
        rows = table_rows(find(box, ".scroll"))
        assert [row[2] for row in rows] == [f"{score:.3f}" for score in scores[1, 4][: len(kept)]]
        assert [row[0] for row in rows] == [reference["tokens"]["tokens"][position].strip() for position in kept]
        assert "The reference text is book.txt." in box.text
        assert len(open_table(page, "One expert")) == run["experts"]

    def test_costs(self, page: Chrome, run: dict[str, Any]) -> None:
        rows = {row[0]: [float(value) for value in row[1:]] for row in open_table(page, "What the routers cost")}
        cost = run["cost"]
        for part, name in (("attention", "attention"), ("ffn", "FFN"), ("routers", "routers")):
            expected = [cost["dense_flops"][part] / 2**30, cost["flops"][part] / 2**30]
            expected += [cost["dense_bytes"][part] / 2**20, cost["bytes"][part] / 2**20]
            assert rows[name] == pytest.approx(expected, rel=1e-3)
        assert rows["together"][1] == pytest.approx(sum(cost["flops"].values()) / 2**30, rel=1e-3)


class TestText:
    def test_a_prompt_stays_text(self, page: Chrome, run: dict[str, Any]) -> None:
        assert page.title == "What a model learned to skip"
        assert not page.find_elements(By.CSS_SELECTOR, "#main script, #main b, #main i")
        assert "<i>text</i>.txt" in page.find_element(By.CSS_SELECTOR, ".run h2").text
        shown = find(page, ".token-text").get_attribute("textContent")
        assert "<script>document.title = 'taken'</script> & <b>open</b>" in shown
        options = page.find_elements(By.CSS_SELECTOR, "[role=option]")
        assert len(options) == len(run["ids"])

    def test_signs_for_what_has_none(self, page: Chrome) -> None:
        shown = find(page, ".token-text").get_attribute("textContent")
        assert "⏎\n" in shown
        assert "⇥" in shown
        # A smiley is four tokens: the character, and its three further bytes as the vocabulary writes them.
        assert re.search("😀(\u2039[^\u203a]+\u203a){3}", shown)
        assert "\n" in NASTY
        assert "◌\u0301" in shown


class TestComparison:
    def test_two_texts(self, browser: Chrome, pages: dict[str, str], run: dict[str, Any]) -> None:
        set_screen(browser, 1600, 900)
        open_page(browser, pages["two"])
        columns = browser.find_elements(By.CSS_SELECTOR, ".run")
        assert [find(column, "h2").text for column in columns] == ["A: <i>text</i>.txt, tiny", "B: other.txt, tiny"]
        assert columns[0].location["y"] == columns[1].location["y"]
        rows = table_rows(find(browser, "#overview .scroll"))
        tokens = rows[0]
        assert int(tokens[1]) == len(run["ids"])
        assert tokens[3] == f"\N{MINUS SIGN}{int(tokens[1]) - int(tokens[2])}"
        used = next(row for row in rows if row[0] == "FFN neurons used per token")
        difference = float(used[2][:-1]) - float(used[1][:-1])
        assert float(used[3].removesuffix(" points").replace("\N{MINUS SIGN}", "-")) == pytest.approx(
            difference, abs=0.011
        )
        before = columns[1].find_element(By.CSS_SELECTOR, ".told").text
        find(browser, "#token-0-9").click()
        assert columns[1].find_element(By.CSS_SELECTOR, ".told").text == before

    def test_two_models_choose_the_same_token(self, browser: Chrome, pages: dict[str, str]) -> None:
        open_page(browser, pages["models"])
        choose_token(browser, 11)
        texts = [find(column, ".told").text for column in browser.find_elements(By.CSS_SELECTOR, ".run")]
        assert all(text.startswith("Token 12 of ") for text in texts)
        assert texts[0] != texts[1]
