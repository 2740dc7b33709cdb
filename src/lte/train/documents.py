"""Which tokens of a batch go on with the document of the token before them.

Shapes: B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor


def separators_of(model: Any, *others: Any) -> tuple[int, ...]:
    """The tokens that end a document: the end-of-text tokens that a model's configs and others name.

    Args:
        model: whose `config` and `generation_config` are asked.
        others: a tokenizer, or a collator of ours; those without an `eos_token_id` say nothing.
    """
    found: set[int] = set()
    for source in (getattr(model, "config", None), getattr(model, "generation_config", None), *others):
        ids = getattr(source, "eos_token_id", None)
        found.update([ids] if isinstance(ids, int) else ids or ())
    return tuple(sorted(found))


def follows_document(inputs: Mapping[str, Any], separators: Collection[int]) -> Tensor:
    """Which tokens go on with the document of the token before them, bool [B, T]; the first of a row does not.

    A document ends with one of the `separators`, and where `position_ids` do not go on counting, as in packed rows. It
    may be cut once too often, after a turn of a chat say, but no document goes on in the next one.

    Args:
        inputs: `input_ids`, and optionally `position_ids`.
        separators: from `separators_of`.
    """
    ids, positions = inputs["input_ids"], inputs.get("position_ids")
    follows = torch.ones_like(ids, dtype=torch.bool)
    follows[:, 0] = False
    for separator in separators:
        follows[:, 1:] &= ids[:, :-1] != separator
    if positions is not None and positions.shape == ids.shape:
        follows[:, 1:] &= positions[:, 1:] == positions[:, :-1] + 1
    return follows
