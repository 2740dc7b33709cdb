"""`lte eval --harness`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from lte.records import load_records
from tests.cli.test_kernels import KERNELS
from tests.eval.harness_toys import write_tasks


@pytest.fixture
def evaluate(run: Callable[..., Any], trained: Any, tmp_path: Path) -> Any:
    """Runs tasks on the trained folder; returns its output, and the records by task."""
    tasks = write_tasks(tmp_path / "tasks")

    def with_flags(*flags: object) -> tuple[Any, dict[str, Any]]:
        file = tmp_path / "results" / "result.json"
        result = run("eval", trained[0], "--harness-tasks-dir", tasks, "--json", file, *flags)
        records = load_records(file.parent) if file.parent.exists() else []
        return result, {record["task"]: record for record in records}

    return with_flags


def test_a_task_is_a_record(evaluate: Any, trained: Any, tmp_path: Path) -> None:
    result, records = evaluate("--harness", "toy_choice", "--limit", 2, "--batch-size", 4)
    assert result.exit_code == 0, result.output
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["result.json"]
    record = records["toy_choice"]
    assert record["metric"] == "acc"
    assert record["value"] == record["metrics"]["acc"]
    assert record["model"] == str(trained[0])
    assert record["method"] == "lte"
    assert 0 < record["sparsity"] == record["measurement"]["sparsity"] < 1
    assert record["tokens_evaluated"] == record["measurement"]["tokens"] > 0
    assert record["config"]["kernels"] == KERNELS
    assert record["config"]["task_version"] == "7"
    assert record["config"]["limit"] == record["config"]["num_samples"] == 2
    assert f"lm-eval {record['config']['harness_version']}" in result.output
    assert f"{100 * record['sparsity']:.2f}%" in result.output
    assert f"{record['value']:.4f}" in result.output


def test_several_tasks_are_a_file_each(evaluate: Any, tmp_path: Path) -> None:
    result, records = evaluate("--harness", "toy_choice, toy_generation", "--kernels", "int8", "--num-fewshot", 0)
    assert result.exit_code == 0, result.output
    assert set(records) == {"toy_choice", "toy_generation"}
    names = {path.name for path in (tmp_path / "results").iterdir()}
    assert names == {"result-toy_choice.json", "result-toy_generation.json"}
    assert records["toy_generation"]["metric"] == "exact_match"
    assert records["toy_generation"]["config"]["kernels"]["weights"] == "int8"
    assert records["toy_choice"]["sparsity"] != records["toy_generation"]["sparsity"]


def test_a_dense_model(run: Any, dense_folder: Path, tmp_path: Path) -> None:
    tasks = write_tasks(tmp_path / "tasks")
    command = ["eval", dense_folder, "--harness", "toy_choice", "--harness-tasks-dir", tasks]
    result = run(*command, "--json", tmp_path / "dense.json")
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "dense.json").read_text())
    assert (record["method"], record["sparsity"], record["measurement"]) == ("dense", 0.0, None)


def test_mistakes_are_a_sentence(evaluate: Any, run: Any, trained: Any, tmp_path: Path) -> None:
    result, _ = evaluate("--harness", "piqa_files", "--harness-data", tmp_path)
    assert result.exit_code == 1
    assert "harness_data must be a folder that holds qa/piqa.test.jsonl.gz, got harness_data=" in result.stderr
    result, _ = evaluate("--harness", "piqa_files", "--harness-data", "nowhere")
    assert result.exit_code == 1
    assert "harness_data must be an existing folder, got harness_data=nowhere" in result.stderr
    result, _ = evaluate("--harness", "toy_choice", "--train", "my-text.jsonl")
    assert result.exit_code == 1
    assert "train must not be given with --harness, got train=my-text.jsonl" in result.stderr
    result = run("eval", trained[0], "--limit", 3)
    assert result.exit_code == 1
    assert "task must be given with limit, got limit=3" in result.stderr
