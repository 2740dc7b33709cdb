"""A tiny dense model with a tokenizer in a folder, and the command line in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data import topics
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from lte_cli import app
from tests.tiny_models import EXPERT_SIZE, tiny_dense_model

VOCAB_SIZE = 300
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
# A run of a second: 6 steps of 4 rows of 32 tokens in each stage.
SHORT = [
    *("--sequence-length", "32", "--max-train-tokens", "2048", "--max-validation-tokens", "512"),
    *("--batch-size", "4", "--stage1-steps", "6", "--stage2-steps", "6", "--logging-steps", "2"),
    *("--expert-size", str(EXPERT_SIZE), "--learning-rate", "1e-3", "--save-steps", "3"),
    *("--router-fit-tokens", "512", "--calibration-tokens", "2048"),
]


def save_tiny_model(folder: Path, model_type: str = "llama", **overrides: Any) -> Path:
    """A random model with a byte-level tokenizer trained on a few pages."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([topics.topics["with"], topics.topics["while"]], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    settings = {"vocab_size": VOCAB_SIZE, "max_position_embeddings": 256, **overrides}
    tiny_dense_model(model_type, **settings).save_pretrained(folder)
    return folder


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """Matrices this small gain nothing from a second thread, and wait for it if the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def dense_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny dense Llama with a tokenizer."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture(scope="session")
def run() -> Callable[..., Any]:
    """Runs `lte` with arguments; an exception that is no exit is raised."""

    def invoke(*arguments: object) -> Any:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return invoke


@pytest.fixture(scope="session")
def trained(dense_folder: Path, run: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a short run, and what the command said."""
    output = tmp_path_factory.mktemp("trained") / "sparse"
    result = run("train", "--model", dense_folder, "--output", output, *SHORT)
    assert result.exit_code == 0, result.output
    return output, result.output
