"""The terms of the training loss: language model, distillation, and routing.

Shapes: B sequences, T tokens, V vocabulary, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lte.nn.losses import (
    active_fraction,
    efficiency_loss,
    mean_over_layers,
    near_threshold_fraction,
    separability_loss,
)

IGNORED = -100


def language_terms(logits: Tensor, labels: Tensor, teacher_logits: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cross entropy with the next token and KL(teacher || student), means over the labelled positions, in nats.

    Args:
        logits: [B, T, V], position t predicts label t + 1.
        labels: [B, T], -100 where no label is.
        teacher_logits: [B, T, V] or `None`, which gives a KL of 0.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    counted = (targets != IGNORED).float()
    count = counted.sum().clamp_min(1)
    log_probs = F.log_softmax(logits.float(), dim=-1)
    picked = log_probs.gather(-1, targets.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    cross_entropy = -(picked * counted).sum() / count
    if teacher_logits is None:
        return cross_entropy, cross_entropy.new_zeros(())
    teacher = F.log_softmax(teacher_logits.float(), dim=-1)
    divergence = (teacher.exp() * (teacher - log_probs)).sum(-1)
    return cross_entropy, (divergence * counted).sum() / count


def routing_terms(
    logits: Sequence[Tensor], token_mask: Tensor | None, threshold_logit: float, guard: float
) -> dict[str, Tensor]:
    """Router losses and statistics over all layers, from the fp32 router logits [B, T, E] of each.

    Returns:
        `efficiency` and `separability` (Eq. 5-6), `active_fraction` of experts with G > tau, and `near_threshold`,
        the share of scores within 0.1 of tau.
    """
    threshold = 1 / (1 + math.exp(-threshold_logit))
    scores = [torch.sigmoid(layer) for layer in logits]
    with torch.no_grad():
        active = [active_fraction(layer, token_mask, threshold_logit=threshold_logit) for layer in logits]
        near = [near_threshold_fraction(layer, token_mask, threshold=threshold) for layer in scores]
    separability = [separability_loss(layer, token_mask, threshold=threshold, guard=guard) for layer in scores]
    return {
        "efficiency": mean_over_layers([efficiency_loss(layer, token_mask) for layer in scores]),
        "separability": mean_over_layers(separability),
        "active_fraction": mean_over_layers(active),
        "near_threshold": mean_over_layers(near),
    }
