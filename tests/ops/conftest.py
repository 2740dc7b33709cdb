"""What the kernels' tests share: random FFNs, memory that starts as NaN, and the error bounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lte.ops.arguments import FfnWeights, Routing
from lte.ops.decode import sparse_ffn_decode
from lte.ops.reference import sparse_ffn_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUNDS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def random_ffn(
    hidden: int,
    experts: int,
    size: int = 32,
    *,
    dtype: torch.dtype = torch.float32,
    gated: bool = True,
    biases: bool = False,
    int8: bool = False,
) -> FfnWeights:
    """Weights scaled by fan_in**-0.5, biases by one tenth."""
    neurons = experts * size
    tensors: dict[str, Tensor] = {}
    for name in ("up", "down", *(["gate"] * gated)):
        fan_in, outputs = (neurons, hidden) if name == "down" else (hidden, neurons)
        weight = torch.randn(neurons, hidden, device=DEVICE) * fan_in**-0.5
        if int8:
            axis = 0 if name == "down" else 1  # a scale per output for down, per neuron else
            scale = weight.abs().amax(axis) / 127
            tensors[f"{name}_scale"] = scale
            tensors[name] = (weight / scale.unsqueeze(axis)).round().to(torch.int8)
        else:
            tensors[name] = weight.to(dtype)
        if biases:
            tensors[f"{name}_bias"] = (torch.randn(outputs, device=DEVICE) / 10).to(dtype)
    return FfnWeights(**tensors)


def random_router(x: Tensor, experts: int, sparsity: float, dtype: torch.dtype = torch.float32) -> Routing:
    """A router whose threshold lies in the widest gap near the wanted sparsity, so that rounding decides nothing."""
    hidden = x.shape[1]
    weight = (torch.randn(experts, hidden, device=DEVICE) * hidden**-0.5).to(dtype)
    bias = torch.randn(experts, device=DEVICE).to(dtype)
    products = (x.double() @ weight.double().T).to(dtype)
    logits = (products.double() + bias.double()).flatten().sort().values
    start = min(max(int(sparsity * len(logits)) - 3, 0), max(len(logits) - 8, 0))
    near = logits[start : start + 8]
    widest = int((near[1:] - near[:-1]).argmax())
    return Routing(weight=weight, bias=bias, threshold=((near[widest] + near[widest + 1]) / 2).item())


def finer_router(x: Tensor, experts: int) -> Routing:
    """A router in fp32 that counts as rounded to the dtype of x, with which no expert is on for `opposed_states`.

    Unrounded it would switch the first one on.
    """
    weight = torch.zeros(experts, x.shape[1], device=DEVICE)
    weight[0, :2] = torch.tensor([1 + 2**-12, 1.0])
    return Routing(weight=weight, rounded=torch.full_like(weight, torch.nan, dtype=x.dtype))


def opposed_states(tokens: int, hidden: int, dtype: torch.dtype) -> Tensor:
    """Hidden states [T, D] of which the first two cancel."""
    x = torch.zeros(tokens, hidden, device=DEVICE, dtype=dtype)
    x[:, 0], x[:, 1] = 1, -1
    return x


def masks(tokens: int, experts: int) -> dict[str, Tensor]:
    """Masks [T, E] by name: none, one, some, and all experts active, and others for each token."""
    mask = {name: torch.zeros(tokens, experts, dtype=torch.bool, device=DEVICE) for name in ("none", "one", "some")}
    mask["one"][:, experts // 2] = True
    mask["some"][:, ::2] = True
    mask["all"] = ~mask["none"]
    mask["different"] = torch.rand(tokens, experts, device=DEVICE) < 0.4
    return mask


def garbage(tensor: Tensor) -> Tensor:
    """The tensor filled with NaN, or with 101 if it holds integers."""
    return tensor.fill_(torch.nan if tensor.is_floating_point() else 101)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody wrote holds garbage."""
    new_empty, empty = Tensor.new_empty, torch.empty
    monkeypatch.setattr(Tensor, "new_empty", lambda *args, **kwargs: garbage(new_empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: garbage(empty(*args, **kwargs)))


@pytest.fixture
def assert_matches(relative_rms: Callable[[Tensor, Tensor], float], poisoned: None) -> Callable[..., Tensor]:
    """Compares the kernels with the reference; returns the output."""

    def check(x: Tensor, weights: FfnWeights, routing: Routing, activation: str = "silu", note: Any = "") -> Tensor:
        actual = sparse_ffn_decode(x, weights, routing, activation)
        expected = sparse_ffn_reference(x, weights, routing, activation)
        assert actual.dtype == x.dtype
        assert relative_rms(actual, expected) <= BOUNDS[x.dtype], note
        return actual

    return check
