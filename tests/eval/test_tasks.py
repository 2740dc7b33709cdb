"""`evaluate_task`: the same numbers whatever the padding, batches and kernels, and the sparsity of the same tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import lte
from lte.data.config import DataConfig
from lte.data.tasks import TaskConfig, TaskData, get_task, load_task_data, load_task_model
from lte.eval.generation import generate_answers
from lte.eval.sparsity import measure_sparsity
from lte.eval.tasks import TaskResult, evaluate_task
from lte.hf.dense import load_tokenizer
from tests.cli.conftest import save_tiny_model
from tests.data.tasks.made_up import write_e2e, write_sst2, write_stsb
from tests.tiny_models import EXPERT_SIZE, randomise_routers_

SETTINGS = DataConfig(sequence_length=96)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder, and a tiny dense model of some families beside it."""
    path = tmp_path_factory.mktemp("tasks")
    write_sst2(path / "SST-2")
    write_stsb(path / "STS-B")
    write_e2e(path / "e2e")
    for model_type in ("bert", "llama", "gpt2", "t5"):
        save_tiny_model(path / model_type, model_type)
    return path


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def loaded(folder: Path, name: str, model_type: str, *, sparse: bool = True) -> tuple[Any, TaskData, Any]:
    """A model with random routers for a task, its data, and its tokenizer."""
    tokenizer = load_tokenizer(folder / model_type)
    torch.manual_seed(0)
    model = load_task_model(folder / model_type, get_task(name), tokenizer).eval()
    if sparse:
        randomise_routers_(lte.sparsify_(model, lte.LteConfig(expert_size=EXPERT_SIZE, grouping="random")))
    config = TaskConfig(task=name, data_dir=str(folder), max_new_tokens=6)
    decodes = model.config.is_encoder_decoder
    data = load_task_data(get_task(name), tokenizer, config, SETTINGS, train_split=None, encoder_decoder=decodes)
    return model, data, tokenizer


def evaluated(folder: Path, name: str, model_type: str, batch_size: int = 8, side: str = "right") -> TaskResult:
    model, data, tokenizer = loaded(folder, name, model_type)
    tokenizer.padding_side = side
    return evaluate_task(model, get_task(name), data, tokenizer, batch_size=batch_size, progress=False)


@pytest.mark.parametrize("model_type", ["bert", "llama", "gpt2"])
def test_padding_changes_no_prediction(folder: Path, model_type: str) -> None:
    alone = evaluated(folder, "stsb", model_type, batch_size=1)
    for batch_size, side in ((7, "right"), (7, "left"), (24, "left")):
        found = evaluated(folder, "stsb", model_type, batch_size, side)
        torch.testing.assert_close(found.predictions, alone.predictions, rtol=1e-4, atol=1e-5)
        assert found.measurement is not None
        assert alone.measurement is not None
        assert (found.tokens, found.measurement.sparsity) == (alone.tokens, pytest.approx(alone.measurement.sparsity))
    assert len(set(alone.predictions)) > 3


@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_a_classification_counts_every_token_but_padding(folder: Path, model_type: str) -> None:
    model, data, tokenizer = loaded(folder, "sst2", model_type)
    model.train()
    found = evaluate_task(model, get_task("sst2"), data, tokenizer, batch_size=4, progress=False)
    assert model.training
    assert found.tokens == sum(len(row["input_ids"]) for row in data.measured)
    assert found.measurement is not None
    assert found.measurement.tokens == found.tokens
    labels = [row["labels"] for row in data.measured]
    right = sum(a == b for a, b in zip(found.predictions, labels, strict=True))
    assert found.value == found.metrics["accuracy"] == right / len(labels)
    row = {"input_ids": torch.tensor([data.measured[3]["input_ids"]])}
    with torch.no_grad():
        assert model.eval()(**row).logits.argmax().item() == found.predictions[3]


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "t5"])
def test_a_prompt_is_answered_the_same_in_any_batch(folder: Path, model_type: str) -> None:
    model, data, tokenizer = loaded(folder, "e2e", model_type)
    prompts = [row["input_ids"] for row in data.measured]
    one_by_one = [generate_answers(model, tokenizer, [p], 6, progress=False)[0] for p in prompts]
    assert generate_answers(model, tokenizer, prompts, 6, batch_size=5, progress=False) == one_by_one
    assert len({tuple(answer) for answer in one_by_one}) > 1


def test_an_answer_ends_with_the_end_of_text(folder: Path) -> None:
    model, data, tokenizer = loaded(folder, "e2e", "llama", sparse=False)
    prompts = [row["input_ids"] for row in data.measured]
    free = generate_answers(model, tokenizer, prompts, 6, progress=False)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(free[0][2])
    ended = generate_answers(model, tokenizer, prompts, 6, progress=False)
    first = free[0].index(free[0][2])
    assert ended[0] == free[0][: first + 1]


@pytest.mark.parametrize("model_type", ["llama", "t5"])
def test_a_generation_counts_what_was_generated(folder: Path, model_type: str) -> None:
    model, data, tokenizer = loaded(folder, "e2e", model_type)
    found = evaluate_task(model, get_task("e2e"), data, tokenizer, batch_size=3, progress=False)
    prompts = [row["input_ids"] for row in data.measured]
    answers = generate_answers(model, tokenizer, prompts, 6, progress=False)
    assert found.predictions == [tokenizer.decode(a, skip_special_tokens=True).strip() for a in answers]
    assert found.tokens == sum(map(len, answers))
    assert set(found.metrics) == {"rougeL", "bleu", "nist"}
    assert found.measurement is not None
    if model_type == "t5":
        assert found.measurement.tokens == found.tokens + sum(map(len, prompts))
        return
    batches = [
        {"input_ids": torch.tensor([p + a]), "labels": torch.tensor([[-100] * len(p) + a])}
        for p, a in zip(prompts, answers, strict=True)
    ]
    expected = measure_sparsity(model, batches)
    assert found.measurement.tokens == expected.tokens == found.tokens
    assert found.measurement.sparsity == pytest.approx(expected.sparsity)


@pytest.mark.parametrize(("name", "model_type"), [("stsb", "bert"), ("sst2", "llama"), ("e2e", "llama"), ("e2e", "t5")])
def test_kernels_change_nothing(folder: Path, name: str, model_type: str) -> None:
    model, data, tokenizer = loaded(folder, name, model_type)
    plain = evaluate_task(model, get_task(name), data, tokenizer, progress=False)
    lte.accelerate_(model)
    found = evaluate_task(model, get_task(name), data, tokenizer, progress=False)
    if name == "stsb":
        torch.testing.assert_close(found.predictions, plain.predictions, rtol=1e-4, atol=1e-5)
    else:
        assert found.predictions == plain.predictions
        assert found.metrics == plain.metrics
    assert found.measurement is not None
    assert plain.measurement is not None
    assert found.measurement.sparsity == pytest.approx(plain.measurement.sparsity)


def test_logits_of_nan_are_an_error(folder: Path) -> None:
    model, data, tokenizer = loaded(folder, "sst2", "bert", sparse=False)
    with torch.no_grad():
        model.classifier.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="the logits must be finite, got NaN or infinity; the weights are damaged"):
        evaluate_task(model, get_task("sst2"), data, tokenizer, progress=False)


class TestHead:
    def test_the_tokenizers_padding_becomes_the_models(self, folder: Path, tmp_path: Path) -> None:
        model, _, tokenizer = loaded(folder, "sst2", "llama", sparse=False)
        model.config.pad_token_id = 7
        model.save_pretrained(tmp_path)
        again = load_task_model(tmp_path, get_task("sst2"), tokenizer)
        assert again.config.pad_token_id == tokenizer.pad_token_id != 7

    def test_a_trained_head_stays(self, folder: Path, tmp_path: Path) -> None:
        model, _, tokenizer = loaded(folder, "sst2", "llama", sparse=False)
        model.save_pretrained(tmp_path / "dense")
        again = load_task_model(tmp_path / "dense", get_task("sst2"), tokenizer, new_head=False)
        assert torch.equal(again.score.weight, model.score.weight)
        lte.sparsify_(again, lte.LteConfig(expert_size=EXPERT_SIZE)).save_pretrained(tmp_path / "sparse")
        sparse = AutoModelForSequenceClassification.from_pretrained(tmp_path / "sparse")
        assert torch.equal(sparse.score.weight, model.score.weight)
        assert len(lte.sparse_ffns(sparse)) == 2
        assert sparse.config.id2label == {0: "negative", 1: "positive"}
        dense = lte.densify_(sparse)
        assert torch.equal(dense.score.weight, model.score.weight)
        assert type(dense.model) is type(model.model)

    def test_a_model_without_the_head_is_refused_where_it_must_be_trained(self, folder: Path) -> None:
        tokenizer = load_tokenizer(folder / "bert")
        message = "model must have a head trained on sst2, got .*; lte train --task sst2 trains one, from a dense model"
        with pytest.raises(ValueError, match=message):
            load_task_model(folder / "bert", get_task("sst2"), tokenizer, new_head=False)

    def test_the_head_of_another_task_is_refused(self, folder: Path, tmp_path: Path) -> None:
        model, _, tokenizer = loaded(folder, "sst2", "bert", sparse=False)
        model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"model must have a head with 3 outputs for task=mnli, got .* with 2"):
            load_task_model(tmp_path, get_task("mnli"), tokenizer)
        model.config.id2label = {0: "positive", 1: "negative"}
        model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="model must have the outputs negative, positive in this order"):
            load_task_model(tmp_path, get_task("sst2"), tokenizer)

    def test_a_model_that_cannot_do_the_task_is_refused(self, folder: Path) -> None:
        tokenizer = load_tokenizer(folder / "bert")
        with pytest.raises(ValueError, match="model must write text for task=e2e, got model_type=bert"):
            load_task_model(folder / "bert", get_task("e2e"), tokenizer)
        with pytest.raises(ValueError, match="model must predict the next token for task=wikitext2, got model_type=t5"):
            load_task_model(folder / "t5", get_task("wikitext2"), tokenizer)
