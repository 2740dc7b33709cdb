"""How far the output of a sparse FFN is from that of a dense one."""

from __future__ import annotations

from torch import Tensor

from lte.nn.losses import masked_mean

# Added to squared norms, which are those of whole hidden states: far below any that a model computes.
TINY = 1e-6


def relative_error(output: Tensor, target: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """Mean over tokens of ||output - target||^2 / ||target||^2, in fp32.

    Each token counts the same. Some, the first of a row above all, have outputs a hundred times as large as the others:
    in a quotient of sums they alone would count.

    Args:
        output: [..., D].
        target: as `output`; it gets no gradient.
        token_mask: which tokens count, [...]; `None` counts all.
    """
    wanted = target.detach().float()
    squared = (output.float() - wanted).square().sum(-1)
    return masked_mean((squared / (wanted.square().sum(-1) + TINY)).unsqueeze(-1), token_mask)
