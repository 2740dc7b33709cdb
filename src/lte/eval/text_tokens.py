"""A text as a model reads it: token ids, and the stretch of text that each token stands for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TextTokens:
    """The first tokens of a text.

    Attributes:
        ids: token ids, [T].
        texts: the stretch of the text that each token stands for, white space before it included, [T]. It is empty for
            a special token, and for all but the first token of a character that takes several.
        entries: the vocabulary entry of each token, [T].
        total: how many tokens the whole text has.
    """

    ids: list[int]
    texts: list[str]
    entries: list[str]
    total: int

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def truncated(self) -> bool:
        """Whether the text goes on after these tokens."""
        return len(self.ids) < self.total


def encode_text(tokenizer: Any, text: str, max_tokens: int) -> TextTokens:
    """Tokenises a text as the model is used, special tokens included, and keeps its first tokens.

    Args:
        tokenizer: a transformers tokenizer.
        text: any text.
        max_tokens: how many tokens to keep, special ones included.

    Raises:
        ValueError: if the text has no tokens, or `max_tokens` is below 1.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got max_tokens={max_tokens}")
    settings: dict[str, Any] = {"return_offsets_mapping": tokenizer.is_fast, "verbose": False}
    encoded = tokenizer(text, **settings)
    total = len(encoded["input_ids"])
    if not text or total == 0:
        raise ValueError(f"text must hold at least one token, got {text[:40]!r}; give one with words in it")
    if total > max_tokens:
        # Not a slice: what closes a text, [SEP] say, stays.
        encoded = tokenizer(text, truncation=True, max_length=max_tokens, **settings)
    ids = list(encoded["input_ids"])
    if tokenizer.is_fast:
        texts = _stretches(text, encoded["offset_mapping"])
    else:
        texts = [tokenizer.decode([token]) for token in ids]
    return TextTokens(ids, texts, [str(entry) for entry in tokenizer.convert_ids_to_tokens(ids)], total)


def _stretches(text: str, offsets: list[tuple[int, int]]) -> list[str]:
    """What of the text lies between the end of a token and the end of the one before."""
    found, done = [], 0
    for start, end in offsets:
        # A special token stands nowhere: (0, 0).
        found.append(text[done:end] if end > max(start, done) else "")
        done = max(done, end)
    return found
