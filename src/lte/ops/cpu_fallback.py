"""The sparse FFN on a CPU without numba, in plain PyTorch; see `lte.ops.cpu`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from lte.ops.activations import ACTIVATIONS
from lte.ops.arguments import FfnWeights, Routing
from lte.ops.reference import active_experts


def gather_ffn(x: Tensor, weights: FfnWeights, routing: Routing, activation: str) -> Tensor:
    """Copies the rows of the experts that any token needs, then computes with those alone."""
    mask = active_experts(x, routing)
    needed, inputs = mask.any(0), x.float()
    size = len(weights.up) // mask.shape[1]

    def rows(tensor: Tensor, scale: Tensor | None = None) -> Tensor:
        found = tensor.unflatten(0, (-1, size))[needed].flatten(0, 1).float()
        return found if scale is None else found * rows(scale).unsqueeze(1)

    def project(weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
        return functional.linear(inputs, rows(weight, scale), None if bias is None else rows(bias))

    hidden = project(weights.up, weights.up_scale, weights.up_bias)
    if weights.gate is None:
        hidden = ACTIVATIONS[activation](hidden)
    else:
        hidden = ACTIVATIONS[activation](project(weights.gate, weights.gate_scale, weights.gate_bias)) * hidden
    # Not a product: what an inactive expert would compute must not matter, even if it is not finite.
    hidden = torch.where(mask[:, needed].repeat_interleave(size, 1), hidden, 0)
    out = hidden @ rows(weights.down)
    if weights.down_scale is not None:
        out = out * weights.down_scale
    return (out if weights.down_bias is None else out + weights.down_bias.float()).to(x.dtype)
