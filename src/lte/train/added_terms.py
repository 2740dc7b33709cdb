"""The terms of the loss that settings add to a recipe's own: steadier scores, shared experts, and even sparsity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lte.nn.evenness import even_loss, row_active_shares
from lte.nn.locality import (
    chunk_efficiency_loss,
    counted_chunks,
    counted_pairs,
    predecessor_loss,
    union_loss,
)
from lte.nn.losses import margin_loss, mean_over_layers
from lte.train.config import RecipeSettings


@dataclass(frozen=True)
class AddedTerms:
    """Weights of the terms on router logits that are on; 0 switches one off.

    Attributes:
        margin: of `lte.nn.losses.margin_loss`.
        predecessor: of `lte.nn.locality.predecessor_loss`.
        union: of `lte.nn.locality.union_loss`.
        even: of `lte.nn.evenness.even_loss`.
        width: the margin, in logits.
        chunk: tokens of which a union is taken.
        priced_chunks: whether chunks of so many tokens have the price that a recipe puts on tokens:
            `lte.nn.locality.chunk_efficiency_loss`.
    """

    margin: float = 0.0
    predecessor: float = 0.0
    union: float = 0.0
    even: float = 0.0
    width: float = 1.0
    chunk: int = 8
    priced_chunks: bool = False

    @classmethod
    def at(cls, settings: RecipeSettings, share_of_stage2: float) -> AddedTerms:
        """Those that are on after such a share of stage 2, which is below 0 in stage 1."""
        late = share_of_stage2 >= settings.margin_start
        return cls(
            margin=settings.margin_weight if late else 0.0,
            predecessor=settings.predecessor_weight,
            union=settings.union_weight,
            even=settings.even_weight,
            width=settings.margin_width,
            chunk=settings.union_tokens,
            priced_chunks=settings.price_on == "union",
        )

    @property
    def names(self) -> list[str]:
        """Of those that are on."""
        return [name for name in ("margin", "predecessor", "union", "even") if getattr(self, name)]

    @property
    def neighbours(self) -> bool:
        """Whether a term is on that is about neighbouring tokens."""
        return bool(self.predecessor or self.union or self.priced_chunks)

    def __bool__(self) -> bool:
        return bool(self.names or self.priced_chunks)


def added_terms(
    logits: Sequence[Tensor],
    token_masks: Sequence[Tensor | None],
    follows: Tensor | None,
    threshold_logit: float,
    terms: AddedTerms,
    target_active: Tensor | None = None,
) -> dict[str, Tensor]:
    """The terms that are on, without their weights, from what `stack_layers` gives.

    Args:
        logits: router logits [L, B, T, E] of each stack.
        token_masks: [B, T] of each stack.
        follows: [B, T] from `lte.train.documents.follows_document`; `None` without terms on neighbours.
        threshold_logit: logit(tau).
        terms: which are on.
        target_active: the share of experts that shall be active after this step, a scalar on the device of the first
            stack; `None` without the term on even rows. A tensor, as compiled code would be made anew for each number.

    Returns:
        Scalars; where chunks have the price also `chunk_efficiency` and `chunk_efficiency_by_layer`, [L].
    """
    stacks = list(zip(logits, token_masks, strict=True))
    device = logits[0].device
    found: dict[str, list[Tensor]] = {}
    if terms.margin:
        found["margin"] = [
            margin_loss(*stack, threshold_logit=threshold_logit, margin=terms.width, layers=True) for stack in stacks
        ]
    if follows is not None and terms.predecessor:
        found["predecessor"] = [predecessor_loss(stack, follows.to(stack.device), mask) for stack, mask in stacks]
    if follows is not None and terms.union:
        found["union"] = [
            union_loss(stack, follows.to(stack.device), mask, chunk=terms.chunk, threshold_logit=threshold_logit)
            for stack, mask in stacks
        ]
    # Stacks are on several devices if the model is.
    terms_found = {name: mean_over_layers([value.to(device) for value in values]) for name, values in found.items()}
    if follows is not None and terms.priced_chunks:
        priced = [
            chunk_efficiency_loss(each, follows.to(each.device), mask, chunk=terms.chunk) for each, mask in stacks
        ]
        by_layer = torch.cat([value.to(device) for value in priced])
        terms_found |= {"chunk_efficiency": by_layer.mean(), "chunk_efficiency_by_layer": by_layer}
    if target_active is not None and terms.even:
        rows = [row_active_shares(*stack, threshold_logit=threshold_logit) for stack in stacks]
        shares, counted = (torch.cat([each.to(device) for each in values]) for values in zip(*rows, strict=True))
        terms_found["even"] = even_loss(shares, counted, target_active)
    return terms_found


def term_counts(token_masks: Sequence[Tensor | None], follows: Tensor | None, terms: AddedTerms) -> dict[str, Tensor]:
    """Of how many pairs, chunks or rows this process's terms are means, by the name of the term.

    The others are means over tokens. Rows of which all tokens count are as many in each process.

    Args:
        token_masks: as for `added_terms`.
        follows: as for `added_terms`.
        terms: which are on.
    """
    found: dict[str, Tensor] = {}
    if follows is not None:
        pairs = [(follows if mask is None else follows.to(mask.device), mask) for mask in token_masks]
        if terms.predecessor:
            found["predecessor"] = _total([counted_pairs(*pair) for pair in pairs])
        if terms.union or terms.priced_chunks:
            chunks = _total([counted_chunks(*pair, chunk=terms.chunk) for pair in pairs])
            found |= dict.fromkeys(("union", "chunk_efficiency", "chunk_efficiency_by_layer"), chunks)
    masks = [mask for mask in token_masks if mask is not None]
    if terms.even and masks:
        found["even"] = _total([mask.any(-1) for mask in masks])
    return found


def _total(counted: Sequence[Tensor]) -> Tensor:
    return torch.stack([each.sum().to(counted[0].device) for each in counted]).sum()


def weighted_sum(found: dict[str, Tensor], terms: AddedTerms) -> Tensor:
    """The terms of `added_terms` with their weights."""
    return torch.stack([getattr(terms, name) * value for name, value in found.items()]).sum()
