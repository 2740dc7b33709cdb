"""What the benchmarks know of the kernels: names, what a layer hands to them, and their parts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lte.nn.accelerated import AcceleratedFfn
from lte.nn.ffn_parts import bias_of, weight_of
from lte.nn.sparse_ffn import SparseFfn
from lte.ops.arguments import MAX_TOKENS, FfnWeights, Routing
from lte.ops.paths import ExpectedUse

TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
"""Largest relative RMS error against `lte.ops.reference`."""


def chosen_path(ffn: SparseFfn, tokens: int, use: ExpectedUse | None, in_a_row: bool = False) -> str:
    """What computes an accelerated layer for T tokens, of as many texts or in a row, if such a use is expected."""
    assert isinstance(ffn, AcceleratedFfn)
    path = ffn.expected_path(tokens, use, in_a_row)
    return "numba" if path == "decode" and ffn.router.weight.device.type == "cpu" else path


def path_names(ffns: Sequence[SparseFfn], tokens: int, in_a_row: bool = False) -> str:
    """What computes some layers for T tokens as they are now."""
    return ", ".join(sorted({chosen_path(ffn, tokens, use_of_layer(ffn), in_a_row) for ffn in ffns}))


def use_of_layer(ffn: SparseFfn) -> ExpectedUse | None:
    """The use of experts that an accelerated layer chooses its path by."""
    assert isinstance(ffn, AcceleratedFfn)
    return ffn.acceleration.use


def expect_(ffns: Sequence[SparseFfn], active_fraction: float, tokens: int) -> None:
    """Lets layers expect another share of active experts.

    Only where that changes the path for T tokens: compiled functions of a model are compiled anew at every change.
    """
    for ffn in ffns:
        assert isinstance(ffn, AcceleratedFfn)
        use, now = ExpectedUse(active_fraction), use_of_layer(ffn)
        if any(chosen_path(ffn, tokens, use, row) != chosen_path(ffn, tokens, now, row) for row in (False, True)):
            ffn.expect_(use)


def routing_of(ffn: SparseFfn, x: Tensor) -> Routing:
    """What decides on the experts of hidden states x [T, D], rounded as the kernels round it."""
    if ffn.router.down is not None:
        return Routing(logits=ffn.router(x), threshold=ffn.threshold_logit)
    weight = ffn.router.weight.detach().to(x.dtype)
    return Routing(weight=weight, bias=ffn.router.bias.detach(), threshold=ffn.threshold_logit)


def weights_of(ffn: SparseFfn) -> FfnWeights:
    """The weights of a layer as the kernels take them: views, if the layer is accelerated."""
    up, down = weight_of(ffn, "up"), weight_of(ffn, "down")
    assert up is not None
    assert down is not None
    return FfnWeights(
        up=up,
        gate=weight_of(ffn, "gate"),
        down=down.contiguous(),
        up_bias=bias_of(ffn, "up"),
        gate_bias=bias_of(ffn, "gate"),
        down_bias=bias_of(ffn, "down"),
        up_scale=getattr(ffn, "up_scale", None),
        gate_scale=getattr(ffn, "gate_scale", None),
        down_scale=getattr(ffn, "down_scale", None),
    )


def phase_runs(x: Tensor, ffns: Sequence[SparseFfn], activation: str) -> dict[str, Callable[[], object]]:
    """The decode kernel's phases one by one over all layers, each in launches of its own.

    Each phase finds what the phases before it left when all of them ran here, once.

    Args:
        x: hidden states [T, D] on a device that Triton runs on.
        ffns: layers.
        activation: a key of `lte.ops.activations.ACTIVATIONS`.

    Returns:
        Functions by the kernel's names of its phases; none if the kernel cannot be split, or takes fewer tokens.
    """
    from lte.ops import decode  # needs triton, which is not everywhere

    if x.shape[0] > MAX_TOKENS:
        return {}
    launches = [decode.DecodeLaunch(x, weights_of(ffn), routing_of(ffn, x), activation) for ffn in ffns]
    buffers = [launch.buffers(x) for launch in launches]
    phases = range(len(decode.PHASES))

    def run(phase: int) -> None:
        for launch, memory in zip(launches, buffers, strict=True):
            launch.run(x, memory, phase, phase)

    for phase in phases:
        run(phase)
    return {decode.PHASES[phase]: functools.partial(run, phase) for phase in phases}
