"""`lte train --task` and `lte eval --task` on made-up data in the original forms."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import lte
from tests.cli.conftest import save_tiny_model
from tests.data.tasks.made_up import write, write_e2e, write_sst2
from tests.tiny_models import EXPERT_SIZE

STEPS = [
    *("--batch-size", "8", "--expert-size", str(EXPERT_SIZE), "--learning-rate", "3e-3"),
    *("--stage1-steps", "40", "--stage2-steps", "40", "--router-fit-tokens", "512", "--calibration-tokens", "2048"),
]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with SST-2 and E2E."""
    path = tmp_path_factory.mktemp("data")
    write_sst2(path / "SST-2")
    write_e2e(path / "e2e")
    return path


def train(run: Callable[..., Any], task: str, data_dir: Path, model: Path, output: Path, *flags: str) -> dict[str, Any]:
    arguments = ["--task", task, "--data-dir", data_dir, "--model", model, "--output", output, *STEPS, *flags]
    result = run("train", *arguments)
    assert result.exit_code == 0, result.output + result.stderr
    return json.loads((output / "result.json").read_text())


def evaluate(run: Callable[..., Any], task: str, data_dir: Path, model: Path, *flags: str) -> dict[str, Any]:
    file = model / "eval.json"
    result = run("eval", model, "--task", task, "--data-dir", data_dir, "--json", file, *flags)
    assert result.exit_code == 0, result.output + result.stderr
    return json.loads(file.read_text())


@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_sst2_from_the_dense_model_to_a_sparse_one(
    run: Callable[..., Any], data_dir: Path, tmp_path: Path, model_type: str
) -> None:
    base, dense, sparse = tmp_path / "base", tmp_path / "dense", tmp_path / "sparse"
    save_tiny_model(base, model_type)
    length = ["--sequence-length", "48"]
    reference = train(run, "sst2", data_dir, base, dense, "--recipe", "dense", *length)
    assert (reference["method"], reference["metric"], reference["split"]) == ("dense", "accuracy", "validation")
    assert reference["value"] == 1
    assert json.loads((dense / "config.json").read_text())["model_type"] == model_type
    record = train(run, "sst2", data_dir, dense, sparse, "--target-sparsity", "0.4", *length)
    # The head that comes with the dense model is already right after one pass over the data.
    assert record["value"] == 1
    assert record["sparsity"] == pytest.approx(0.4, abs=0.05)
    assert record["flops_per_token"] < reference["flops_per_token"] * 1.1
    model = AutoModelForSequenceClassification.from_pretrained(sparse)
    assert len(lte.sparse_ffns(model)) == 2
    assert model.config.lte_measurement["split"] == "validation"
    found = evaluate(run, "sst2", data_dir / "SST-2", sparse, *length)
    plain = evaluate(run, "sst2", data_dir / "SST-2", sparse, *length, "--kernels", "off")
    for again in (found, plain):
        assert again["metrics"] == record["metrics"] == {"accuracy": 1.0}
        assert again["sparsity"] == pytest.approx(record["sparsity"])
        assert again["bytes_per_token"] == pytest.approx(record["bytes_per_token"])
    assert plain["config"]["kernels"] is None
    assert found["config"]["kernels"] == record["config"]["kernels"]
    info = found["config"]["data_info"]["validation"]
    assert info["origin_sha256"] == hashlib.sha256((data_dir / "SST-2" / "dev.tsv").read_bytes()).hexdigest()
    assert info["sha256"] == record["config"]["data_info"]["validation"]["sha256"]
    assert evaluate(run, "sst2", data_dir, sparse, *length, "--limit", "4", "--split", "train")["split"] == "train"


def test_lte_starts_from_the_trained_head(run: Callable[..., Any], data_dir: Path, tmp_path: Path) -> None:
    base, dense, sparse = tmp_path / "base", tmp_path / "dense", tmp_path / "sparse"
    save_tiny_model(base, "bert")
    length = ["--sequence-length", "48", "--stage1-steps", "1", "--stage2-steps", "1"]
    train(run, "sst2", data_dir, base, dense, "--recipe", "dense", *length)
    train(run, "sst2", data_dir, dense, sparse, *length, "--trainable", "routers", "--distill-from", "initial")
    heads = [AutoModelForSequenceClassification.from_pretrained(path).classifier.weight for path in (dense, sparse)]
    assert torch.equal(*heads)
    # The base has no head to be taught by.
    arguments = [
        "--task",
        "sst2",
        "--data-dir",
        data_dir,
        "--model",
        base,
        "--output",
        tmp_path / "no",
        *STEPS,
        *length,
    ]
    result = run("train", *arguments, "--distill-from", "initial")
    assert result.exit_code == 1
    assert "model must have a head trained on sst2" in result.stderr


def test_e2e_is_learnt_and_measured_on_what_is_written(run: Callable[..., Any], data_dir: Path, tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "base", "llama")
    # Without packing a batch is 8 examples, so that few steps are enough.
    length = ["--sequence-length", "96", "--max-new-tokens", "32"]
    longer = ["--stage1-steps", "120", "--stage2-steps", "60", "--target-sparsity", "0.3", "--no-pack"]
    record = train(run, "e2e", data_dir, tmp_path / "base", tmp_path / "out", *length, *longer)
    assert (record["metric"], record["split"]) == ("rougeL", "test")
    assert set(record["metrics"]) == {"rougeL", "bleu", "nist"}
    assert record["value"] > 0.7
    # The thresholds were set on what it writes to the same meanings.
    assert record["sparsity"] == pytest.approx(0.3, abs=0.03)
    assert record["tokens_evaluated"] == record["measurement"]["tokens"] <= 8 * 32
    for flags in (("--kernels", "off"), ("--batch-size", "3")):
        found = evaluate(run, "e2e", data_dir / "e2e", tmp_path / "out", *length, *flags)
        assert found["metrics"] == record["metrics"]
        assert found["sparsity"] == pytest.approx(record["sparsity"])
    found = evaluate(run, "e2e", data_dir, tmp_path / "out", *length, "--split", "validation", "--limit", "2")
    assert found["split"] == "validation"
    assert found["config"]["data_info"]["validation"]["examples"] == 2


def test_a_text_has_a_perplexity_by_word_too(run: Callable[..., Any], dense_folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "wiki.test.raw", "one two three", "four five")
    length = ["--sequence-length", "64"]
    result = run(
        "eval", dense_folder, "--task", "wikitext2", "--data-dir", tmp_path, "--json", tmp_path / "e.json", *length
    )
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "e.json").read_text())
    words = record["metrics"]["perplexity_per_word"]
    assert record["value"] ** (record["tokens_evaluated"] / 7) == pytest.approx(words)
    assert "perplexity per word" in result.output


def test_instructions_train_on_their_answers(run: Callable[..., Any], dense_folder: Path, tmp_path: Path) -> None:
    rows = [json.dumps({"instruction": f"Say {i}.", "input": "", "output": f"It is {i}."}) for i in range(40)]
    write(tmp_path / "lima.jsonl", *rows)
    record = train(run, "lima", tmp_path, dense_folder, tmp_path / "out", "--sequence-length", "64")
    assert record["value"] < record["perplexity_before"] / 2
    again = evaluate(run, "lima", tmp_path, tmp_path / "out", "--sequence-length", "64")
    assert again["value"] == pytest.approx(record["value"], rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task", "sst"], "did you mean sst2"),
        (["--task", "sst2", "--train", "x.jsonl"], "train must not be given with a task, which has its own data"),
        (["--task", "sst2", "--mix", "m.yaml"], "mix must not be given with a task, which has its own data"),
        (["--task", "sst2", "--data-dir", "/no/such"], "data_dir must be an existing folder"),
        (
            ["--chat-template", "no.jinja"],
            "chat_template must be a file with a Jinja template, got chat_template=no.jinja",
        ),
        (["--data-dir", "DATA"], "task must be given with data_dir"),
        (["--task", "sst2", "--data-dir", "DATA", "--split", "dev"], "split must be one of train, validation, test"),
    ],
)
def test_a_mistake_is_one_sentence(
    run: Callable[..., Any], dense_folder: Path, data_dir: Path, tmp_path: Path, flags: list[str], message: str
) -> None:
    flags = [str(data_dir) if flag == "DATA" else flag for flag in flags]
    result = run("train", "--model", dense_folder, "--output", tmp_path / "out", "--sequence-length", 48, *flags)
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_a_folder_without_the_head_is_not_measured(run: Callable[..., Any], dense_folder: Path, data_dir: Path) -> None:
    result = run("eval", dense_folder, "--task", "sst2", "--data-dir", data_dir)
    assert result.exit_code == 1
    assert "model must have a head trained on sst2" in result.stderr
