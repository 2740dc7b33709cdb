"""The activation functions of `lte.ops.activations` in Triton, in a file of their own: triton is not everywhere."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(x, NAME: tl.constexpr):
    """The activation function NAME (a key of `ACTIVATIONS`) of an fp32 tensor."""
    if NAME == "silu":
        y = x * tl.sigmoid(x)
    elif NAME == "gelu":
        y = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        # 0.5 (1 + tanh(u)) = sigmoid(2u): there is no tanh that every backend and the interpreter have.
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        tl.static_assert((NAME == "relu") or (NAME == "relu2"), "unknown activation")
        y = tl.where(x < 0, 0.0, x)  # keeps NaN, as PyTorch does
        if NAME == "relu2":
            y = y * y
    return y
