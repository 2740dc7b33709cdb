"""The router losses of the paper (Eq. 4-6), over the tokens that count, in fp32.

Shapes: T tokens, E experts; scores G = sigmoid(logits) in (0, 1). All functions take one layer, [..., E], and with
`layers` several that share a token mask, [L, ..., E], of which they return one value each, [L].
"""

from __future__ import annotations

import torch
from torch import Tensor

from lte.config import POLE_GUARD


def masked_mean(values: Tensor, token_mask: Tensor | None, *, layers: bool = False) -> Tensor:
    """Mean of `values` [..., E] over experts and the tokens [...] where `token_mask` is true, in fp32.

    No token at all gives 0, not NaN, so that a batch of padding adds nothing to a loss.
    """
    # Some blocks flatten [B, T] before their FFN.
    by_token = _at_least_fp32(values).mean(-1).flatten(1 if layers else 0)
    if token_mask is None:
        return by_token.mean(-1)
    weights = token_mask.to(by_token.dtype).flatten()
    return (by_token * weights).sum(-1) / weights.sum().clamp_min(1)


def _at_least_fp32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def efficiency_loss(scores: Tensor, token_mask: Tensor | None = None, *, layers: bool = False) -> Tensor:
    """L_eff = mean of G^2 (Eq. 5), for the scores [..., E] of one layer."""
    return masked_mean(_at_least_fp32(scores).square(), token_mask, layers=layers)


def separability_loss(
    scores: Tensor,
    token_mask: Tensor | None = None,
    *,
    threshold: float = 0.5,
    guard: float = POLE_GUARD,
    layers: bool = False,
) -> Tensor:
    """L_sep = mean of 1 / ((G - tau)^2 + guard) (Eq. 6 with a guard at its pole), for one layer [..., E].

    Args:
        scores: router scores G, [..., E].
        token_mask: which tokens count, [...]; `None` counts all.
        threshold: tau.
        guard: added to the squared distance; 0 is Eq. 6 as printed, infinite at tau.
        layers: whether the first axis counts layers.
    """
    distance = _at_least_fp32(scores) - threshold
    return masked_mean(1 / (distance.square() + guard), token_mask, layers=layers)


def active_fraction(
    logits: Tensor, token_mask: Tensor | None = None, *, threshold_logit: float = 0.0, layers: bool = False
) -> Tensor:
    """Share of experts with G > tau, for router logits [..., E]; tau is given as logit(tau)."""
    return masked_mean((logits > threshold_logit).float(), token_mask, layers=layers)


def near_threshold_fraction(
    scores: Tensor,
    token_mask: Tensor | None = None,
    *,
    threshold: float = 0.5,
    width: float = 0.1,
    layers: bool = False,
) -> Tensor:
    """Share of scores within `width` of tau: how far soft and hard mode can disagree."""
    return masked_mean(((scores - threshold).abs() < width).float(), token_mask, layers=layers)


def margin_loss(
    logits: Tensor,
    token_mask: Tensor | None = None,
    *,
    threshold_logit: float = 0.0,
    margin: float = 1.0,
    layers: bool = False,
) -> Tensor:
    """Mean of max(0, 1 - |s - logit(tau)| / margin), for router logits s [..., E]: 1 at the threshold, 0 beyond.

    It pushes logits away from the threshold with a slope of at most 1 / margin, on both sides alike, so that any of
    them can still cross; the loss of Eq. 6 has a pole there, which none crosses.
    """
    distance = (_at_least_fp32(logits) - threshold_logit).abs()
    return masked_mean((1 - distance / margin).clamp_min(0), token_mask, layers=layers)


def mean_over_layers(by_layer: list[Tensor]) -> Tensor:
    """Mean of the values [L] of all layers, each layer counting the same (Eq. 5-6)."""
    return torch.cat(by_layer).mean()
