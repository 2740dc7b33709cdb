"""Losses that make neighbouring tokens share experts, after BlockFFN (Song et al., arXiv 2507.08771).

What a chunk of tokens reads is the union of their experts: tokens that choose alike make batches of drafts and prompts
cheaper. Both losses stay within one document.

Shapes: L layers, B sequences, T tokens, E experts. Logits are [L, B, T, E] in fp32; B and T may be flattened to one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lte.nn.losses import masked_mean

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
    counted = follows[:, 1:]
    if token_mask is not None:
        counted = counted & token_mask[:, 1:] & token_mask[:, :-1]
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
    logits = logits.reshape(len(logits), *follows.shape, -1)
    whole = follows.shape[1] // chunk * chunk
    if not whole:
        # Rows that are shorter than a chunk have none.
        return 0.0 * logits.sum((1, 2, 3))
    counted = follows[:, :whole].unflatten(1, (-1, chunk))[..., 1:].all(-1)
    if token_mask is not None:
        counted = counted & token_mask[:, :whole].unflatten(1, (-1, chunk)).all(-1)
    sharp = UNION_SHARPNESS * (logits[:, :, :whole].unflatten(2, (-1, chunk)) - threshold_logit)
    log_off = -F.softplus(sharp).sum(3)
    return masked_mean(-torch.expm1(log_off), counted, layers=True)
