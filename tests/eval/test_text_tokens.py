from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lte.eval.text_tokens import encode_text, readable_entries
from lte.hf.dense import load_tokenizer
from tests.cli.conftest import save_tiny_model


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(save_tiny_model(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def with_marks() -> Any:
    """Whole words between [CLS] and [SEP], as BERT has them."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "river": 3, "town": 4}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")


@pytest.mark.parametrize(
    "text", ["a river, and a town\n\n\tby it", "😀 family 👩‍👩‍👧", "e\u0301 and ñ", "日本語", "<script>&amp;"]
)
def test_the_stretches_are_the_whole_text(byte_level: Any, text: str) -> None:
    tokens = encode_text(byte_level, text, 500)
    assert "".join(tokens.texts) == text
    assert len(tokens.texts) == len(tokens.entries) == len(tokens.ids) == tokens.total
    assert not tokens.truncated


def test_a_character_of_several_tokens_stands_at_the_first(byte_level: Any) -> None:
    tokens = encode_text(byte_level, "😀", 10)
    assert tokens.texts == ["😀", "", "", ""]
    assert all(tokens.entries)


def test_special_tokens_and_the_spaces_between_words(with_marks: Any) -> None:
    tokens = encode_text(with_marks, "river  castle town", 10)
    assert tokens.texts == ["", "river", "  castle", " town", ""]
    assert tokens.entries == ["[CLS]", "river", "[UNK]", "town", "[SEP]"]
    assert tokens.special == [True, False, True, False, True]


def test_a_special_token_that_a_text_holds_in_writing_is_one(with_marks: Any) -> None:
    tokens = encode_text(with_marks, "river [SEP] town", 10)
    assert [text for text, special in zip(tokens.texts, tokens.special, strict=True) if special] == ["", " [SEP]", ""]


def test_entries_are_text_or_bytes_and_never_an_alphabet_of_bytes(byte_level: Any) -> None:
    ids = byte_level("a \n😀", add_special_tokens=False)["input_ids"]
    assert readable_entries(byte_level, ids) == ["a", " ", "\n", "byte F0", "byte 9F", "byte 98", "byte 80"]
    pieces = Tokenizer(models.WordLevel({"[UNK]": 0, "\u2581the": 1, "<0xF0>": 2, "##ing": 3}, "[UNK]"))
    found = readable_entries(PreTrainedTokenizerFast(tokenizer_object=pieces), [1, 2, 3])
    assert found == [" the", "byte F0", "##ing"]


def test_a_long_text_is_cut_before_what_closes_it(with_marks: Any) -> None:
    tokens = encode_text(with_marks, "river town " * 50, 6)
    assert tokens.entries == ["[CLS]", "river", "town", "river", "town", "[SEP]"]
    assert tokens.total == 102
    assert tokens.truncated
    # The tokenizer cuts nothing afterwards.
    assert len(encode_text(with_marks, "river town " * 50, 200)) == 102


def test_texts_without_tokens_and_limits_without_room(byte_level: Any, with_marks: Any) -> None:
    for tokenizer in (byte_level, with_marks):
        with pytest.raises(ValueError, match="text must hold at least one token, got ''"):
            encode_text(tokenizer, "", 10)
    with pytest.raises(ValueError, match="max_tokens must be at least 1, got max_tokens=0"):
        encode_text(byte_level, "a", 0)


def test_one_token(byte_level: Any) -> None:
    tokens = encode_text(byte_level, "a", 10)
    assert (tokens.texts, tokens.total) == (["a"], 1)
