"""Metrics on examples that were worked out by hand, and what is said where a library is missing."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import pytest

from lte.eval.metrics import METRICS, check_metrics, compute_metrics


def one(name: str, predictions: list[Any], wanted: list[Any]) -> float:
    return compute_metrics([name], predictions, wanted)[name]


def test_classification() -> None:
    # 2 true positives, 1 false positive, 1 false negative, 1 true negative.
    predictions, labels = [1, 1, 1, 0, 0], [1, 1, 0, 1, 0]
    assert one("accuracy", predictions, labels) == pytest.approx(3 / 5)
    assert one("f1", predictions, labels) == pytest.approx(4 / 6)
    assert one("matthews", predictions, labels) == pytest.approx((2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2))
    assert one("matthews", [1, 1, 1], [1, 0, 1]) == 0
    assert one("f1", [0, 0], [0, 1]) == 0


def test_correlations() -> None:
    predictions, scores = [1.0, 2.0, 4.0], [1.0, 2.0, 3.0]
    assert one("pearson", predictions, scores) == pytest.approx(3 / math.sqrt(2 * (14 / 3)))
    assert one("spearman", predictions, scores) == pytest.approx(1)
    assert one("spearman", [3.0, 1.0, 2.0], scores) == pytest.approx(-0.5)


def test_rouge_takes_the_best_reference_of_each_text() -> None:
    texts, references = ["the cat sat", "a dog"], [["a bird", "the cat ran off"], ["a dog"]]
    # The cat: 2 of 3 words are in the reference, 2 of its 4 are in the text.
    assert one("rougeL", texts, references) == pytest.approx((2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4) + 1) / 2)
    assert one("rouge1", texts, references) == one("rougeL", texts, references)
    assert one("rouge2", texts, references) == pytest.approx((2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3) + 1) / 2)
    # Order counts in rougeL alone, and endings do not.
    assert one("rougeL", ["cats the"], [["the cat"]]) == pytest.approx(0.5)
    assert one("rouge1", ["cats the"], [["the cat"]]) == pytest.approx(1)


def test_bleu_counts_all_references_and_lists_of_different_lengths() -> None:
    texts = ["the cat sat on the mat", "it rained all day long"]
    assert one("bleu", texts, [[texts[0]], [texts[1], "something else"]]) == pytest.approx(100)
    assert one("bleu", texts, [["no match here", texts[0]], [texts[1]]]) == pytest.approx(100)
    # 1- to 4-gram precisions 5/6, 4/5, 3/4 and 2/3, no brevity penalty.
    found = one("bleu", ["the cat sat on the mat"], [["the cat sat on the rug"]])
    assert found == pytest.approx(100 * (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25)


def test_nist_weighs_rare_words() -> None:
    # Four words that the reference holds once each carry log2(4) bits; nothing longer is surprising.
    assert one("nist", ["a b c d"], [["a b c d"]]) == pytest.approx(2)
    assert one("nist", ["a b"], [["c d"]]) == 0
    assert one("nist", ["", ""], [["a b"], ["c"]]) == 0


def test_lists_that_do_not_fit_are_refused() -> None:
    for predictions, wanted in (([], []), ([1], [1, 0])):
        with pytest.raises(ValueError, match="predictions must be as many as what is wanted, and at least 1, got"):
            compute_metrics(["accuracy"], predictions, wanted)
    with pytest.raises(ValueError, match=r"metric must be one of .*, got metric='acuracy' \(did you mean accuracy"):
        check_metrics(["acuracy"])


@pytest.mark.parametrize("name", METRICS)
def test_a_missing_library_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(ValueError, match=f"must be installed for the metric {name}, got none; pip install "):
        check_metrics([name])
