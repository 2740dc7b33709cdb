"""The sparse FFN for many tokens on a GPU: `lte::sparse_ffn_prefill`.

Two paths give the same result; `lte.ops.paths.choose_path` says which is faster.

- masked: all experts are computed by dense products; one kernel between them sets those that are off to zero.
- grouped: gate and up are computed for the tokens of each expert alone; the down projection is a dense product.

Shapes: T tokens, D hidden size, F neurons, E experts of S = F / E neurons each.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Literal, get_args

import torch
import triton
from torch import Tensor
from torch.nn import functional

from lte.config import check_choice
from lte.ops import prefill_kernels as kernels
from lte.ops.arguments import FfnWeights, Routing, check_arguments
from lte.ops.launch import check_device, multiprocessors
from lte.ops.prefill_launch import (
    LIST_EXPERTS,
    LIST_TOKENS,
    ActivationTiles,
    GroupedTiles,
    SkinnyTiles,
    activation_tiles,
    dot_dtype,
    fit_activation,
    fit_grouped,
    fit_skinny,
    grouped_tiles,
    skinny_rows,
    skinny_tiles,
)
from lte.ops.quantize import floating_weight

PrefillPath = Literal["masked", "grouped"]


def sparse_ffn_prefill(
    x: Tensor, weights: FfnWeights, routing: Routing, activation: str, path: PrefillPath = "masked"
) -> Tensor:
    """Computes (m * act(x W_gate) * (x W_up)) W_down with m = 1[logit > threshold].

    No size or launch depends on data, so it may be captured in a CUDA graph, and `torch.compile` takes it as one
    operation. Int8 weights are expanded for the call, one FFN at a time.

    Args:
        x: hidden states [T, D], fp32, fp16 or bf16.
        weights: the projections, on the device of x; where gate and up (and the
            router) are views of `stacked`, one product gives all of them.
        routing: what decides on m.
        activation: a key of `ACTIVATIONS`.
        path: how it is computed.

    Returns:
        [T, D] in the dtype of x.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit, or the path is unknown.
    """
    return _prefill_op(x, weights.flat(), routing.flat(), routing.threshold, activation, path)


# Lists, since the operation's schema cannot hold a dataclass.
@torch.library.custom_op("lte::sparse_ffn_prefill", mutates_args=())
def _prefill_op(
    x: Tensor,
    weights: Sequence[Tensor | None],
    routing: Sequence[Tensor | None],
    threshold: float,
    activation: str,
    path: str,
) -> Tensor:
    check_choice("path", path, get_args(PrefillPath))
    check_device(x)
    ffn = FfnWeights.from_flat(list(weights))
    route = Routing.from_flat(routing, threshold)
    check_arguments(x, ffn, route, activation, max_tokens=None)
    run = run_grouped if path == "grouped" else run_masked
    with torch.cuda.device_of(x):  # Triton launches on the current GPU
        return run(x.contiguous(), ffn, route, activation)


@_prefill_op.register_fake
def _(
    x: Tensor,
    weights: Sequence[Tensor | None],
    routing: Sequence[Tensor | None],
    threshold: float,
    activation: str,
    path: str,
) -> Tensor:
    return x.new_empty(x.shape)


def variant(x: Tensor, weights: FfnWeights, routing: Routing, path: PrefillPath) -> Hashable:
    """What of the kernels a path takes for x [T, D]: Triton compiles once for all x with the same, at the first one."""
    if path == "grouped":
        return fit_grouped(grouped_tiles(x), x.shape[1])
    tokens, experts = len(x), routing.num_experts
    masking = fit_activation(activation_tiles(tokens), tokens, experts, len(weights.up) // experts)
    rows = _rows_at_once(weights, routing) if _is_stacked(weights) else None
    tiles = None if rows is None else skinny_tiles(x, rows)
    return masking, tiles, None if tiles is None else _skinny_block(tokens)


def run_masked(
    x: Tensor, weights: FfnWeights, routing: Routing, activation: str, tiles: ActivationTiles | None = None
) -> Tensor:
    """The path `masked` with checked arguments and contiguous x, and with explicit tiles for benchmarks."""
    return project_down(mask_activations(*project(x, weights, routing), weights, routing, activation, tiles), weights)


def mask_activations(
    gate: Tensor | None,
    up: Tensor,
    logits: Tensor,
    weights: FfnWeights,
    routing: Routing,
    activation: str,
    tiles: ActivationTiles | None = None,
) -> Tensor:
    """The intermediate activations [T, F] from the products of `project`, zero where an expert is off."""
    (tokens, neurons), experts = up.shape, routing.num_experts
    size = neurons // experts
    tiles = fit_activation(tiles or activation_tiles(tokens), tokens, experts, size)
    block_e = tiles.block_f // size
    h = up.new_empty(tokens, neurons)
    kernels.masked_activation_kernel[(triton.cdiv(tokens, tiles.block_t) * triton.cdiv(experts, block_e),)](
        gate, up, weights.gate_bias, weights.up_bias, logits, _router_bias(routing), h, routing.threshold, tokens,
        E=experts, S=size, STRIDE=up.stride(0), LOGIT_STRIDE=logits.stride(0), BLOCK_T=tiles.block_t,
        BLOCK_E=block_e, ACTIVATION=activation, SKIP=tiles.skip, num_warps=tiles.warps,
    )  # fmt: skip
    return h


def run_grouped(
    x: Tensor, weights: FfnWeights, routing: Routing, activation: str, tiles: GroupedTiles | None = None
) -> Tensor:
    """The path `grouped` with checked arguments and contiguous x, and with explicit tiles for benchmarks."""
    counts, lists = list_tokens(x, routing)
    return project_down(group_activations(x, weights, counts, lists, activation, tiles), weights)


def list_tokens(x: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """How many tokens each expert has, [E] int32, and which, in the first places of [E, T] int32."""
    tokens, experts, logits = len(x), routing.num_experts, _logits(x, routing)
    counts = x.new_zeros(experts, dtype=torch.int32)
    lists = x.new_empty(experts, tokens, dtype=torch.int32)
    kernels.list_tokens_kernel[(triton.cdiv(tokens, LIST_TOKENS) * triton.cdiv(experts, LIST_EXPERTS),)](
        logits, _router_bias(routing), counts, lists, routing.threshold, tokens,
        E=experts, LOGIT_STRIDE=logits.stride(0), BLOCK_T=LIST_TOKENS, BLOCK_E=LIST_EXPERTS, num_warps=4,
    )  # fmt: skip
    return counts, lists


def group_activations(
    x: Tensor, weights: FfnWeights, counts: Tensor, lists: Tensor, activation: str, tiles: GroupedTiles | None = None
) -> Tensor:
    """The intermediate activations [T, F], of the pairs of token and expert in `lists` alone, else zero."""
    (tokens, hidden), (neurons, experts) = x.shape, (len(weights.up), len(counts))
    size = neurons // experts
    tiles = fit_grouped(tiles or grouped_tiles(x), hidden)
    gate, up = _input_weights(weights, x.dtype)
    h = x.new_zeros(tokens, neurons)
    programs = multiprocessors(x.device) * tiles.per_sm
    kernels.grouped_kernel[(programs,)](
        x, gate, up, weights.gate_bias, weights.up_bias, counts, lists, h, tokens,
        D=hidden, E=experts, S=size, P=programs, E_PAD=triton.next_power_of_2(experts),
        N=max(size if gate is None else 2 * size, 16), BLOCK_T=tiles.block_t, BLOCK_K=tiles.block_k,
        ACTIVATION=activation, STAGES=tiles.stages, DOT_DTYPE=dot_dtype(x), num_warps=tiles.warps,
    )  # fmt: skip
    return h


def _input_weights(weights: FfnWeights, dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
    gate = None if weights.gate is None else floating_weight(weights, "gate", dtype)
    return gate, floating_weight(weights, "up", dtype)


def project(x: Tensor, weights: FfnWeights, routing: Routing) -> tuple[Tensor | None, Tensor, Tensor]:
    """Products of x with gate and up, [T, F] with one row stride, and logits [T, E] without the router's bias."""
    neurons = len(weights.up)
    rows = neurons if weights.gate is None else 2 * neurons
    if not _is_stacked(weights):
        gate, up = _input_weights(weights, x.dtype)
        products = None if gate is None else functional.linear(x, gate)
        return products, functional.linear(x, up), _logits(x, routing)
    at_once = _rows_at_once(weights, routing)
    with_router = len(at_once) > rows
    if with_router:
        routing.rounded_weight()
    products = multiply(x, at_once)
    logits = products[:, rows : rows + routing.num_experts] if with_router else _logits(x, routing)
    return None if weights.gate is None else products[:, :neurons], products[:, rows - neurons : rows], logits


def _rows_at_once(weights: FfnWeights, routing: Routing) -> Tensor:
    """The rows of `stacked` that one product takes: gate and up, and the router where it follows them."""
    assert weights.stacked is not None
    rows = len(weights.up) if weights.gate is None else 2 * len(weights.up)
    own = routing.weight if routing.rounded is None else routing.rounded
    with_router = routing.logits is None and _is_at(own, weights.stacked, rows)
    return weights.stacked if with_router else weights.stacked[:rows]


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, K] times the transpose of a weight [N, K], by cuBLAS except where `skinny_product` is faster."""
    tiles = skinny_tiles(x, weight)
    return functional.linear(x, weight) if tiles is None else skinny_product(x, weight, tiles)


def skinny_product(x: Tensor, weight: Tensor, tiles: SkinnyTiles) -> Tensor:
    """x [T, K] times the transpose of a contiguous weight [N, K], for few tokens; x is contiguous, too."""
    (tokens, hidden), rows = x.shape, len(weight)
    tiles = fit_skinny(tiles, hidden)
    per_program = skinny_rows(tiles, rows, multiprocessors(x.device))
    out = x.new_empty(tokens, rows)
    kernels.skinny_product_kernel[(triton.cdiv(rows, per_program),)](
        x, weight, out, tokens,
        N=rows, K=hidden, ROWS=per_program, BLOCK_T=_skinny_block(tokens),
        BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k, X_FIRST=tiles.x_first, STAGES=tiles.stages,
        DOT_DTYPE=dot_dtype(x), num_warps=tiles.warps,
    )  # fmt: skip
    return out


def _skinny_block(tokens: int) -> int:
    """For how many tokens a program of `skinny_product_kernel` has room: all T, in the tensor cores' sizes."""
    return max(triton.next_power_of_2(tokens), 16)


def _is_stacked(weights: FfnWeights) -> bool:
    """Whether gate and up are the first rows of `stacked`: copies of the weights one by one may have undone it."""
    if weights.stacked is None or weights.up_scale is not None:
        return False
    if weights.gate is None:
        return _is_at(weights.up, weights.stacked, 0)
    return _is_at(weights.gate, weights.stacked, 0) and _is_at(weights.up, weights.stacked, len(weights.up))


def _is_at(part: Tensor | None, stacked: Tensor, row: int) -> bool:
    """Whether `part` is the rows of `stacked` from `row` on."""
    return (
        part is not None
        and part.dtype == stacked.dtype
        and part.untyped_storage().data_ptr() == stacked.untyped_storage().data_ptr()
        and part.storage_offset() == stacked.storage_offset() + row * stacked.shape[1]
    )


def _logits(x: Tensor, routing: Routing) -> Tensor:
    """Given logits, or the products of x and the router in its dtype, [T, E]."""
    if routing.logits is not None:
        return routing.logits
    assert routing.weight is not None
    dtype = torch.promote_types(x.dtype, routing.dtype)
    return functional.linear(x.to(dtype), routing.weight.to(routing.dtype).to(dtype)).to(routing.dtype)


def _router_bias(routing: Routing) -> Tensor | None:
    return routing.bias if routing.logits is None else None


def project_down(h: Tensor, weights: FfnWeights) -> Tensor:
    """The output [T, D] of intermediate activations [T, F]."""
    down = floating_weight(weights, "down", h.dtype)
    bias = None if weights.down_bias is None else weights.down_bias.to(h.dtype)
    return functional.linear(h, down.T, bias)
