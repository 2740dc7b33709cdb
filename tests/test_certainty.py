"""What experiments/certainty.py correlates, on numbers whose answer is known."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "experiments" / "certainty.py"))


def test_what_a_token_explains_is_no_correlation_within_it(script: dict[str, Any]) -> None:
    random = np.random.default_rng(0)
    kinds = random.integers(20, size=2000)
    share, entropy = kinds + 0.1 * random.random(2000), -kinds + 0.1 * random.random(2000)
    found = script["correlations"](share, entropy, kinds)
    assert found["rho"] < -0.99
    assert abs(found["within_token"]) < 0.1
    assert found["interval"][0] <= found["rho"] <= found["interval"][1]
    assert found["within_interval"][0] <= found["within_token"] <= found["within_interval"][1]
    # And the other way round: nothing between tokens, all within them.
    value = random.random(2000)
    assert script["correlations"](value, value**3, kinds)["within_token"] > 0.99


def test_tokens_of_few_places_say_nothing_within(script: dict[str, Any]) -> None:
    kinds = np.array([1] * 4 + [2] * 6)
    assert np.isfinite(script["within"](np.arange(10.0), kinds)).tolist() == [False] * 4 + [True] * 6


def test_the_result_file_holds_a_row_for_each_model_and_text(script: dict[str, Any]) -> None:
    rows = json.loads((ROOT / "results" / "certainty.json").read_text())["rows"]
    assert {row["text"] for row in rows} == set(script["texts"]())
    assert len(rows) == len({(row["model"], row["text"]) for row in rows})
    docs = (ROOT / "docs" / "inspector.md").read_text().replace("\N{MINUS SIGN}", "-").splitlines()
    for row in rows:
        (line,) = (line for line in docs if line.startswith(f"| {row['model']} | {row['text']} |"))
        expected = [
            value
            for found in (row["entropy"], row["surprise"])
            for value in (found["rho"], *found["interval"], found["within_token"], *found["within_interval"])
        ]
        told = re.findall(r"-?\d\.\d\d", line.split("|", 3)[3])
        assert [float(number) for number in told] == pytest.approx(expected, abs=0.0051)
