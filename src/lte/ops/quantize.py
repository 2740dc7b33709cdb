"""Weights in 8 bits with a scale per row, for weight-only quantisation: products still take 16 or 32-bit inputs.

A row of the gate and up projections [F, D] is a neuron, one of the down projection [D, F] an output. So a kernel
multiplies a neuron's sum by one number, and at the end each output by another. A scale per neuron for down as well cost
SmolLM2 quality, which one per output does not (docs/kernels.md). Another format, int4 in groups of a row say, would be
another pair of functions here, its scales [F, groups] in the fields of `lte.ops.arguments.FfnWeights`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lte.ops.arguments import FfnWeights

LARGEST = 127


@torch.no_grad()
def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds a weight [F, D] to 8 bits: weight[f] is about values[f] * scale[f], scale[f] = max |weight[f]| / 127.

    Returns:
        The values, int8 [F, D] in the memory order of `weight`, from -127 to 127, and the scales, fp32 [F]. The error
        is at most half a scale. A row of zeros has the scale 0.

    Raises:
        ValueError: if `weight` is no floating-point matrix, or not finite.
    """
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(f"weight must be a floating-point matrix, got {weight.dtype} of shape {tuple(weight.shape)}")
    scale = weight.abs().amax(1).float() / LARGEST
    if not scale.isfinite().all():
        raise ValueError("weight must be finite, got infinity or NaN in it")
    # The smallest normal number in place of 0, and of scales whose inverse is infinite.
    divisor = scale.clamp_min(torch.finfo(torch.float32).tiny)
    values = (weight.float() / divisor.unsqueeze(1)).round_().clamp_(-LARGEST, LARGEST)
    return values.to(torch.int8), scale


@torch.no_grad()
def dequantize_rows(values: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight [F, D] in `dtype` that `quantize_rows` rounded."""
    # Computed in fp32 and rounded once, without a tensor in fp32.
    return torch.mul(values, scale.unsqueeze(1), out=torch.empty_like(values, dtype=dtype))


def floating_weight(weights: FfnWeights, role: Literal["gate", "up", "down"], dtype: torch.dtype) -> Tensor:
    """A weight [F, D] of an FFN as it is, or if it is int8 expanded to `dtype`; there must be one for the role."""
    weight, scale = getattr(weights, role), getattr(weights, f"{role}_scale")
    if scale is None:
        return weight
    return dequantize_rows(weight.T, scale, dtype).T if role == "down" else dequantize_rows(weight, scale, dtype)
