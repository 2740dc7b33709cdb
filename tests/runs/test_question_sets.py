"""Question sets in a comparison: what is asked for, what a record says, and what becomes of it in a report."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("lm_eval")

from lte.eval.harness import evaluate_harness
from lte.eval.models import load_any_model
from lte.hf.dense import load_tokenizer
from lte.records import load_record
from lte.report.inputs import load_inputs
from lte.runs.question_sets import HarnessSettings, KeptAnswers, answer_questions
from lte.runs.runner import execute_all
from lte.runs.settings import read_comparison
from lte_cli import app
from tests.data.tasks.made_up import write
from tests.eval.harness_toys import write_tasks
from tests.runs.conftest import runner_of, write_comparison


@pytest.fixture
def instruct(tmp_path: Path, llama: Path) -> Callable[..., Path]:
    """Writes the file of a comparison that tunes on made-up LIMA and Alpaca, and then asks toy questions."""
    chats = [{"instruction": f"What is file {i}?", "output": f"The statement {i} of the context."} for i in range(40)]
    for name, rows in (("lima", chats[:20]), ("alpaca", chats[20:])):
        write(tmp_path / "data" / "instruct" / f"{name}.jsonl", *map(json.dumps, rows))
    asked = {"harness": ["toy_choice", "toy_group"], "harness_tasks_dir": str(write_tasks(tmp_path / "tasks"))}

    def write_file(*methods: Any, **content: Any) -> Path:
        own = {"task": "instruct", "model": str(llama), "data_dir": str(tmp_path / "data"), "methods": list(methods)}
        return write_comparison(tmp_path / "instruct.yaml", **{**own, **asked, **content})

    return write_file


def test_questions_as_chats(instruct: Callable[..., Path], llama: Path) -> None:
    settings = read_comparison(instruct("lte", apply_chat_template=True)).harness
    assert settings is not None
    model, tokenizer = load_any_model(str(llama)), load_tokenizer(llama)
    found = answer_questions(model, tokenizer, settings)
    assert found["harness_note"] is None
    plain = answer_questions(model, tokenizer, replace(settings, apply_chat_template=False))
    for task, score in found["harness"].items():
        assert score["config"]["apply_chat_template"]
        assert score["tokens_evaluated"] > plain["harness"][task]["tokens_evaluated"]
        assert not plain["harness"][task]["config"]["apply_chat_template"]


def test_tuning_and_questions_in_one_comparison(instruct: Callable[..., Path], tmp_path: Path) -> None:
    start = {"method": "dense", "label": "dense-start", "fine_tune": False, "base": "start"}
    file = instruct(
        start,
        {"method": "lte", "keep": True},
        "teal",
        harness_limit={"toy_choice": 2},
        num_fewshot={"toy_choice": 0},
        harness_batch_size={"toy_choice": 3},
    )
    read_comparison(file).harness.check()  # type: ignore[union-attr]
    assert execute_all([runner_of(file, tmp_path)[0]]) == []
    records = {path.stem: load_record(path) for path in (tmp_path / "records").glob("*.json")}
    assert {record["task"] for record in records.values()} == {"instruct"}
    # Both sets trained: 2 of the 40 chats are held out.
    assert records["lte-0.5-seed0"]["config"]["data_info"]["train"]["examples"] == 38
    for record in records.values():
        assert set(record["harness"]) == {"toy_choice", "toy_group"}
        assert record["harness_note"] is None
        assert record["harness"]["toy_choice"]["config"]["num_fewshot"] == 0
        assert record["harness"]["toy_choice"]["config"]["num_samples"] == 2
        assert record["harness"]["toy_group"]["config"]["num_samples"] > 4
        assert [record["harness"][name]["config"]["batch_size"] for name in ("toy_choice", "toy_group")] == [3, 8]
        assert set(record["harness"]["toy_group"]["by_task"]) == {"toy_choice", "toy_other"}
    dense, ours, teal = (
        records[name]["harness"] for name in ("dense-start-0-seed0", "lte-0.5-seed0", "teal-0.5-seed0")
    )
    assert dense["toy_choice"]["sparsity"] == 0
    assert teal["toy_choice"]["weight_sparsity"] > 0.2
    # What `lte eval --harness` gives for the saved folder, on the kernels.
    model = load_any_model(str(tmp_path / "work" / "lte-0.5-seed0"), kernels="auto")
    tokenizer = load_tokenizer(tmp_path / "work" / "lte-0.5-seed0")
    (score,) = evaluate_harness(model, tokenizer, ["toy_choice"], limit=2, tasks_dir=tmp_path / "tasks").scores
    assert score.measurement is not None
    assert ours["toy_choice"]["metrics"] == pytest.approx(score.metrics)
    assert ours["toy_choice"]["sparsity"] == score.measurement.sparsity != records["lte-0.5-seed0"]["sparsity"]
    # The report has a comparison for each set.
    runs = load_inputs([tmp_path / "records"]).records
    assert sorted({run.task for run in runs}) == ["instruct", "toy_choice", "toy_group"]
    result = CliRunner().invoke(app, ["report", str(tmp_path / "records"), "--task", "toy_choice"])
    assert result.exit_code == 0, result.output
    assert f"toy_choice, test: {records['lte-0.5-seed0']['model']}" in result.output.replace("\n", "")
    assert "perplexity" not in result.output
    assert f"{100 * score.measurement.sparsity:.1f}%" in result.output


def test_a_model_that_answers_no_questions_says_so(
    mrpc: Callable[..., Path], tmp_path: Path, instruct: Callable[..., Path]
) -> None:
    file = mrpc(
        {"method": "dense", "fine_tune": False, "base": "start"},
        {"method": "sigma_moe", "expert_size": 7},
        harness=["toy_choice"],
    )
    instruct("lte")
    execute_all([runner_of(file, tmp_path)[0]])
    record = load_record(tmp_path / "records" / "dense-0-seed0.json")
    note = "not run: the model does not predict the next token"
    assert (record["harness"], record["harness_note"]) == ({}, note)
    assert record["value"] is not None
    assert load_record(tmp_path / "records" / "sigma_moe-0.5-seed0.json")["harness_note"] == "not run: the run failed"
    result = CliRunner().invoke(app, ["report", str(tmp_path / "records")], env={"COLUMNS": "200"})
    assert f"Question sets of dense at 0%: {note}." in result.output


def test_a_set_that_fails_leaves_the_others(
    instruct: Callable[..., Path], llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = read_comparison(instruct("lte", num_fewshot={"toy_choice": 9}, harness_weights=["native"])).harness
    assert settings is not None
    rounded = answer_questions(load_any_model(str(llama)), load_tokenizer(llama), settings, "int8")
    assert rounded == {"harness": {}, "harness_note": "not run: harness_weights leaves out int8"}
    given = (load_any_model(str(llama)), load_tokenizer(llama))
    kept = KeptAnswers(tmp_path / "questions.json", "one")
    found = answer_questions(*given, settings, kept=kept)
    assert set(found["harness"]) == {"toy_group"}
    assert found["harness_note"].startswith("toy_choice failed: ValueError: num_fewshot must be what toy_choice has")

    # A process that comes after does what is missing, of the same model and settings.
    def missing(model: Any, tokenizer: Any, settings: Any, name: str) -> dict[str, Any]:
        return {name: {"task": name}}

    monkeypatch.setattr("lte.runs.question_sets._scores", missing)
    again = answer_questions(*given, settings, kept=kept)
    assert again["harness"] == {"toy_choice": {"task": "toy_choice"}, **found["harness"]}
    # Scores of a log-softmax in the model's own dtype, as they were kept before, are not taken.
    before = tmp_path / "before.json"
    before.write_text(json.dumps({"of": f"one {settings}", "scores": found["harness"]}))
    others = (replace(kept, fingerprint="two"), replace(kept, file=tmp_path / "none.json"), replace(kept, file=before))
    for other in others:
        assert answer_questions(*given, settings, kept=other)["harness"]["toy_group"] == {"task": "toy_group"}


@pytest.mark.parametrize("shared", [True, False])
def test_a_set_without_room_beside_other_processes_is_no_note(
    instruct: Callable[..., Path], llama: Path, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    def no_room(*args: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("lte.eval.harness.evaluate_harness", no_room)
    monkeypatch.setattr("lte.runs.memory.others_fill_gpu", lambda: shared)
    settings = read_comparison(instruct("lte")).harness
    assert settings is not None
    model, tokenizer = load_any_model(str(llama)), load_tokenizer(llama)
    if shared:
        with pytest.raises(torch.OutOfMemoryError):
            answer_questions(model, tokenizer, settings)
    else:
        assert "OutOfMemoryError" in answer_questions(model, tokenizer, settings)["harness_note"]


def test_missing_questions_are_named_before_anything_trains(instruct: Callable[..., Path], tmp_path: Path) -> None:
    folders = ["--output", str(tmp_path / "records"), "--work", str(tmp_path / "work")]
    result = CliRunner().invoke(app, ["compare", str(instruct("lte", harness="toy_choice, piqa_files")), *folders])
    assert result.exit_code == 1
    message = f"holds qa/piqa.test.jsonl.gz, got harness_data={tmp_path / 'data'}"
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "work").exists()


def test_the_data_folder_stands_in_for_that_of_the_questions(instruct: Callable[..., Path]) -> None:
    assert read_comparison(instruct("lte"), data_dir="/data").harness.harness_data == "/data"  # type: ignore[union-attr]
    settings = read_comparison(instruct("lte", harness="a, b", harness_data="/q", num_fewshot=5), data_dir="/d").harness
    assert settings == HarnessSettings(
        harness=("a", "b"), harness_data="/q", num_fewshot=5, harness_tasks_dir=settings and settings.harness_tasks_dir
    )
    assert settings.of_task("num_fewshot", "b") == 5
    assert read_comparison(instruct("lte", harness=None, harness_tasks_dir=None)).harness is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"harness": None, "harness_limit": 3},
            "harness must be given with harness_limit, harness_tasks_dir, got none",
        ),
        ({"harness": []}, "harness must be a list of names of tasks, got harness=[]"),
        ({"harness": [5]}, "harness must be a list of names of tasks, got harness=[5]"),
        ({"harness_limit": 0}, "harness_limit must be a whole number from 1, got harness_limit=0"),
        ({"harness_batch_size": "a"}, "harness_batch_size must be a whole number from 1, got harness_batch_size='a'"),
        ({"num_fewshot": -1}, "num_fewshot must be a whole number from 0, got num_fewshot=-1"),
        ({"num_fewshot": {"toy_choise": 1}}, "did you mean toy_choice"),
        ({"harness_limit": {"toy_choise": 1}}, "did you mean toy_choice"),
        ({"harness_batch_size": {"toy_choise": 4}}, "did you mean toy_choice"),
        ({"harness_weights": 8}, "harness_weights must be a list of formats, got harness_weights=8"),
        ({"harness_weights": "int3"}, "harness_weights must be one of native, int8, int4, int4-64, int4-32"),
        ({"harness_limit": {"toy_choice": 0}}, "harness_limit must be a whole number from 1, got harness_limit=0"),
        ({"apply_chat_template": 1}, "apply_chat_template must be true or false, got apply_chat_template=1"),
        ({"harnes": ["a"]}, "did you mean harness"),
    ],
)
def test_a_mistake_is_named(instruct: Callable[..., Path], content: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        read_comparison(instruct("lte", **content))
