"""Tokenizers of words and of bytes, and files of texts, completions and chats."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lte.data.rows import DataConfig, read_documents
from tests.data.text_samples import CHAT, DOCUMENTS, TEMPLATE, write_jsonl


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """A word is a token; w<i> has the id i + 7."""
    words = ["[UNK]", "[EOS]", "[BOS]", "user", "assistant", ":", "END", *(f"w{i}" for i in range(300))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[EOS]", unk_token="[UNK]")
    wrapped.chat_template = TEMPLATE
    return wrapped


@pytest.fixture(scope="module")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE that starts every text with [BOS], as Llama 3 does."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["[EOS]", "[BOS]"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(read_documents("pydoc-topics", DataConfig())[:5], trainer)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[EOS]", bos_token="[BOS]")


@pytest.fixture
def jsonl(tmp_path: Path) -> str:
    return write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in DOCUMENTS])


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    rows = [
        {"prompt": f"w{i} w{i + 1}", "completion": " ".join(f"w{i + j}" for j in range(i % 5 + 1))} for i in range(40)
    ]
    return write_jsonl(tmp_path / "pairs.jsonl", rows)


@pytest.fixture
def chats(tmp_path: Path) -> str:
    messages = [{"role": role, "content": content} for role, content in CHAT]
    rows = [{"messages": [*messages, {"role": "user", "content": f"w{i}"}]} for i in range(100, 104)]
    return write_jsonl(tmp_path / "chats.jsonl", rows)
