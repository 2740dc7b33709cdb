"""The sparse FFN for 1 to 16 tokens on a GPU: `lte::sparse_ffn_decode`.

Shapes: T tokens, D hidden size, F neurons, E experts of S = F / E neurons each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lte.ops import decode_kernels as kernels
from lte.ops.arguments import MAX_TOKENS, FfnWeights, Routing, check_arguments
from lte.ops.launch import DecodeTiles, check_device, decode_tiles, interpreted

ROUTE_BLOCK_E = 16
ROUTE_PARTS = 8
_TL_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def sparse_ffn_decode(x: Tensor, weights: FfnWeights, routing: Routing, activation: str) -> Tensor:
    """Computes (m * act(x W_gate) * (x W_up)) W_down with m = 1[logit > threshold], reading active experts alone.

    Two launches, or three where the tiles say that the router has its own. No size or launch depends on data,
    so it may be captured in a CUDA graph, and `torch.compile` takes it as one operation.

    Args:
        x: hidden states [T, D], T from 1 to 16, fp32, fp16 or bf16.
        weights: the projections, on the device of x.
        routing: what decides on m.
        activation: a key of `ACTIVATIONS`.

    Returns:
        [T, D] in the dtype of x.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit.
    """
    flat_routing = [routing.weight, routing.bias, routing.logits]
    return _decode_op(x, weights.flat(), flat_routing, routing.threshold, activation)


# Lists, since the operation's schema cannot hold a dataclass.
@torch.library.custom_op("lte::sparse_ffn_decode", mutates_args=())
def _decode_op(
    x: Tensor,
    weights: Sequence[Tensor | None],
    routing: Sequence[Tensor | None],
    threshold: float,
    activation: str,
) -> Tensor:
    check_device(x)
    ffn = FfnWeights.from_flat(list(weights))
    route = Routing(weight=routing[0], bias=routing[1], logits=routing[2], threshold=threshold)
    check_arguments(x, ffn, route, activation)
    tiles = decode_tiles(ffn.up, ffn.gate is not None, x.shape[0], ffn.up.shape[0] // route.num_experts)
    return run_decode(x.contiguous(), ffn, route, activation, tiles)


@_decode_op.register_fake
def _(
    x: Tensor, weights: Sequence[Tensor | None], routing: Sequence[Tensor | None], threshold: float, activation: str
) -> Tensor:
    return x.new_empty(x.shape)


def run_decode(x: Tensor, weights: FfnWeights, routing: Routing, activation: str, tiles: DecodeTiles) -> Tensor:
    """`sparse_ffn_decode` with checked arguments, contiguous x and explicit tiles, for benchmarks.

    Scratch comes from PyTorch's allocator at each call: it is small (h [T, F] and the partial sums), a graph
    keeps it in its pool, and two streams never share it. Nothing in it must hold a value before the call: the
    first kernel sets the counters of the second.
    """
    tokens, hidden = x.shape
    neurons, experts = weights.up.shape[0], routing.num_experts
    h = x.new_empty(tokens, neurons, dtype=torch.float32 if tokens == 1 else x.dtype)
    union = x.new_empty(experts, dtype=torch.int32)
    counters = x.new_empty(triton.next_power_of_2(triton.cdiv(hidden, tiles.block_d)), dtype=torch.int32)
    route: tuple[Tensor | None, Tensor | None, Tensor | None] = (routing.weight, routing.bias, None)
    parts = 1
    if routing.weight is None or routing.logits is not None:
        route = (None, None, routing.logits)
    elif not tiles.fused_router:
        route, parts = (None, routing.bias, _route(x, routing.weight, tiles)), ROUTE_PARTS
    launch_gate_up(x, weights, route, routing.threshold, activation, tiles, (h, union, counters), parts)
    return launch_down(h, union, counters, weights, x.new_empty(tokens, hidden), tiles)


def _dot_dtype(x: Tensor) -> tl.dtype:
    # The interpreter computes tl.dot in bf16 wrongly, without an error.
    return tl.float32 if interpreted() and x.dtype == torch.bfloat16 else _TL_DTYPES[x.dtype]


def _pdl_option(enabled: bool) -> dict[str, bool]:
    return {"launch_pdl": True} if enabled else {}


def _token_padding(tokens: int) -> int:
    return 1 if tokens == 1 else MAX_TOKENS


def _route(x: Tensor, router: Tensor, tiles: DecodeTiles) -> Tensor:
    tokens, hidden = x.shape
    experts = router.shape[0]
    logits = x.new_empty(ROUTE_PARTS, tokens, experts, dtype=torch.float32)
    share = triton.next_power_of_2(triton.cdiv(hidden, ROUTE_PARTS))
    kernels.route_kernel[triton.cdiv(experts, ROUTE_BLOCK_E), ROUTE_PARTS](
        x, router, logits, tokens, D=hidden, E=experts, T_PAD=_token_padding(tokens), BLOCK_E=ROUTE_BLOCK_E,
        BLOCK_K=min(max(share, 16), 256 if tokens == 1 else 64), PARTS=ROUTE_PARTS, PDL=tiles.pdl, num_warps=4,
    )  # fmt: skip
    return logits


def launch_gate_up(
    x: Tensor,
    weights: FfnWeights,
    routing: tuple[Tensor | None, Tensor | None, Tensor | None],
    threshold: float,
    activation: str,
    tiles: DecodeTiles,
    scratch: tuple[Tensor, Tensor, Tensor],
    parts: int = 1,
) -> None:
    """Launches `gate_up_kernel` on routing (router, bias, logits); writes scratch (h, union, counters)."""
    tokens, hidden = x.shape
    router, bias, logits = routing
    h, union, counters = scratch
    experts, neurons = union.shape[0], h.shape[1]
    padding = _token_padding(tokens)
    kernels.gate_up_kernel[(neurons // tiles.block_n,)](
        x, weights.up, weights.gate, weights.up_bias, weights.gate_bias, weights.up_scale, weights.gate_scale,
        weights.down_scale, router, bias, logits, h, union, counters, threshold, tokens,
        D=hidden, E=experts, S=neurons // experts, T_PAD=padding, BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k,
        BLOCK_R=min(triton.next_power_of_2(hidden), 4096 // padding), PARTS=parts, COUNTERS=counters.shape[0],
        ACTIVATION=activation, DOT_DTYPE=_dot_dtype(x), STAGES=tiles.gate_up_stages, PDL=tiles.pdl,
        num_warps=tiles.gate_up_warps, **_pdl_option(tiles.pdl and parts > 1),
    )  # fmt: skip


def launch_down(
    h: Tensor, union: Tensor, counters: Tensor, weights: FfnWeights, out: Tensor, tiles: DecodeTiles
) -> Tensor:
    """Launches `down_kernel`, which writes `out` [T, D]; returns it."""
    tokens, hidden = out.shape
    experts, neurons = union.shape[0], h.shape[1]
    partial = out.new_empty(tiles.splits, tokens, hidden, dtype=torch.float32)
    kernels.down_kernel[triton.cdiv(hidden, tiles.block_d), tiles.splits](
        h, union, weights.down, weights.down_bias, partial, counters, out, tokens,
        D=hidden, E=experts, S=neurons // experts, E_PAD=max(triton.next_power_of_2(experts), 16),
        T_PAD=_token_padding(tokens), BLOCK_D=tiles.block_d, SPLITS=tiles.splits, DOT_DTYPE=_dot_dtype(out),
        STAGES=tiles.down_stages, PDL=tiles.pdl, num_warps=tiles.down_warps, **_pdl_option(tiles.pdl),
    )  # fmt: skip
    return out
