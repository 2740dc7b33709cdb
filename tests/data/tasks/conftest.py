"""The tokenizers of the training data's tests."""

from tests.train.conftest import byte_tokenizer, tokenizer

__all__ = ["byte_tokenizer", "tokenizer"]
