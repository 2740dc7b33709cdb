"""The activation functions of the kernels by name, in PyTorch and in Triton."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional


def _squared_relu(x: Tensor) -> Tensor:
    return functional.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
    "relu2": _squared_relu,
}


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
