"""The sparse FFN in hard mode in plain PyTorch: the ground truth of the kernels, in fp32 or fp64.

Shapes: T tokens, D hidden size, F neurons, E experts of S = F / E neurons each.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from lte.ops.activations import ACTIVATIONS
from lte.ops.arguments import FfnWeights, Routing


def router_logits(x: Tensor, routing: Routing) -> Tensor:
    """The logits [T, E] that decide which experts are active for x [T, D], in fp32, in fp64 for x in fp64."""
    if routing.logits is not None:
        return routing.logits
    assert routing.weight is not None
    dtype = torch.promote_types(torch.float32, x.dtype)
    products = functional.linear(x.to(dtype), routing.weight.to(routing.dtype).to(dtype)).to(routing.dtype)
    return products.to(dtype) if routing.bias is None else products.to(dtype) + routing.bias.to(dtype)


def active_experts(x: Tensor, routing: Routing) -> Tensor:
    """Boolean [T, E]: which experts are active for each token of x [T, D]."""
    return router_logits(x, routing) > routing.threshold


def _dequantize(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype) if scale is None else weight.to(dtype) * scale.to(dtype).unsqueeze(1)


def sparse_ffn_reference(x: Tensor, weights: FfnWeights, routing: Routing, activation: str) -> Tensor:
    """Computes (m * act(x W_gate) * (x W_up)) W_down with m = 1[logit > threshold] (paper, Eq. 7).

    Args:
        x: hidden states [T, D].
        weights: the projections.
        routing: what decides on m.
        activation: a key of `ACTIVATIONS`.

    Returns:
        [T, D] in fp32, in fp64 for x in fp64.
    """
    mask = active_experts(x, routing)
    dtype = torch.promote_types(torch.float32, x.dtype)
    x = x.to(dtype)

    def project(weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
        bias = None if bias is None else bias.to(dtype)
        return functional.linear(x, _dequantize(weight, scale, dtype), bias)

    up = project(weights.up, weights.up_scale, weights.up_bias)
    if weights.gate is None:
        hidden = ACTIVATIONS[activation](up)
    else:
        hidden = ACTIVATIONS[activation](project(weights.gate, weights.gate_scale, weights.gate_bias)) * up
    size = hidden.shape[1] // mask.shape[1]
    # Not a product: what an inactive expert would compute must not matter, even if it is not finite.
    hidden = torch.where(mask.repeat_interleave(size, dim=1), hidden, 0)
    output = hidden @ weights.down.to(dtype)
    if weights.down_scale is not None:
        output = output * weights.down_scale.to(dtype)
    return output if weights.down_bias is None else output + weights.down_bias.to(dtype)
