"""The gate before every timing: what is wrong is not timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lte.bench.acceleration import TOLERANCES, routing_of, weights_of
from lte.bench.dense import Projections
from lte.nn.hooks import before_each_call
from lte.nn.sparse_ffn import SparseFfn
from lte.nn.wrapped_ffn import WrappedFfn
from lte.ops.arguments import FfnWeights
from lte.ops.reference import sparse_ffn_reference

# Errors of the layers add up on the way to the logits.
LOGITS_OVER_LAYER = 10
# The layers whose fp32 reference is computed: the first, the last and some between.
CHECKED_LAYERS = 4
# Tokens of a long input that are compared, so that the fp32 reference stays small.
CHECKED_TOKENS = 256


class GateError(RuntimeError):
    """A result that differs from the reference, so that its time means nothing."""


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """RMS of the error over RMS of the reference; infinite where the reference is zero and `actual` is not."""
    error = (actual.float() - expected.float()).square().mean().sqrt().item()
    scale = expected.float().square().mean().sqrt().item()
    return error / scale if scale else (0.0 if error == 0 else float("inf"))


def require(error: float, bound: float, what: str) -> float:
    """Returns the error.

    Raises:
        GateError: if it is above the bound, or not a number.
    """
    if not error <= bound:
        raise GateError(f"relative RMS of {what} must be at most {bound:g}, got {error:.2e}; nothing was timed")
    return error


@torch.no_grad()
def check_ffns(
    ffns: Sequence[SparseFfn],
    inputs: Sequence[Tensor],
    stock: Sequence[Projections],
    activation: str,
    native: bool = True,
) -> float:
    """Compares layers with `lte.ops.reference` on the stock weights; returns the largest relative RMS error.

    Args:
        ffns: sparse layers.
        inputs: hidden states [..., D] of each.
        stock: the dense model's weights of each.
        activation: a key of `lte.ops.activations.ACTIVATIONS`.
        native: whether the layers hold these weights, and not int8 ones, which are then compared with themselves.

    Raises:
        GateError: if an error is above the bound of the dtype.
    """
    worst = 0.0
    step = max(len(ffns) // CHECKED_LAYERS, 1)
    for index in sorted({*range(0, len(ffns), step), len(ffns) - 1}):
        ffn, x, p = ffns[index], inputs[index], stock[index]
        tokens = x.numel() // x.shape[-1]
        rows = torch.linspace(0, tokens - 1, min(CHECKED_TOKENS, tokens)).long().to(x.device)
        flat = x.flatten(0, -2)[rows]
        actual = ffn(x).flatten(0, -2)[rows]
        weights = stock_weights(p) if native else weights_of(ffn)
        if weights.down_bias is None:
            # What `LteConfig.dropped_bias` adds, which the dense model does not have.
            weights = replace(weights, down_bias=ffn.part(ffn.layout.down).bias)
        expected = sparse_ffn_reference(flat, weights, routing_of(ffn, flat), activation)
        worst = max(worst, require(relative_rms(actual, expected), TOLERANCES[x.dtype], f"the FFN of layer {index}"))
    return worst


def stock_weights(p: Projections) -> FfnWeights:
    """A dense FFN's weights, as `lte.ops.reference` takes them."""
    return FfnWeights(
        gate=p.gate, up=p.up, down=p.down.T, gate_bias=p.gate_bias, up_bias=p.up_bias, down_bias=p.down_bias
    )


def layer_inputs(ffns: Sequence[nn.Module], run: Callable[[], Any]) -> list[Tensor]:
    """The hidden states that each FFN gets while `run` runs the model eagerly, once."""
    inputs: dict[int, Tensor] = {}
    readers = {index: ffn.reader if isinstance(ffn, WrappedFfn) else ffn for index, ffn in enumerate(ffns)}

    def keep(index: int, args: tuple[Tensor, ...]) -> None:
        inputs[index] = args[0].detach().clone()

    with torch.no_grad(), before_each_call(readers, keep):
        run()
    return [inputs[index] for index in range(len(ffns))]


def check_logits(actual: Tensor, expected: Tensor, what: str) -> float:
    """Compares a compiled model's logits with the eager ones.

    Raises:
        RuntimeError: if their relative RMS error is above ten times that of a layer.
    """
    bound = LOGITS_OVER_LAYER * TOLERANCES[expected.dtype]
    return require(relative_rms(actual, expected), bound, what)
