"""The terms of the training loss: language model, distillation, and routing.

Shapes: B sequences, T tokens, V vocabulary, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lte.config import IGNORED
from lte.nn.losses import (
    active_fraction,
    efficiency_loss,
    mean_over_layers,
    near_threshold_fraction,
    separability_loss,
)


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite; the batch was saved and no checkpoint was overwritten."""


def language_terms(
    logits: Tensor, labels: Tensor, teacher_logits: Tensor | None = None, num_items: Tensor | int | None = None
) -> tuple[Tensor, Tensor]:
    """Cross entropy with the next token and KL(teacher || student), means over the labelled positions, in nats.

    Args:
        logits: [B, T, V], position t predicts label t + 1.
        labels: [B, T], -100 where no label is.
        teacher_logits: [B, T, V] or `None`, which gives a KL of 0.
        num_items: what the sums are divided by, all labelled positions of several batches say; `None` takes those of
            this one.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    counted = (targets != IGNORED).float()
    count = counted.sum().clamp_min(1) if num_items is None else num_items
    log_probs = F.log_softmax(logits.float(), dim=-1)
    picked = log_probs.gather(-1, targets.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    cross_entropy = -(picked * counted).sum() / count
    if teacher_logits is None:
        return cross_entropy, cross_entropy.new_zeros(())
    teacher = F.log_softmax(teacher_logits.float(), dim=-1)
    divergence = (teacher.exp() * (teacher - log_probs)).sum(-1)
    return cross_entropy, (divergence * counted).sum() / count


def head_divergence(logits: Tensor, labels: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(teacher || student) of a head that predicts no next token, mean over what is labelled, in nats.

    A head with one output is a regression's, whose softmax is always 1: there it is the mean squared difference.

    Args:
        logits: [B, C] of a head over whole sequences, or [B, T, C].
        labels: [B] or [B, T], -100 where no label is; those of another shape leave nothing out.
        teacher_logits: as `logits`.
    """
    if logits.shape[-1] == 1:
        return F.mse_loss(logits.float(), teacher_logits.float())
    teacher, student = (F.log_softmax(each.float(), dim=-1) for each in (teacher_logits, logits))
    divergence = (teacher.exp() * (teacher - student)).sum(-1)
    counted = labels != IGNORED if labels.shape == divergence.shape else torch.ones_like(divergence)
    return (divergence * counted).sum() / counted.sum().clamp_min(1)


def stack_layers(
    logits: Sequence[Tensor], token_masks: Sequence[Tensor | None]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Stacks neighbouring layers whose logits have one shape and whose tokens have one mask, most often all of them: a
    term then takes a few kernels, not a few per layer.

    Args:
        logits: router logits [B, T, E] of each layer.
        token_masks: [B, T] of each layer; `None` counts all tokens.

    Returns:
        Logits [L, B, T, E] and the mask of each stack.
    """
    stacks: list[list[Tensor]] = []
    masks: list[Tensor | None] = []
    last: Tensor | None = None
    for layer, mask in zip(logits, token_masks, strict=True):
        if stacks and mask is last and layer.shape == stacks[-1][0].shape and layer.device == stacks[-1][0].device:
            stacks[-1].append(layer)
        else:
            stacks.append([layer])
            # Masks lie with the batch, and layers may lie elsewhere.
            masks.append(None if mask is None else mask.to(layer.device))
        last = mask
    return [torch.stack(stack) for stack in stacks], masks


def routing_terms(
    logits: Sequence[Tensor], token_masks: Sequence[Tensor | None], threshold_logit: float, guard: float
) -> dict[str, Tensor]:
    """Router losses and statistics over all layers, from the fp32 router logits and masks of `stack_layers`.

    Returns:
        `efficiency` and `separability` (Eq. 5-6), `active_fraction` of experts with G > tau, `active_by_layer` and
        `efficiency_by_layer`, the same of each layer, [L], and `near_threshold`, the share of scores within 0.1 of tau.
    """
    threshold = 1 / (1 + math.exp(-threshold_logit))
    masked_logits = list(zip(logits, token_masks, strict=True))
    masked = [(torch.sigmoid(stack), mask) for stack, mask in masked_logits]
    with torch.no_grad():
        active = [active_fraction(*stack, threshold_logit=threshold_logit, layers=True) for stack in masked_logits]
        near = [near_threshold_fraction(*stack, threshold=threshold, layers=True) for stack in masked]
    separability = [separability_loss(*stack, threshold=threshold, guard=guard, layers=True) for stack in masked]
    # Stacks are on several devices if the model is.
    device = logits[0].device
    terms = {
        "efficiency": [efficiency_loss(*stack, layers=True) for stack in masked],
        "separability": separability,
        "active_fraction": active,
        "near_threshold": near,
    }
    on_one_device = {name: [value.to(device) for value in values] for name, values in terms.items()}
    means = {name: mean_over_layers(values) for name, values in on_one_device.items()}
    by_layer = {"active_by_layer": "active_fraction", "efficiency_by_layer": "efficiency"}
    return {**means, **{name: torch.cat(on_one_device[term]) for name, term in by_layer.items()}}
