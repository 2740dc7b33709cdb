"""Examples to rows of tokens.

Shapes: T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lte.config import IGNORED
from lte.data.encoding import Encoder
from lte.data.rows import TokenRows
from lte.data.tasks.task import Example

BATCH = 1000


def encode_classified(examples: Sequence[Example], tokenizer: Any, length: int) -> tuple[list[dict[str, Any]], int]:
    """Rows with `labels` of texts and pairs of texts, and how many of them had to be cut to `length` tokens.

    Pairs are separated as the tokenizer does it, by a new line if it puts nothing between them.
    """
    marks = tokenizer.num_special_tokens_to_add(pair=True) - tokenizer.num_special_tokens_to_add(pair=False)
    rows, cut = [], 0
    for batch in _batches(examples):
        inputs = [[example["text"].strip() for example in batch]]
        if batch[0]["text_pair"] is not None:
            inputs.append([example["text_pair"].strip() for example in batch])
            inputs = inputs if marks else [[f"{text}\n{pair}" for text, pair in zip(*inputs, strict=True)]]
        # The collator makes the mask.
        options = {"return_attention_mask": False, "verbose": False}
        found = tokenizer(*inputs, truncation=True, max_length=length, **options)
        cut += sum(len(ids) > length for ids in tokenizer(*inputs, **options)["input_ids"])
        for index, example in enumerate(batch):
            rows.append({**{name: values[index] for name, values in found.items()}, "labels": example["label"]})
    return rows, cut


def fit_sources(sources: Sequence[str], template: str, tokenizer: Any, room: int) -> tuple[list[str], int]:
    """Prompts of at most about `room` tokens, and how many sources lost their end for that.

    Raises:
        ValueError: if the template alone leaves no room, or the tokenizer does not say where its tokens lie.
    """
    if not tokenizer.is_fast:
        raise ValueError("tokenizer must be a fast one to cut sources, got a slow one; load it with use_fast=True")
    around = len(tokenizer(template.format(source=""))["input_ids"])
    if room - around < 1:
        raise ValueError(
            f"sequence_length must leave room for a source beside {around} tokens of the prompt and max_new_tokens, "
            f"got {room} for both; raise sequence_length, or lower max_new_tokens"
        )
    options = {"add_special_tokens": False, "return_offsets_mapping": True}
    ends = []
    for batch in _batches(sources):
        found = tokenizer(list(batch), truncation=True, max_length=room - around, **options)
        ends += [offsets[-1][1] if offsets else 0 for offsets in found["offset_mapping"]]
    cut = sum(end < len(source.rstrip()) for end, source in zip(ends, sources, strict=True))
    return [template.format(source=source[:end]) for source, end in zip(sources, ends, strict=True)], cut


def encode_sources(prompts: list[str], tokenizer: Any, encoder: Encoder, encoder_decoder: bool) -> list[dict[str, Any]]:
    """Rows of prompts to answer, as the training rows begin."""
    if encoder_decoder:
        return [{"input_ids": ids} for ids in tokenizer(prompts)["input_ids"]]
    return [{"input_ids": [*encoder.prefix.tolist(), *ids.tolist()]} for ids in encoder.encode(prompts)]


def encode_summaries(pairs: list[dict[str, str]], tokenizer: Any, length: int) -> list[dict[str, Any]]:
    """Rows of an encoder-decoder: the prompt in `input_ids`, the completion and its end in `labels`."""
    prompts = tokenizer([pair["prompt"] for pair in pairs], truncation=True, max_length=length)["input_ids"]
    answers = tokenizer([pair["completion"] for pair in pairs], add_special_tokens=False)["input_ids"]
    return [
        {"input_ids": ids, "labels": [*answer[: length - 1], tokenizer.eos_token_id]}
        for ids, answer in zip(prompts, answers, strict=True)
    ]


def overlapping_rows(rows: Any, length: int, limit: int | None = None) -> TokenRows:
    """The tokens of packed rows in rows that begin with the last token of the row before, at most `limit` of them.

    So every token of a text but its first is predicted once, from up to `length - 1` tokens before it. The repeated
    token has the label -100, so that it is counted once, too.

    Args:
        rows: `input_ids` and `labels` [T] each, where padding has the label -100.
        length: tokens of a row.
        limit: rows at most.
    """
    ids = torch.cat([row["input_ids"][row["labels"] != IGNORED] for row in rows])
    starts = range(0, max(1, len(ids) - 1), length - 1)[:limit]
    parts = [ids[start : start + length] for start in starts]
    return TokenRows(
        [part.numpy() for part in parts], [_labels(part, start == 0) for part, start in zip(parts, starts, strict=True)]
    )


def _batches(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """Items in parts: what a tokenizer returns of a call is many times as large as its text."""
    for start in range(0, len(items), BATCH):
        yield items[start : start + BATCH]


def _labels(ids: Tensor, first: bool) -> np.ndarray:
    labels = ids.numpy().copy()
    labels[0] = labels[0] if first else IGNORED
    return labels
