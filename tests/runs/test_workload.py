"""What is said of the data of texts and tasks, and which models read them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoConfig

from lte.data.config import DataConfig
from lte.data.tasks import TaskConfig
from lte.hf.dense import load_tokenizer
from lte.runs.workload import TaskWorkload, TextWorkload
from tests.cli.conftest import save_tiny_model
from tests.data.tasks.made_up import write_e2e, write_sst2, write_tulu


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("task", "write", "shown"),
    [
        (
            "sst2",
            write_sst2,
            r"96 examples from .*train.tsv; .*(film|joy|bore|comedy).*\[\[ [01]\]\]$",
        ),
        ("tulu", write_tulu, r"20 examples from .*tulu.jsonl; .*user speaks\\n\[\[assistant: assistant speaks\\n\]\]"),
        ("e2e", write_e2e, r"8 examples from .*trainset.csv; .*\]\\nDescription:\\n\[\[.*\.</s>\]\]$"),
    ],
)
def test_a_task_is_announced_with_a_row(
    tmp_path: Path, folder: Path, task: str, write: Callable[[Path], Path], shown: str
) -> None:
    write(tmp_path / task)
    data = DataConfig(sequence_length=160, pack=False, validation_fraction=0.02)
    config = TaskConfig(task=task, data_dir=str(tmp_path), max_new_tokens=12 if task == "e2e" else None)
    work = TaskWorkload(config, data, load_tokenizer(folder), 2, ("train", None))
    work.load_data(SimpleNamespace(config=AutoConfig.from_pretrained(folder)))
    (line,) = work.announcements
    assert line.startswith(f"{task}: ")
    assert re.search(shown, line), line


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_an_encoder_is_no_model_of_text(tmp_path: Path, folder: Path, model_type: str) -> None:
    work = TextWorkload(DataConfig(), load_tokenizer(folder), 2)
    config = AutoConfig.for_model(model_type)
    with pytest.raises(ValueError, match=r"must predict the next token from those before it, got model_type=\w*bert"):
        work.load_data(SimpleNamespace(config=config))
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="an encoder that sees all tokens; take a decoder"):
        work.load_model(str(tmp_path))
