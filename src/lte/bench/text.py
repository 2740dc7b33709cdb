"""Tokens of text for the model's own routing, or random ones where the routing is forced."""

from __future__ import annotations

from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
from torch import Tensor


def read_text(path: Path | None) -> str:
    """A text file, or by default Python's own help topics.

    Raises:
        ValueError: if the file does not exist.
    """
    if path is None:
        return "\n".join(topics.topics.values())
    if not path.is_file():
        raise ValueError(f"text must be an existing file, got text={path}")
    return path.read_text(encoding="utf-8")


def text_name(path: Path | None) -> str:
    """What `read_text` reads, for a result."""
    return "Python's help topics" if path is None else str(path)


def text_ids(tokenizer: Any, text: str, count: int, length: int) -> Tensor:
    """Consecutive pieces of a text as tokens [N, L]: N is `count`, or less if the text ends before.

    Raises:
        ValueError: if the text has fewer than `length` tokens.
    """
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"][0]
    pieces = min(len(ids) // length, count)
    if pieces == 0:
        raise ValueError(f"text must hold at least {length} tokens, got {len(ids)}; give a longer one")
    return ids[: pieces * length].view(pieces, length)


def random_ids(vocabulary: int, count: int, length: int, seed: int) -> Tensor:
    """Random tokens [N, L]."""
    return torch.randint(vocabulary, (count, length), generator=torch.Generator().manual_seed(seed))
