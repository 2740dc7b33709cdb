"""What a router sees of the tokens before its own: the mean of their summaries, of the same document alone.

A summary is a few numbers that a router makes of a token's hidden state. No later token, no other sequence of a batch
and no decision of a router enters the mean. Summaries are kept in the cache beside keys and values, in layers of their
own behind those of attention: what crops, copies, repeats and reorders a cache does the same to them.

Shapes: B sequences, T tokens of a call, S tokens that a cache holds after it, R numbers of a summary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache, DynamicLayer

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
    """Hands a sparse FFN the summaries of the tokens before, as a hook of its block that sees cache and positions.

    Args:
        name: of the FFN in its block.
        place: which of the model's FFNs it is, from 0.
        layers: how many blocks the model has.
    """

    def __init__(self, name: str, place: int, layers: int):
        self.name, self.place, self.layers = name, place, layers

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before each call of the block."""
        ffn = block._modules[self.name]
        # Not of a stock FFN that has taken the place of the sparse one, and not where no router runs.
        state: Any = getattr(ffn, "_of_thread", None)
        if state is not None and getattr(ffn, "mode", "dense") != "dense":
            # Blocks that checkpoint their activations leave a cache alone.
            checkpoints = block.training and getattr(block, "gradient_checkpointing", False)
            cache = None if checkpoints else kwargs.get("past_key_values")
            state.left["context"] = (self, cache, kwargs.get("position_ids"))

    def summaries(self, cache: Any, new: Tensor) -> Tensor:
        """Those of all tokens up to the last one, [B, S, R], for new ones [B, T, R], which the cache keeps."""
        if cache is None:
            return new
        if type(cache) is not DynamicCache or cache.offloading:
            raise ValueError(
                "past_key_values must be a DynamicCache on the device of a model with router_context, got "
                f"{type(cache).__name__}; leave cache_implementation out"
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


def context_of(left: dict[str, Any], new: Tensor, window: int) -> Tensor:
    """The means before new summaries [..., R] of the call that a `ContextReader` has seen, in their shape.

    Args:
        left: what the reader has left, see `lte.nn.metering.OfThread`.
        new: of the tokens of the call.
        window: tokens at most.

    Raises:
        ValueError: for an FFN that is called without its block, and for caches that cannot keep summaries.
    """
    reader, cache, positions = left["context"] or (None, None, None)
    if cache is not None:
        # It would live beyond the call. Positions stay for blocks that compute anew in the backward pass.
        left["context"] = None
    if reader is None or positions is None:
        raise ValueError(
            "a model with router_context must be called as a whole, as its routers read the tokens before, got a call "
            "of an FFN alone"
        )
    rows = new.reshape(-1, positions.shape[1], new.shape[-1])
    return mean_before(reader.summaries(cache, rows), positions, window).reshape(new.shape)


def fill_positions(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Before each call of a decoder: positions that count from the first token of text, where none are given.

    A decoder would count padding on the left, which the routers would then take for tokens.
    """
    mask = kwargs.get("attention_mask")
    if kwargs.get("position_ids") is not None or not isinstance(mask, Tensor) or mask.ndim != 2:
        return args, kwargs
    given = args[0] if args else kwargs.get("input_ids")
    given = kwargs.get("inputs_embeds") if given is None else given
    positions = (mask.long().cumsum(1) - 1).clamp_min(0)[:, -given.shape[1] :]  # type: ignore[union-attr]
    return args, {**kwargs, "position_ids": positions}
