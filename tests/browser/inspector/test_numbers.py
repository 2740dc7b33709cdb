"""The numbers and the text on the inspector's page are those of the records."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.support.select import Select

from tests.browser.chromium import settle
from tests.browser.inspector.page import (
    active_of,
    choose_token,
    find,
    open_page,
    open_table,
    panel,
    state,
    table_rows,
    tints,
    told,
    told_expert,
    unpack,
)
from tests.report.inspected import NASTY


class TestNumbers:
    def test_the_whole_text(self, page: Chrome, run: dict[str, Any]) -> None:
        sentence = find(page, "#page > .told").text
        active = active_of(run)
        assert f"skips {100 - 100 * active.mean():.1f}% of the FFN neurons per token (target 50%):" in sentence
        for kind, words in (("flops", "of the dense model"), ("bytes", "of its bytes")):
            share = sum(run["cost"][kind].values()) / sum(run["cost"][f"dense_{kind}"].values())
            assert f"{100 * share:.1f}% {words}" in sentence
        layers = f"{run['layers']} layers, each with {run['experts']} experts of {run['expert_size']} neurons"
        assert f"{len(run['ids'])} tokens; {layers}" in sentence
        assert f"{100 * active.any(1).mean():.1f}% of the experts are used by some token" in sentence

    def test_a_token_and_its_experts(self, page: Chrome, run: dict[str, Any]) -> None:
        active = active_of(run)
        layers, tokens, experts = active.shape
        surprise, entropy = (unpack(run["next"][name], "<f4") for name in ("surprise", "entropy"))
        places = unpack(run["next"]["likeliest"], "<i4", tokens, -1)
        chances = unpack(run["next"]["probabilities"], "<f4", tokens, -1)
        use = unpack(run["reference"]["use"], "<f4", layers, experts)
        for token in (0, 3, 40):
            choose_token(page, token)
            on = int(active[:, token].sum())
            assert f"skipped {layers * experts - on} of {layers * experts} experts and used " in told(page)
            assert f"used {100 * on / (layers * experts):.1f}% of the FFN" in told(page)
            facts = dict(table_rows(find(page, ".side .sideways")))
            assert facts["entropy after, bits"] == f"{entropy[token]:.1f}"
            assert facts.get("surprise, bits") == (f"{surprise[token]:.1f}" if token else None)
            listed = [item.text for item in page.find_elements(By.CSS_SELECTOR, ".next li")]
            assert len(listed) == 5
            for item, place, chance in zip(listed, places[token], chances[token], strict=True):
                assert f" {100 * chance:.1f}%" in item
                word = run["next"]["words"][place].strip()
                assert word in item or not word.isprintable() or "U+" in item
            rows = open_table(find(page, ".side"))
            lists = [", ".join(map(str, np.flatnonzero(active[layer, token]))) or "none" for layer in range(layers)]
            counts = active[:, token].sum(-1)
            assert rows == [[str(i), f"{counts[i]} of {experts}", lists[i]] for i in range(layers)]
            rare = int((active[:, token] & (use <= 0.25)).sum())
            assert f"{on - rare} of its {on} experts are usual." in find(page, ".side").text

    def test_the_map(self, page: Chrome, run: dict[str, Any]) -> None:
        counts = active_of(run).sum(-1)
        rows = open_table(panel(page, "The whole text"))
        group = -(-counts.shape[1] // len(rows))
        assert len(rows) == -(-counts.shape[1] // group)
        for row in rows:
            first = int(row[0]) - 1
            expected = counts[:, first : first + group].mean(-1)
            assert [float(value) for value in row[3:]] == pytest.approx(expected.tolist(), abs=0.051)

    def test_neurons_against_surprise(self, page: Chrome, run: dict[str, Any]) -> None:
        box = panel(page, "Does it spend more")
        shares = active_of(run).mean((0, 2))
        surprise, entropy = (unpack(run["next"][name], "<f4") for name in ("surprise", "entropy"))
        found = [
            float(value.replace("\N{MINUS SIGN}", "-"))
            for value in re.findall(r"(?:surprise|entropy) (\S\d\.\d\d|\d\.\d\d)", box.text)
        ]
        expected = [spearmanr(shares[1:], surprise[1:]).statistic, spearmanr(shares, entropy).statistic]
        assert found == pytest.approx(expected, abs=0.0051)
        pictures = box.find_elements(By.CSS_SELECTOR, ".columns > *")
        for picture, values in zip(pictures, (surprise[1:], entropy), strict=True):
            assert [float(row[3]) for row in open_table(picture)] == pytest.approx(values.tolist(), abs=0.0051)

    def test_an_expert_and_the_atlas(self, page: Chrome, run: dict[str, Any]) -> None:
        reference = run["reference"]
        shape = (run["layers"], run["experts"])
        use, selective = (unpack(reference[name], "<f4", *shape) for name in ("use", "selectivity"))
        positions = unpack(reference["positions"], "<i4", *shape, -1)
        scores = unpack(reference["scores"], "<f4", *shape, -1)
        for name, value in (("layer", 1), ("expert", 4)):
            Select(find(page, f".side [data-pick={name}]")).select_by_index(value)
        text = told_expert(page)
        assert f"On for {100 * use[1, 4]:.1f}% of the tokens of book.txt, selective {selective[1, 4]:.2f};" in text
        kept = positions[1, 4][positions[1, 4] >= 0]
        rows = table_rows(find(page, ".side section .scroll"))
        assert [row[2] for row in rows] == [f"{score:.3f}" for score in scores[1, 4][: len(kept)]]
        assert [row[0] for row in rows] == [reference["tokens"]["tokens"][position].strip() for position in kept]
        atlas = open_table(panel(page, "Atlas"))
        assert len(atlas) == use.size
        values = [float(row[2]) for row in atlas]
        assert values == sorted(values, reverse=True)
        for name, on, _, mark, _ in atlas:
            place = tuple(map(int, name.split(".")))
            assert on == f"{100 * use[place]:.1f}%"
            assert mark == {0: "dead", 1: "always on"}.get(float(use[place]), "")

    def test_what_another_threshold_would_use(self, page: Chrome, run: dict[str, Any]) -> None:
        steps = run["what_if"]
        total = run["layers"] * run["experts"]
        shares = unpack(steps["counts"], "<u2", len(steps["thresholds"]), -1).mean(-1) / total
        cost = run["cost"]
        rows = open_table(panel(page, "What other thresholds"))
        assert [row[1] for row in rows] == [f"{100 * share:.1f}%" for share in shares]
        for kind, column in (("flops", 2), ("bytes", 3)):
            parts, dense = cost[kind], cost[f"dense_{kind}"]
            work = parts["attention"] + parts["routers"] + dense["ffn"] * shares
            assert [row[column] for row in rows] == [f"{100 * value:.1f}%" for value in work / sum(dense.values())]
            own = sum(parts.values()) / sum(dense.values())
            assert rows[steps["own"]][column] == f"{100 * own:.1f}%"
        assert rows[steps["own"]][0] == "0.500 (own)"


class TestText:
    def test_a_prompt_stays_text(self, page: Chrome, run: dict[str, Any]) -> None:
        assert page.title == "What a model learned to skip"
        assert not page.find_elements(By.CSS_SELECTOR, "#main script, #page i, .token b")
        assert "<i>text</i>.txt on tiny" in find(page, "#page > .told").text
        shown = find(page, ".token-text").get_attribute("textContent")
        assert "<script>document.title = 'taken'</script> & <b>open</b>" in shown
        assert len(page.find_elements(By.CSS_SELECTOR, "[role=option]")) == len(run["ids"])

    def test_signs_for_what_has_none(self, page: Chrome) -> None:
        shown = find(page, ".token-text").get_attribute("textContent")
        assert "⏎\n" in shown
        assert "⇥" in shown
        # A smiley is four tokens: the character, and its three further bytes.
        assert re.search("😀(\u2039byte [0-9A-F]{2}\u203a){3}", shown)
        assert "\n" in NASTY
        assert "◌\u0301" in shown

    def test_no_text_turns_the_order_of_tokens(self, page: Chrome) -> None:
        shown = find(page, ".token-text").get_attribute("textContent")
        assert "\u202e" not in shown
        assert "\u2039U+202E\u203a" in shown
        places = "[...document.querySelectorAll('.token')].map(({offsetTop, offsetLeft}) => [offsetTop, offsetLeft])"
        found = page.execute_script(f"return {places}")
        hebrew = [
            i
            for i, each in enumerate(page.find_elements(By.CSS_SELECTOR, ".token"))
            if "\u05d0" <= each.text <= "\u05ea"
        ]
        assert len(hebrew) == 3
        for before, after in pairwise(found):
            assert after[0] > before[0] + 4 or after[1] >= before[1]

    def test_a_special_token_in_a_text_is_marked(self, page: Chrome, run: dict[str, Any]) -> None:
        marked = [each.text for each in page.find_elements(By.CSS_SELECTOR, ".token.special")]
        assert marked == [run["tokens"][place].strip() for place in run["special"]]
        assert len(marked) == 1
        assert "holds a special token (framed)" in find(page, ".note").text

    def test_the_tint_is_the_difference_from_the_mean_on_percentiles(self, page: Chrome, run: dict[str, Any]) -> None:
        shares = active_of(run).mean((0, 2))
        reference = unpack(run["reference"]["shares"], "<f4")
        found = tints(page)
        for share, (_, less) in zip(shares, found, strict=True):
            if abs(share - reference.mean()) > 1e-6:
                assert less == (share < reference.mean())
        order = np.argsort([(-tint if less else tint) for tint, less in found], kind="stable")
        assert (np.diff(shares[order]) >= -1 / active_of(run)[:, 0].size - 1e-9).all()
        assert max(tint for tint, _ in found) <= 45

    def test_one_token_alone(self, browser: Chrome, pages: dict[str, str]) -> None:
        open_page(browser, pages["single"])
        assert "token 1 of 1" in told(browser)
        assert "surprise" not in find(browser, ".side .sideways").text
        assert not browser.find_elements(By.XPATH, "//h2[starts-with(., 'Does it spend')]")
        assert "NaN" not in find(browser, "#page").text

    def test_a_reader_that_does_not_write(self, browser: Chrome, pages: dict[str, str]) -> None:
        open_page(browser, pages["encoder"])
        assert "an encoder reads all tokens in one go" in find(browser, "#page").text
        assert not browser.find_elements(By.CSS_SELECTOR, ".next li")
        assert [each.get_attribute("value") for each in browser.find_elements(By.CSS_SELECTOR, ".text option")] == [
            "share",
            "layer",
            "expert",
        ]
        assert "NaN" not in find(browser, "#page").text


class TestComparison:
    def test_two_texts(
        self, browser: Chrome, pages: dict[str, str], run: dict[str, Any], other: dict[str, Any]
    ) -> None:
        open_page(browser, pages["two"])
        headings = [each.text for each in browser.find_elements(By.CSS_SELECTOR, ".text h3")]
        assert headings == ["A: <i>text</i>.txt, tiny", "B: other.txt, tiny"]
        first, second = (active_of(each).mean((0, 2)) for each in (run, other))
        bars = open_table(panel(browser, "The difference"))
        assert bars
        for token, _, a, b, change in bars:
            assert float(a[:-1]) == pytest.approx(100 * first[int(token) - 1], abs=0.051)
            assert min(abs(float(b[:-1]) - 100 * share) for share in second) < 0.051
            assert float(b[:-1]) - float(a[:-1]) == pytest.approx(float(change.removesuffix(" points")), abs=0.11)
        # A token that only A has leaves B without a choice; one of both is chosen in both.
        pairs = [int(token) - 1 for token, *_ in bars]
        alone = next(token for token in range(len(run["ids"])) if token not in pairs)
        for token, chosen in ((alone, 1), (pairs[0], 2)):
            choose_token(browser, token)
            assert len(browser.find_elements(By.CSS_SELECTOR, "[aria-selected=true]")) == chosen
        assert find(browser, ".side .legend").text.split("\n")[-1] == "on in A alone"

    def test_two_models_choose_the_same_token(
        self, browser: Chrome, pages: dict[str, str], run: dict[str, Any]
    ) -> None:
        open_page(browser, pages["models"])
        assert Select(find(browser, ".text select")).first_selected_option.text == "difference, B less A"
        choose_token(browser, 11, run=1)
        settle(browser)
        chosen = [each.get_attribute("id") for each in browser.find_elements(By.CSS_SELECTOR, "[aria-selected=true]")]
        assert chosen == ["token-0-11", "token-1-11"]
        assert told(browser).startswith("B: token 12 of ")
        assert state(browser)["run"] == "1"
        assert len(open_table(panel(browser, "The difference"))) == len(run["ids"])
        first, second = tints(browser, 0), tints(browser, 1)
        assert first == second
        # Experts of two models have nothing in common: the map shows those of the chosen run.
        assert "in both" not in find(browser, ".side .legend").text

    def test_two_models_of_other_shapes(self, browser: Chrome, pages: dict[str, str], run: dict[str, Any]) -> None:
        open_page(browser, pages["shapes"])
        # Each at its own threshold, which stands at another place among the steps.
        assert find(browser, "output").text.count("s own: ") == 2
        open_page(browser, f"{pages['shapes']}#expert={run['experts'] - 1}&step=3")
        choose_token(browser, 7, run=1)
        assert told_expert(browser).startswith("Expert 0 of layer 0")
        assert "of 15 experts" in told(browser)
        assert not re.search("NaN|undefined", find(browser, "#page").text)
        assert not browser.find_elements(By.XPATH, "//h2[starts-with(., 'The difference')]")
