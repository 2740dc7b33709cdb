"""What a router sees of the tokens before its own: the mean of their summaries, of the same document alone.

A summary is a few numbers that a router makes of a token's hidden state. No later token, no other sequence of a batch
and no decision of a router enters the mean. Summaries are kept in the cache beside keys and values, in layers of their
own behind those of attention: what crops, copies, repeats and reorders a cache does the same to them.

Shapes: B sequences, T tokens of a call, S tokens that a cache holds after it, R numbers of a summary.
"""

from __future__ import annotations

import inspect
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache, DynamicLayer

from lte.nn.metering import OfThread

RANK = 64
"""R, unless hidden states are narrower."""


def mean_before(summaries: Tensor, positions: Tensor, window: int) -> Tensor:
    """The mean of up to `window` summaries before each of the last tokens; 0 where there are none.

    Args:
        summaries: of all tokens up to the last one, [B, S, R].
        positions: of the last T tokens in their documents, from 0 at their start, [B, T] or [1, T]: so many tokens
            before them belong to the document. Padding on the left counts as before it.
        window: tokens at most.

    Returns:
        [B, T, R].
    """
    tokens = positions.shape[1]
    past = summaries.shape[1] - tokens
    first = max(0, past - window)
    before = F.pad(summaries[:, first:-1], (0, 0, window - past + first, 0))
    # [B, T, R, window]: for every call the same number of terms in the same order.
    windows = before.unfold(1, window, 1)
    available = past + torch.arange(tokens, device=positions.device)
    count = torch.minimum(positions, available).clamp(0, window)
    kept = torch.arange(window, device=positions.device) >= window - count.unsqueeze(-1)
    total = windows.masked_fill(~kept.unsqueeze(2), 0.0).sum(-1)
    return total / count.clamp_min(1).unsqueeze(-1)


class ContextReader:
    """Hands a sparse FFN the summaries of the tokens before, as a hook of its block's attention.

    Attention is told of cache and positions, and is called anew where a block computes its activations anew in the
    backward pass, in the thread that does, as the FFN is; hooks of the block itself are not.

    Args:
        place: which of the model's FFNs it is, from 0.
        layers: how many blocks the model has.
    """

    def __init__(self, place: int, layers: int):
        self.place, self.layers = place, layers
        self._of_thread = OfThread()

    def __call__(self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before each call of the attention."""
        cache = kwargs.get("past_key_values")
        # That of continuous batching has another name.
        cache = kwargs.get("cache") if cache is None else cache
        # Not the cache itself: an FFN in dense mode never asks, and it would live beyond the call.
        kept = None if cache is None else weakref.ref(cache)
        self._of_thread.left["context"] = (kept, kwargs.get("position_ids"))

    def means(self, new: Tensor, window: int) -> Tensor:
        """The means before new summaries [..., R] of the call at work, in their shape.

        Args:
            new: of the tokens of the call.
            window: tokens at most.

        Raises:
            ValueError: for an FFN that is called without its block, and for caches that cannot keep summaries.
        """
        kept, positions = self._of_thread.left["context"] or (None, None)
        self._of_thread.left["context"] = None
        if positions is None:
            raise ValueError(
                "a model with router_context must be called as a whole, as its routers read the tokens before, got a "
                "call of an FFN alone"
            )
        rows = new.reshape(-1, positions.shape[1], new.shape[-1])
        before = self.summaries(None if kept is None else kept(), rows)
        return mean_before(before, positions, window).reshape(new.shape)

    def summaries(self, cache: Any, new: Tensor) -> Tensor:
        """Those of all tokens up to the last one, [B, S, R], for new ones [B, T, R], which the cache keeps."""
        if cache is None:
            return new
        if type(cache) is not DynamicCache or cache.offloading:
            raise ValueError(
                "past_key_values must be a DynamicCache on the device of a model with router_context, got "
                f"{type(cache).__name__}; call generate without cache_implementation, and not in "
                "continuous batches"
            )
        index = self.layers + self.place
        while len(cache.layers) <= index:
            cache.layers.append(DynamicLayer())
        layer: Any = cache.layers[index]
        held = cache.get_seq_length() - new.shape[1]
        if layer.get_seq_length() != held:
            raise ValueError(
                f"past_key_values must hold what the routers have seen of all {held} tokens, got "
                f"{layer.get_seq_length()}; let this model itself read them"
            )
        keys, _ = layer.update(new.unsqueeze(1), new.new_zeros(*new.shape[:2], 0).unsqueeze(1))
        return keys.squeeze(1)


def fill_positions(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Before each call of a decoder: positions that count from the first token of text, where none are given.

    A decoder would count padding on the left, which the routers would then take for tokens.
    """
    if kwargs.get("position_ids") is not None:
        return args, kwargs
    given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    mask, read = given.get("attention_mask"), given.get("input_ids")
    read = given.get("inputs_embeds") if read is None else read
    if given.get("position_ids") is not None or not isinstance(mask, Tensor) or mask.ndim != 2 or read is None:
        return args, kwargs
    positions = (mask.long().cumsum(1) - 1).clamp_min(0)[:, -read.shape[1] :]
    return args, {**kwargs, "position_ids": positions}
