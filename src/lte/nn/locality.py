"""Losses that make neighbouring tokens share experts, after BlockFFN (Song et al., arXiv 2507.08771).

What a chunk of tokens reads is the union of their experts: tokens that choose alike make batches of drafts and prompts
cheaper. All losses stay within one document.

Shapes: L layers, B sequences, T tokens, E experts. Logits are [L, B, T, E] in fp32; B and T may be flattened to one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from lte.nn.losses import efficiency_loss, masked_mean

UNION_SHARPNESS = 4.0
"""Of the sigmoid that says how likely an expert is on, where a union is taken.

A quarter to a third of all scores lie within 0.1 of tau: with the scores themselves an expert that no token of eight
switches on would have a union of nearly 1.
"""


def predecessor_loss(logits: Tensor, follows: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """Mean of KL(Bernoulli(G of the token before) || Bernoulli(G)) over experts and pairs of neighbours.

    The token before is the fixed goal. BlockFFN's activation locality loss takes the cross entropy of both, which also
    wants each of them to be certain.

    Args:
        logits: [L, B, T, E].
        follows: bool [B, T], which tokens go on with the document of the token before them.
        token_mask: bool [B, T], which tokens count; a pair counts if both do. `None` counts all.

    Returns:
        A value per layer, [L].
    """
    logits = logits.reshape(len(logits), *follows.shape, -1)
    now, before = logits[:, :, 1:], logits[:, :, :-1].detach()
    counted = counted_pairs(follows, token_mask)
    # The divergence of two logits is the Bregman distance of softplus, whose slope is the sigmoid.
    divergence = F.softplus(now) - F.softplus(before) - torch.sigmoid(before) * (now - before)
    return masked_mean(divergence, counted, layers=True)


def union_loss(
    logits: Tensor,
    follows: Tensor,
    token_mask: Tensor | None = None,
    *,
    chunk: int = 8,
    threshold_logit: float = 0.0,
) -> Tensor:
    """Mean over experts and chunks of 1 - prod(1 - p), the chance that a token of the chunk switches the expert on.

    BlockFFN's chunk sparsification loss, with p = sigmoid(4 (s - logit(tau))) for logits s. Rows are cut into chunks
    from their start; those that hold the start of another document, or a token that does not count, are left out, and
    so is the rest of a row.

    Args:
        logits: [L, B, T, E].
        follows: as for `predecessor_loss`.
        token_mask: as for `predecessor_loss`.
        chunk: consecutive tokens in a chunk.
        threshold_logit: logit(tau).

    Returns:
        A value per layer, [L].
    """
    chunks, counted = _chunks(logits, follows, token_mask, chunk)
    if not chunks.numel():
        return 0.0 * logits.flatten(1).sum(1)
    log_off = -F.softplus(UNION_SHARPNESS * (chunks - threshold_logit)).sum(3)
    return masked_mean(-torch.expm1(log_off), counted, layers=True)


def chunk_efficiency_loss(
    logits: Tensor, follows: Tensor, token_mask: Tensor | None = None, *, chunk: int = 8
) -> Tensor:
    """The efficiency loss of chunks in place of tokens: mean of sigmoid(s)^2 over experts and chunks.

    s = log(mean(exp(4 s_t))) / 4 is close to the largest logit of the chunk's tokens, which says whether any of them
    switches the expert on, and it is their common logit where they choose alike: then this is the loss of Eq. 5. The
    union itself has next to no gradient as long as most tokens switch an expert on, and so cannot be the price.

    Args:
        logits: [L, B, T, E].
        follows: as for `predecessor_loss`.
        token_mask: as for `predecessor_loss`.
        chunk: as for `union_loss`.

    Returns:
        A value per layer, [L].
    """
    chunks, counted = _chunks(logits, follows, token_mask, chunk)
    if not chunks.numel():
        return 0.0 * logits.flatten(1).sum(1)
    pooled = (torch.logsumexp(UNION_SHARPNESS * chunks, dim=3) - math.log(chunk)) / UNION_SHARPNESS
    return efficiency_loss(torch.sigmoid(pooled), counted, layers=True)


def counted_pairs(follows: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """Which tokens but the first of each row make a pair with the one before that counts, bool [B, T - 1]."""
    counted = follows[:, 1:]
    return counted if token_mask is None else counted & token_mask[:, 1:] & token_mask[:, :-1]


def counted_chunks(follows: Tensor, token_mask: Tensor | None = None, *, chunk: int = 8) -> Tensor:
    """Which chunks count, bool [B, C]; there are none in rows shorter than a chunk."""
    whole = follows.shape[1] // chunk * chunk
    counted = follows[:, :whole].unflatten(1, (whole // chunk, chunk))[..., 1:].all(-1)
    if token_mask is None:
        return counted
    return counted & token_mask[:, :whole].unflatten(1, (whole // chunk, chunk)).all(-1)


def _chunks(logits: Tensor, follows: Tensor, token_mask: Tensor | None, chunk: int) -> tuple[Tensor, Tensor]:
    """Logits cut into chunks [L, B, C, chunk, E], and which chunks count [B, C]."""
    logits = logits.reshape(len(logits), *follows.shape, -1)
    whole = follows.shape[1] // chunk * chunk
    chunks = logits[:, :, :whole].unflatten(2, (whole // chunk, chunk))
    return chunks, counted_chunks(follows, token_mask, chunk=chunk)
