"""Batches of rows of different lengths.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lte.config import IGNORED
from lte.data.rows import MULTIPLE


class PaddingCollator:
    """Batches of padded rows, with an `attention_mask`.

    On the right whatever the tokenizer's own side is: encoders number their positions from the left, and heads on
    decoders find the last token that is no padding. Prompts to continue are padded on the left.

    Args:
        tokenizer: knows the padding of what the model reads.
        side: right or left.
        multiple: of which rows are padded to one.
    """

    def __init__(self, tokenizer: Any, side: str = "right", multiple: int = MULTIPLE):
        self.tokenizer, self.side, self.multiple = tokenizer, side, multiple

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        features = [{name: value for name, value in row.items() if name != "labels"} for row in rows]
        batch = dict(
            self.tokenizer.pad(features, pad_to_multiple_of=self.multiple, padding_side=self.side, return_tensors="pt")
        )
        if "labels" in rows[0]:
            batch["labels"] = _stack([row["labels"] for row in rows], self.multiple)
        return batch


def _stack(labels: Sequence[Any], multiple: int) -> Tensor:
    """Labels [B] of whole rows, or those of an encoder-decoder's answers [B, T], -100 on the padding."""
    if not isinstance(labels[0], Sequence):
        return torch.tensor(labels)
    width = -(-max(map(len, labels)) // multiple) * multiple
    return torch.tensor([[*row, *[IGNORED] * (width - len(row))] for row in labels])
