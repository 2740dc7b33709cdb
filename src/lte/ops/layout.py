"""How the weights of an accelerated FFN lie in memory; every tensor keeps its shape and meaning.

Shapes: D hidden size, F neurons, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Rows of a stacked tensor are filled up to a multiple of this: tiles of matrix products then have no remainder.
ROW_MULTIPLE = 128


@dataclass(frozen=True, kw_only=True)
class StackedInputs:
    """Views of one tensor, see `stack_inputs`."""

    stacked: Tensor
    up: Tensor
    gate: Tensor | None
    router: Tensor | None


def stack_inputs(up: Tensor, gate: Tensor | None = None, router: Tensor | None = None) -> StackedInputs:
    """Copies what is multiplied by the hidden states into one tensor: the rows of gate, up, router, then zeros.

    Args:
        up: [F, D].
        gate: [F, D], `None` for a plain FFN.
        router: [E, D]; rounded to the dtype of `up`. `None` if the logits come from elsewhere.

    Returns:
        The stacked tensor [2 F + E, D] ([F + E, D] for a plain FFN), rows rounded up to `ROW_MULTIPLE`, and its parts.
    """
    parts = [part for part in (gate, up, router) if part is not None]
    rows = sum(len(part) for part in parts)
    stacked = up.new_zeros(-(-rows // ROW_MULTIPLE) * ROW_MULTIPLE, up.shape[1])
    views: list[Tensor] = []
    start = 0
    for part in parts:
        views.append(stacked[start : start + len(part)])
        with torch.no_grad():
            views[-1].copy_(part)
        start += len(part)
    return StackedInputs(
        stacked=stacked,
        up=views[0 if gate is None else 1],
        gate=None if gate is None else views[0],
        router=None if router is None else views[-1],
    )


def by_neuron(down: Tensor) -> Tensor:
    """A down projection [D, F] with strides (1, D): the same values, an expert's columns one after the other."""
    return down.T.contiguous().T
