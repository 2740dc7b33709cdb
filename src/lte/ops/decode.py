"""The sparse FFN for 1 to 16 tokens on a GPU: `lte::sparse_ffn_decode`.

Shapes: T tokens, D hidden size, F neurons, E experts of S = F / E neurons each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
from lte.ops.ready_kernel import ReadyKernel
from lte.ops.workspace import COUNTERS, MAX_EXPERTS, Workspace, workspace

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
    # What products of many tokens need stays out: CUDA graphs might copy it at each call.
    *ffn, _ = weights.flat()
    rounded = None if routing.rounded is None else torch.empty(0, dtype=routing.dtype, device=x.device)
    route = [routing.weight, routing.bias, routing.logits, rounded]
    return _decode_op(x, [*ffn, None], route, routing.threshold, activation)


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
    route = Routing.from_flat(routing, threshold)
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
    return DecodeLaunch(x, weights, routing, activation, tiles)(x)


@dataclass(frozen=True)
class Buffers:
    """What one call writes: its output [T, D] and scratch memory, of any content but for the workspace.

    Scratch comes from PyTorch's allocator at each call: a graph keeps it in its pool, and two streams never share it.
    """

    out: Tensor
    partial: Tensor
    h: Tensor | None
    workspace: Workspace


class DecodeLaunch:
    """How an FFN is launched for T tokens: all that does not depend on their hidden states is settled once.

    Args:
        x: hidden states [T, D] like those of the calls to come.
        weights: the projections, checked.
        routing: what decides on the experts, checked.
        activation: a key of `ACTIVATIONS`.
        tiles: tile sizes, by default those of the table.

    Raises:
        ValueError: if the FFN is too large for the kernels' counters.
    """

    def __init__(
        self,
        x: Tensor,
        weights: FfnWeights,
        routing: Routing,
        activation: str,
        tiles: OneTokenTiles | ManyTokenTiles | None = None,
    ):
        self.weights, self.routing, self.activation = weights, routing, activation
        self.tokens, self.hidden = x.shape
        self.neurons, self.experts = weights.up.shape[0], routing.num_experts
        if self.experts > MAX_EXPERTS:
            raise ValueError(f"experts must be at most {MAX_EXPERTS}, got experts={self.experts}")
        size = self.neurons // self.experts
        if tiles is None:
            one = self.tokens == 1
            tiles = one_token_tiles(weights.up, size) if one else many_token_tiles(weights.up, self.tokens, size)
        self.tiles = tiles
        self.programs = multiprocessors(x.device) * tiles.per_sm
        self._ready: dict[tuple[int, int], ReadyKernel] = {}
        one_token = isinstance(tiles, OneTokenTiles)
        self._kernel = decode_one_kernel if one_token else decode_many_kernel
        self._constants = self._of_one(tiles) if isinstance(tiles, OneTokenTiles) else self._of_many(tiles, x)
        self._partial = (self.programs, self.hidden) if one_token else (self.splits, self.tokens, self.hidden)
        w, r = weights, routing
        self._given = (
            w.up, w.gate, w.down, w.up_bias, w.gate_bias, w.down_bias, w.up_scale, w.gate_scale, w.down_scale,
            None if r.logits is not None else r.weight, r.bias, r.logits,
        )  # fmt: skip

    def __call__(self, x: Tensor, logits: Tensor | None = None) -> Tensor:
        """The output [T, D] for contiguous x [T, D]; logits [T, E] take the place of the routing's."""
        buffers = self.buffers(x)
        if interpreted():  # one program after the other: none can wait for the next
            for phase in range(len(PHASES)):
                self.run(x, buffers, phase, phase, logits=logits)
        else:
            self.run(x, buffers, logits=logits)
        return buffers.out

    def buffers(self, x: Tensor) -> Buffers:
        """Memory for a call on x."""
        partial = x.new_empty(self._partial, dtype=torch.float32)
        h = None if self.tokens == 1 else x.new_empty(self.tokens, self.neurons)
        return Buffers(torch.empty_like(x), partial, h, workspace(x.device))

    def run(
        self, x: Tensor, buffers: Buffers, first: int = 0, last: int = len(PHASES) - 1, logits: Tensor | None = None
    ) -> None:
        """Launches the phases first..last of `PHASES`."""
        rest = (buffers.out, self.routing.threshold)
        between = (buffers.partial, buffers.workspace.counters, buffers.workspace.masks)
        if buffers.h is not None:
            between, rest = (buffers.h, *between), (*rest, self.tokens)  # type: ignore[assignment]
        given = self._given if logits is None else (*self._given[:-1], logits)
        arguments = (x, *given, *between, *rest)
        ready = self._ready.get((first, last))
        if ready is None:
            # All programs must run at once where they wait for each other.
            options = {"launch_cooperative_grid": first < last, "launch_pdl": self.tiles.dependent}
            ready = ReadyKernel(self._kernel, {**self._constants, "FIRST": first, "LAST": last, **options})
            self._ready[first, last] = ready
        ready(self.programs, x.data_ptr() % 16 == 0, *arguments)

    def _common(self) -> dict[str, Any]:
        share = triton.cdiv(self.experts, self.programs)
        padded = max(triton.next_power_of_2(self.experts), 16)
        return {
            "D": self.hidden, "E": self.experts, "S": self.neurons // self.experts, "P": self.programs,
            "R": triton.next_power_of_2(share), "LOCAL": triton.next_power_of_2(share + 1),
            "E_PAD": padded, "AT_ONCE": min(max(padded // (32 * self.tiles.warps), 1), 8),
            "ACTIVATION": self.activation, "ROUTER_AS": _TL_DTYPES[self.routing.dtype],
            "STAGES": self.tiles.stages, "DEPENDENT": self.tiles.dependent, "num_warps": self.tiles.warps,
        }  # fmt: skip

    def _of_one(self, tiles: OneTokenTiles) -> dict[str, Any]:
        common = self._common()
        columns = triton.next_power_of_2(self.hidden)
        block_c = triton.next_power_of_2(triton.cdiv(self.hidden, self.programs))
        return {
            **common, "D_PAD": columns, "BLOCK_R": max(min(columns, 16384 // common["R"]), 16),
            "BLOCK_N": tiles.block_n, "BLOCK_C": block_c,
            "BLOCK_P": min(triton.next_power_of_2(self.programs), max(16384 // block_c, 16)),
        }  # fmt: skip

    def _of_many(self, tiles: ManyTokenTiles, x: Tensor) -> dict[str, Any]:
        columns = triton.cdiv(self.hidden, tiles.block_d)
        if columns > COUNTERS - 4:
            raise ValueError(f"D must be at most {(COUNTERS - 4) * tiles.block_d}, got D={self.hidden}")
        self.splits = max(self.programs // columns, 1)
        common = self._common()
        padded = triton.next_power_of_2(self.tokens)
        wide = self.routing.dtype != x.dtype
        if padded <= 8:  # the routing keeps 64 partial sums a thread
            block_r = max(min(64 * 32 * tiles.warps // (padded * common["R"]), triton.next_power_of_2(self.hidden)), 16)
        else:  # or uses tensor cores, whose products have sides of 16 or more
            common["R"] = max(common["R"], 16)
            block_r = 64 if wide else 512
        return {
            **common, "T_PAD": MAX_TOKENS, "T_ROUTE": padded, "BLOCK_R": block_r, "BLOCK_N": tiles.block_n,
            "BLOCK_K": tiles.block_k, "BLOCK_D": tiles.block_d, "SHARE": tiles.share, "SPAN": tiles.span,
            "PREFETCH": tiles.prefetch, "SPLITS": self.splits,
            "LOCAL_DOWN": min(triton.next_power_of_2(triton.cdiv(self.experts, self.splits)), 64),
            "DOWN_STAGES": tiles.down_stages, "DOT_DTYPE": _dot_dtype(x),
            "ROUTER_DTYPE": tl.float32 if wide else _dot_dtype(x),
        }  # fmt: skip


def _dot_dtype(x: Tensor) -> tl.dtype:
    # The interpreter computes tl.dot in bf16 wrongly, without an error.
    return tl.float32 if interpreted() and x.dtype == torch.bfloat16 else _TL_DTYPES[x.dtype]
