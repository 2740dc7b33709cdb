"""A text as a model reads it: token ids, and the stretch of text that each token stands for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

# GPT-2's alphabet, in which byte-level vocabularies write bytes.
_BYTES = {sign: byte for byte, sign in bytes_to_unicode().items()}


@dataclass(frozen=True)
class TextTokens:
    """The first tokens of a text.

    Attributes:
        ids: token ids, [T].
        texts: the stretch of the text that each token stands for, white space before it included, [T]. It is empty for
            a special token, and for all but the first token of a character that takes several.
        entries: the vocabulary entry of each token in words, see `readable_entries`, [T].
        special: whether a token is a special one, which a text can also hold in writing, [T].
        total: how many tokens the whole text has.
    """

    ids: list[int]
    texts: list[str]
    entries: list[str]
    special: list[bool]
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
    marked = special_ids(tokenizer)
    return TextTokens(ids, texts, readable_entries(tokenizer, ids), [token in marked for token in ids], total)


def special_ids(tokenizer: Any) -> set[int]:
    """The ids of all special tokens."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return set(tokenizer.all_special_ids) | {token for token, entry in added.items() if entry.special}


def readable_entries(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The vocabulary entries of tokens as one would read them: text, or `byte F0 9F` for a part of a character."""
    entries = [str(entry) for entry in tokenizer.convert_ids_to_tokens(list(ids))]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    byte_level = backend is not None and "ByteLevel" in f"{backend.pre_tokenizer}{backend.decoder}"
    special = special_ids(tokenizer)
    return [
        entry if token in special else _readable(entry, byte_level) for token, entry in zip(ids, entries, strict=True)
    ]


def _readable(entry: str, byte_level: bool) -> str:
    if byte_level and all(sign in _BYTES for sign in entry):
        raw = bytes(_BYTES[sign] for sign in entry)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return f"byte {raw.hex(' ').upper()}"
    if len(entry) == 6 and entry.startswith("<0x"):
        return f"byte {entry[3:5]}"
    # SentencePiece's space.
    return entry.replace("\N{LOWER ONE EIGHTH BLOCK}", " ")


def _stretches(text: str, offsets: list[tuple[int, int]]) -> list[str]:
    """What of the text lies between the end of a token and the end of the one before."""
    found, done = [], 0
    for start, end in offsets:
        # A special token stands nowhere: (0, 0).
        found.append(text[done:end] if end > max(start, done) else "")
        done = max(done, end)
    return found
