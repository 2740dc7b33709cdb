"""The sparse FFN for 1 to 16 tokens on a GPU: `lte::sparse_ffn_decode`.

Shapes: T tokens, D hidden size, F neurons, E experts of S = F / E neurons each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lte.ops.arguments import MAX_TOKENS, FfnWeights, Routing, check_arguments
from lte.ops.launch import (
    ManyTokenTiles,
    OneTokenTiles,
    check_device,
    interpreted,
    many_token_tiles,
    multiprocessors,
    one_token_tiles,
)
from lte.ops.many_token_kernel import decode_many_kernel
from lte.ops.one_token_kernel import decode_one_kernel
from lte.ops.workspace import COUNTERS, MAX_EXPERTS, workspace

# What a launch does: routing, then gate and up (and for one token down), then down or the sum of the parts.
PHASES = ("route", "gate_up", "down")
_TL_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def sparse_ffn_decode(x: Tensor, weights: FfnWeights, routing: Routing, activation: str) -> Tensor:
    """Computes (m * act(x W_gate) * (x W_up)) W_down with m = 1[logit > threshold], reading active experts alone.

    One launch. No size or launch depends on data, so it may be captured in a CUDA graph, and `torch.compile` takes it
    as one operation.

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
    with torch.cuda.device_of(x):  # Triton launches on the current GPU
        return run_decode(x.contiguous(), ffn, route, activation)


@_decode_op.register_fake
def _(
    x: Tensor, weights: Sequence[Tensor | None], routing: Sequence[Tensor | None], threshold: float, activation: str
) -> Tensor:
    return x.new_empty(x.shape)


def run_decode(
    x: Tensor,
    weights: FfnWeights,
    routing: Routing,
    activation: str,
    tiles: OneTokenTiles | ManyTokenTiles | None = None,
) -> Tensor:
    """`sparse_ffn_decode` with checked arguments and contiguous x, and with explicit tiles for benchmarks."""
    launch = DecodeLaunch(x, weights, routing, activation, tiles)
    if interpreted():  # one program after the other: none can wait for the next
        for phase in range(len(PHASES)):
            launch.run(phase, phase)
    else:
        launch.run(0, len(PHASES) - 1)
    return launch.out


class DecodeLaunch:
    """One call's output and scratch memory, and how its phases are launched.

    Scratch comes from PyTorch's allocator at each call: a graph keeps it in its pool, and two streams never share it.
    Nothing in it must hold a value before the call, but for the counters of the workspace.
    """

    def __init__(
        self,
        x: Tensor,
        weights: FfnWeights,
        routing: Routing,
        activation: str,
        tiles: OneTokenTiles | ManyTokenTiles | None = None,
    ):
        self.x, self.weights, self.routing, self.activation = x, weights, routing, activation
        self.tokens, self.hidden = x.shape
        self.neurons, self.experts = weights.up.shape[0], routing.num_experts
        size = self.neurons // self.experts
        if tiles is None:
            one = self.tokens == 1
            tiles = one_token_tiles(weights.up, size) if one else many_token_tiles(weights.up, self.tokens, size)
        self.tiles = tiles
        self.programs = multiprocessors(x.device) * tiles.per_sm
        self.out = torch.empty_like(x)
        self.workspace = workspace(x.device)
        if self.experts > MAX_EXPERTS:
            raise ValueError(f"experts must be at most {MAX_EXPERTS}, got experts={self.experts}")
        if isinstance(tiles, OneTokenTiles):
            self.partial = x.new_empty(self.programs, self.hidden, dtype=torch.float32)
        else:
            self.h = x.new_empty(self.tokens, self.neurons)
            columns = triton.cdiv(self.hidden, tiles.block_d)
            if columns > COUNTERS - 4:
                raise ValueError(f"D must be at most {(COUNTERS - 4) * tiles.block_d}, got D={self.hidden}")
            self.splits = max(self.programs // columns, 1)
            self.partial = x.new_empty(self.splits, self.tokens, self.hidden, dtype=torch.float32)

    def run(self, first: int, last: int) -> None:
        """Launches the phases first..last of `PHASES`."""
        if isinstance(self.tiles, OneTokenTiles):
            self._run_one(self.tiles, first, last)
        else:
            self._run_many(self.tiles, first, last)

    def _common(self, first: int, last: int) -> dict[str, Any]:
        share = triton.cdiv(self.experts, self.programs)
        # All programs must run at once where they wait for each other.
        waits = {} if first == last else {"launch_cooperative_grid": True}
        return {
            "D": self.hidden, "E": self.experts, "S": self.neurons // self.experts, "P": self.programs,
            "R": triton.next_power_of_2(share), "LOCAL": triton.next_power_of_2(share + 1),
            "E_PAD": max(triton.next_power_of_2(self.experts), 16), "ACTIVATION": self.activation,
            "STAGES": self.tiles.stages, "FIRST": first, "LAST": last, "num_warps": self.tiles.warps, **waits,
        }  # fmt: skip

    def _run_one(self, tiles: OneTokenTiles, first: int, last: int) -> None:
        w, r = self.weights, self.routing
        columns = triton.next_power_of_2(self.hidden)
        block_c = triton.next_power_of_2(triton.cdiv(self.hidden, self.programs))
        common = self._common(first, last)
        decode_one_kernel[(self.programs,)](
            self.x, w.up, w.gate, w.down, w.up_bias, w.gate_bias, w.down_bias, w.up_scale, w.gate_scale, w.down_scale,
            None if r.logits is not None else r.weight, r.bias, r.logits, self.partial, self.workspace.counters,
            self.workspace.masks, self.out, r.threshold,
            D_PAD=columns, BLOCK_R=max(min(columns, 16384 // common["R"]), 16), BLOCK_N=tiles.block_n,
            BLOCK_P=min(triton.next_power_of_2(self.programs), max(16384 // block_c, 16)), BLOCK_C=block_c, **common,
        )  # fmt: skip

    def _run_many(self, tiles: ManyTokenTiles, first: int, last: int) -> None:
        w, r = self.weights, self.routing
        common = self._common(first, last)
        padded = triton.next_power_of_2(self.tokens)
        wide = r.weight is None or r.weight.dtype != self.x.dtype
        if padded <= 8:  # the routing keeps 64 partial sums a thread
            block_r = max(min(64 * 32 * tiles.warps // (padded * common["R"]), triton.next_power_of_2(self.hidden)), 16)
        else:  # or uses tensor cores, whose products have sides of 16 or more
            common["R"] = max(common["R"], 16)
            block_r = 64 if wide else 512
        decode_many_kernel[(self.programs,)](
            self.x, w.up, w.gate, w.down, w.up_bias, w.gate_bias, w.down_bias, w.up_scale, w.gate_scale, w.down_scale,
            None if r.logits is not None else r.weight, r.bias, r.logits, self.h, self.partial, self.workspace.counters,
            self.workspace.masks, self.out, r.threshold, self.tokens,
            T_PAD=MAX_TOKENS, T_ROUTE=padded, BLOCK_R=block_r, ROUTER_DTYPE=tl.float32 if wide else _dot_dtype(self.x),
            BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k, BLOCK_D=tiles.block_d, SPLITS=self.splits,
            LOCAL_DOWN=min(triton.next_power_of_2(triton.cdiv(self.experts, self.splits)), 64),
            DOWN_STAGES=tiles.down_stages, DOT_DTYPE=_dot_dtype(self.x), **common,
        )  # fmt: skip


def _dot_dtype(x: Tensor) -> tl.dtype:
    # The interpreter computes tl.dot in bf16 wrongly, without an error.
    return tl.float32 if interpreted() and x.dtype == torch.bfloat16 else _TL_DTYPES[x.dtype]
