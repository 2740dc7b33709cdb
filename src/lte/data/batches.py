"""Batches from whatever holds text: strings, rows of tokens, or batches already.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lte.data.rows import LmCollator, calibration_batches
from lte.hf.inputs import unwrapped

Batch = Mapping[str, Tensor]

MOST_TOKENS_OF_A_TEXT = 1024
"""Texts are cut into rows of at most so many tokens, or what the model takes if that is less."""


def as_batches(
    data: Any,
    model: Any,
    batch_size: int,
    collator: Any = None,
    *,
    tokenizer: Any = None,
    max_tokens: int | None = None,
) -> Iterable[Batch]:
    """Batches of texts, of rows, or of batches, in their order.

    Args:
        data: a list of texts; rows with `input_ids` [T], as a torch or Hugging Face data set, which may be a stream, or
            as any iterable of mappings; or an iterable of batches, mappings of tensors [B, T].
        model: its pad token fills rows of different lengths.
        batch_size: rows per batch, for texts and rows.
        collator: makes a batch of rows; `None` pads on the right and ignores the padding.
        tokenizer: of the model, for texts.
        max_tokens: about how many tokens to take. Those of a data set that has a length are spread evenly over it,
            others are its first ones; `None` takes all.

    Raises:
        ValueError: for texts without a tokenizer, or data of another kind.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got batch_size={batch_size}")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got max_tokens={max_tokens}")
    pad = getattr(getattr(model, "config", None), "pad_token_id", None)
    # What padding holds does not matter: attention and labels leave it out.
    collator = collator or LmCollator(pad or 0)
    if (isinstance(data, Dataset) or hasattr(data, "column_names")) and hasattr(data, "__len__"):
        if max_tokens is not None:
            return calibration_batches(data, max_tokens, batch_size, collator)
        return DataLoader(data, batch_size=batch_size, collate_fn=collator)
    if isinstance(data, str | Mapping) or not isinstance(data, Iterable):
        raise ValueError(f"data must be a list of texts, rows with input_ids, or batches, got a {type(data).__name__}")
    items = iter(data)
    first = next(items, None)
    if first is None:
        return []
    items = chain([first], items)
    if isinstance(first, str):
        return _stacked(_cut(_text_rows(items, tokenizer, model), max_tokens), batch_size, collator)
    if not isinstance(first, Mapping):
        raise ValueError(f"data must hold texts, rows with input_ids, or batches, got a {type(first).__name__}")
    if "input_ids" not in first:
        keys = ", ".join(map(str, first))
        raise ValueError(f"input_ids must be in every batch as [B, T], got the keys {keys}; or in every row, as [T]")
    if torch.as_tensor(first["input_ids"]).ndim == 1:
        return _stacked(_cut(items, max_tokens), batch_size, collator)
    return items if max_tokens is None else _cut(items, max_tokens)


def _text_rows(texts: Iterable[str], tokenizer: Any, model: Any) -> Iterator[dict[str, Tensor]]:
    """Rows of each text's tokens, which all count."""
    if tokenizer is None:
        raise ValueError("tokenizer must be given for texts, got tokenizer=None; pass that of the model")
    positions = getattr(unwrapped(model).config, "max_position_embeddings", None)
    length = min(positions or MOST_TOKENS_OF_A_TEXT, MOST_TOKENS_OF_A_TEXT)
    for text in texts:
        # Longer than the model takes is no fault here: it is cut.
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)
        for part in ids.split(length) if len(ids) else ():
            yield {"input_ids": part, "labels": part}


def _cut(items: Iterable[Any], max_tokens: int | None) -> Iterator[Any]:
    """Rows or batches until they hold `max_tokens` tokens."""
    seen = 0
    for item in items:
        yield item
        seen += torch.as_tensor(item["input_ids"]).numel() if max_tokens is not None else 0
        if max_tokens is not None and seen >= max_tokens:
            return


def _stacked(rows: Iterable[Any], batch_size: int, collator: Any) -> Iterator[Batch]:
    rows = iter(rows)
    while batch := list(islice(rows, batch_size)):
        yield collator(batch)
