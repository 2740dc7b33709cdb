"""The text that a model decodes while it is timed is what it is measured on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lte.data.config import DataConfig
from lte.data.tasks import TaskConfig
from lte.eval.generation import generate_answers
from lte.hf.dense import load_tokenizer
from lte.runs.workload import TaskWorkload, TextWorkload
from tests.cli.conftest import save_tiny_model
from tests.data.tasks.made_up import write_e2e


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny_model(tmp_path / "model", "llama")
    return tmp_path


def loaded(folder: Path, task: str) -> tuple[TaskWorkload, Any]:
    config = TaskConfig(task=task, data_dir=str(folder), max_new_tokens=12 if task == "e2e" else None)
    data = DataConfig(sequence_length=96, pack=False, validation_fraction=0.5)
    work = TaskWorkload(config, data, load_tokenizer(folder / "model"), 3, ("train", None))
    model = work.load_model(str(folder / "model"))
    work.load_data(model)
    return work, model


def test_an_answer_is_the_models_own(folder: Path) -> None:
    write_e2e(folder / "e2e")
    work, model = loaded(folder, "e2e")
    ids, prompt = work.text_to_decode(model, 96)
    assert ids[:prompt] in work.data.measured["input_ids"]
    assert [ids[prompt:]] == generate_answers(model, work.tokenizer, [ids[:prompt]], 12, batch_size=1, progress=False)
    shorter, left = work.text_to_decode(model, 16)
    assert (shorter, left) == (ids[-16:], 16 - (len(ids) - prompt))


def test_a_chat_is_one_whose_answers_come_into_the_steps(folder: Path) -> None:
    (folder / "tulu").mkdir()
    with (folder / "tulu" / "tulu.jsonl").open("w") as file:
        for i in range(40):
            said = {"user": "How much rain? " * (1 + i % 3), "assistant": f"{i} feet of it. " * (1 + i % 7)}
            messages = [{"role": role, "content": content} for role, content in said.items()]
            print(json.dumps({"messages": messages, "id": i}), file=file)
    work, model = loaded(folder, "tulu")
    ids, prompt = work.text_to_decode(model, 40)
    assert (len(ids), prompt) == (40, 10)
    rows = [
        (row["input_ids"][:40].tolist(), int((row["labels"][10:40] != -100).sum()))
        for row in (work.data.measured[index] for index in range(16))
    ]
    assert len({count for _, count in rows}) > 1
    assert (ids, max(count for _, count in rows)) in rows


@pytest.mark.parametrize("pack", [True, False])
def test_text_is_the_held_out_one(folder: Path, pack: bool) -> None:
    (folder / "train.txt").write_text("rain falls on the hill. " * 50)
    # Without packing rows differ in length: what fills up a batch is no text.
    documents = ("wind", "wind blows. ", "wind blows in the wood. " * 50)
    (folder / "held_out.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    tokenizer = load_tokenizer(folder / "model")
    config = DataConfig(
        train=str(folder / "train.txt"), validation=str(folder / "held_out.jsonl"), sequence_length=32, pack=pack
    )
    work = TextWorkload(config, tokenizer, 2)
    model = work.load_model(str(folder / "model"))
    work.load_data(model)
    ids, prompt = work.text_to_decode(model, 20)
    assert (len(ids), prompt) == (20, 5)
    assert tokenizer.pad_token_id not in ids
    assert tokenizer.decode(ids).startswith("wind")
