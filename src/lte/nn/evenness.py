"""A loss that gives every row of a batch the same share of active neurons, so that one threshold fits all texts.

Shapes: L layers, B rows (sequences), T tokens, E experts. Logits are [L, B, T, E] in fp32; B and T may be flattened to
one where there is a token mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

EVEN_SHARPNESS = 4.0
"""Of the sigmoid whose slope stands for that of the count of active experts.

Its slope, a bump of area 1 around the threshold, estimates which share of the experts a shift of all logits would
switch. That of the scores themselves (1) is so wide that it moves mostly experts that stay as they are; a much narrower
one meets few experts, and pushes these hard. Two thirds of this bump lie within 0.4 of the threshold, where a quarter
to a third of all logits are.
"""


def row_active_shares(
    logits: Tensor, token_mask: Tensor | None = None, *, threshold_logit: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The share of active experts in each row, counted as in hard mode, with the gradient of a sigmoid.

    Args:
        logits: [L, B, T, E].
        token_mask: bool [B, T], which tokens count; `None` counts all.
        threshold_logit: logit(tau).

    Returns:
        The share of each row in each layer, [L, B], and whether the row has a token that counts, bool [L, B].

    Raises:
        ValueError: if rows are flattened and no mask says where they end.
    """
    if token_mask is not None:
        logits = logits.reshape(len(logits), *token_mask.shape, -1)
    elif logits.ndim != 4:
        raise ValueError(
            f"token_mask must be given for logits without an axis of rows, got logits of shape {tuple(logits.shape)}"
        )
    distance = logits - threshold_logit
    soft = torch.sigmoid(EVEN_SHARPNESS * distance)
    # The difference of equal numbers is 0: the value is that of the count, to the last bit.
    active = (distance > 0).to(soft.dtype) + (soft - soft.detach())
    by_token = active.mean(-1)
    if token_mask is None:
        return by_token.mean(-1), torch.ones_like(by_token[..., 0], dtype=torch.bool)
    weights = token_mask.to(by_token.dtype)
    shares = (by_token * weights).sum(-1) / weights.sum(-1).clamp_min(1)
    return shares, token_mask.any(-1).expand_as(shares)


def even_loss(shares: Tensor, counted: Tensor, target_active: Tensor | float) -> Tensor:
    """Mean over rows of ((f - a) / a)^2, with f the row's share of active experts over all layers, and a the target.

    Its root is how far rows are from the target, as a share of it. Rows without a token that counts are left out, and
    all others count alike; without any the loss is 0. The target, not the mean of the rows, is what they are held to:
    that asks for no state, and one row alone has a loss, too.

    Args:
        shares: [L, B] of all layers, from `row_active_shares`.
        counted: bool [L, B], from there.
        target_active: a, the share of experts that shall be active, above 0.
    """
    weights = counted.to(shares.dtype)
    by_row = (shares * weights).sum(0) / weights.sum(0).clamp_min(1)
    distance = (by_row - target_active) / target_active
    rows = counted.any(0).to(shares.dtype)
    return (distance.square() * rows).sum() / rows.sum().clamp_min(1)
