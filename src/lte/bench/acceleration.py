"""The seam to the kernels: switching a model to them, and what a layer hands to them."""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from lte.nn.sparse_ffn import SparseFfn
from lte.ops import decode, launch
from lte.ops.arguments import MAX_TOKENS, FfnWeights, Routing

_MODULE = "lte.hf.acceleration"
# Names that Hugging Face gives to the activation functions of `lte.ops.activations`.
_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "swish": "silu"}


def accelerate(model: nn.Module, weights: str) -> None:
    """Switches the sparse FFNs of a model to the kernels, in place, on the path that `lte eval` takes."""
    if find_spec(_MODULE) is not None:
        importlib.import_module(_MODULE).accelerate_(model, weights=weights)


def accelerated_provider(weights: str) -> str:
    """Name of the sparse model in the result rows."""
    if find_spec(_MODULE) is None:
        return "lte hard mode"
    return "lte" if weights == "native" else f"lte {weights}"


def activation_name(config: Any) -> str:
    """The key of `lte.ops.activations.ACTIVATIONS` for a model's config."""
    name = getattr(config, "hidden_activation", None) or config.hidden_act
    return _ACTIVATIONS.get(name, name)


def kernel_arguments(ffn: SparseFfn, x: Tensor) -> tuple[FfnWeights, Routing]:
    """The weights of a layer as the kernels take them, without a copy where the layer is laid out for them.

    Args:
        ffn: a layer, native weights.
        x: hidden states [T, D]; a low-rank router's logits are computed from them.
    """
    layout = ffn.layout
    up: Any = ffn.get_submodule(layout.up)
    down: Any = ffn.get_submodule(layout.down)
    gate: Any = None if layout.gate is None else ffn.get_submodule(layout.gate)
    up_rows, up_bias = up.weight, up.bias
    gate_rows, gate_bias = (None, None) if gate is None else (gate.weight, gate.bias)
    if layout.fused:
        gate_rows, up_rows = up.weight.chunk(2)
        gate_bias, up_bias = (None, None) if up.bias is None else up.bias.chunk(2)
    weights = FfnWeights(
        up=up_rows,
        gate=gate_rows,
        down=down.weight.T.contiguous(),
        up_bias=up_bias,
        gate_bias=gate_bias,
        down_bias=down.bias,
    )
    return weights, routing_of(ffn, x)


def routing_of(ffn: SparseFfn, x: Tensor) -> Routing:
    """What decides on the experts of hidden states x [T, D], rounded as the kernels round it."""
    if ffn.router.down is not None:
        return Routing(logits=ffn.router(x), threshold=ffn.threshold_logit)
    weight = ffn.router.weight.detach().to(x.dtype)
    return Routing(weight=weight, bias=ffn.router.bias.detach(), threshold=ffn.threshold_logit)


def phase_runs(x: Tensor, ffns: Sequence[SparseFfn], activation: str) -> dict[str, Callable[[], object]]:
    """The decode kernel's phases one by one over all layers, each in launches of its own.

    Each phase finds what the phases before it left when all of them ran here, once.

    Args:
        x: hidden states [T, D].
        ffns: layers with native weights.
        activation: a key of `lte.ops.activations.ACTIVATIONS`.

    Returns:
        Functions by the kernel's names of its phases; none if this lte's kernel, or this device, cannot split them.
    """
    if not (x.is_cuda or launch.interpreted()) or x.shape[0] > MAX_TOKENS or not hasattr(decode, "DecodeLaunch"):
        return {}
    launches = [decode.DecodeLaunch(x, *kernel_arguments(ffn, x), activation) for ffn in ffns]
    phases = range(len(decode.PHASES))
    for one, phase in itertools.product(launches, phases):
        one.run(phase, phase)

    def run(phase: int) -> None:
        for one in launches:
            one.run(phase, phase)

    return {decode.PHASES[phase]: functools.partial(run, phase) for phase in phases}


def reference_tolerance(dtype: torch.dtype) -> float:
    """Largest relative RMS error against `lte.ops.reference`."""
    return {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]
