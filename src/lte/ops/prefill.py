"""The sparse FFN for many tokens on a GPU: `lte::sparse_ffn_prefill`.

Two paths give the same result; `lte.ops.paths.choose_path` says which is faster.

- masked: all experts are computed by dense products; one kernel between them sets those that are off to zero.
- grouped: gate and up are computed for the tokens of each expert alone; the down projection is a dense product. So are
  gate and up of the core (`Routing.core`), which nearly all tokens need.

Shapes: T tokens, D hidden size, F neurons, E experts of S = F / E neurons each.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Literal, get_args

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
from lte.ops.ready_kernel import ReadyKernel

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
    return _prefill_op(x, weights.flat(), routing.flat(), routing.threshold, activation, path, routing.core)


# Lists, since the operation's schema cannot hold a dataclass.
@torch.library.custom_op("lte::sparse_ffn_prefill", mutates_args=())
def _prefill_op(
    x: Tensor,
    weights: Sequence[Tensor | None],
    routing: Sequence[Tensor | None],
    threshold: float,
    activation: str,
    path: str,
    core: int = 0,
) -> Tensor:
    check_choice("path", path, get_args(PrefillPath))
    check_device(x)
    ffn = FfnWeights.from_flat(list(weights))
    route = Routing.from_flat(routing, threshold, core)
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
    core: int = 0,
) -> Tensor:
    return x.new_empty(x.shape)


def variant(x: Tensor, weights: FfnWeights, routing: Routing, path: PrefillPath) -> Hashable:
    """What of the kernels a path takes for x [T, D]: Triton compiles once for all x with the same, at the first one."""
    tokens, experts = len(x), routing.num_experts
    size = len(weights.up) // experts
    if path == "grouped":
        masking = _core_tiles(tokens, routing.core, size)
        return fit_grouped(grouped_tiles(x), x.shape[1]), masking
    masking = fit_activation(activation_tiles(tokens), tokens, experts, size)
    rows = _rows_at_once(weights, routing) if _is_stacked(weights) else None
    tiles = None if rows is None else skinny_tiles(x, rows)
    return masking, tiles, None if tiles is None else _skinny_block(tokens)


def run_masked(
    x: Tensor, weights: FfnWeights, routing: Routing, activation: str, tiles: ActivationTiles | None = None
) -> Tensor:
    """The path `masked` with checked arguments and contiguous x, and with explicit tiles for benchmarks."""
    return MaskedLaunch(x, weights, routing, activation, tiles)(x)


def run_grouped(
    x: Tensor, weights: FfnWeights, routing: Routing, activation: str, tiles: GroupedTiles | None = None
) -> Tensor:
    """The path `grouped` with checked arguments and contiguous x, and with explicit tiles for benchmarks."""
    return GroupedLaunch(x, weights, routing, activation, tiles)(x)


class PrefillLaunch:
    """How an FFN is launched for all numbers of tokens that take the same kernels: what they share is settled once.

    Args:
        x: hidden states [T, D] like those of the calls to come: of their dtype and device, and of a number of tokens
            with the same `variant`.
        weights: the projections, checked.
        routing: what decides on the experts, checked. In place of its logits a call may have others of their dtype,
            strides and alignment.
        activation: a key of `ACTIVATIONS`.
        tiles: of the kernel, by default those of the table.
    """

    def __init__(self, x: Tensor, weights: FfnWeights, routing: Routing, activation: str, tiles: Any = None):
        self.weights, self.routing, self.activation = weights, routing, activation
        self.neurons, self.experts = weights.up.size(0), routing.num_experts
        self.size = self.neurons // self.experts
        self._router_bias = routing.bias if routing.logits is None else None
        self._native = weights.up_scale is None and weights.gate_scale is None
        self._settle(x)
        self._tile(x, tiles)

    def _tile(self, x: Tensor, tiles: Any) -> None:
        """Settles what follows from the tiles."""
        raise NotImplementedError

    def _settle(self, x: Tensor) -> None:
        weights, routing = self.weights, self.routing
        self._masking: ReadyKernel | None = None
        self._router = None
        if routing.weight is not None and x.dtype == routing.dtype == routing.weight.dtype:
            self._router = routing.weight
        self._down, bias = None, weights.down_bias
        if weights.down_scale is None:
            self._down = weights.down.T
        self._plain_down = self._down is not None and (bias is None or bias.dtype == x.dtype)
        read = (*weights.flat(), routing.weight, routing.bias, routing.rounded)
        self._read = [tensor for tensor in read if tensor is not None]
        self._places = [tensor.data_ptr() for tensor in self._read]

    def __call__(self, x: Tensor, logits: Tensor | None = None) -> Tensor:
        """The output [T, D] for contiguous x [T, D]; logits [T, E] take the place of the routing's."""
        if [tensor.data_ptr() for tensor in self._read] != self._places:
            self._settle(x)  # for views of memory and kernels, whose form depends on its alignment
        return self.project_down(self.activations(x, logits))

    def activations(self, x: Tensor, logits: Tensor | None = None) -> Tensor:
        """The intermediate activations [T, F], zero where an expert is off."""
        raise NotImplementedError

    def router_products(self, x: Tensor, given: Tensor | None = None) -> Tensor:
        """Given logits, or the products of x and the router in its dtype, [T, E]."""
        routing = self.routing
        if routing.logits is not None:
            return routing.logits if given is None else given
        if self._router is not None:
            return functional.linear(x, self._router)
        assert routing.weight is not None
        dtype = torch.promote_types(x.dtype, routing.dtype)
        return functional.linear(x.to(dtype), routing.weight.to(routing.dtype).to(dtype)).to(routing.dtype)

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
        """The weights of gate and up [F, D] in the dtype of x; int8 ones are expanded."""
        weights = self.weights
        if self._native:
            return weights.gate, weights.up
        gate = None if weights.gate is None else floating_weight(weights, "gate", dtype)
        return gate, floating_weight(weights, "up", dtype)

    def _mask(
        self, tiles: ActivationTiles, experts: int, gate: Tensor | None, up: Tensor, logits: Tensor, h: Tensor
    ) -> None:
        """Writes the activations of the first so many experts into h [T, F], zero where they are off.

        Products of x with gate and up [T, experts S] have one row stride; all calls agree in tiles and experts.
        """
        tokens, weights, at_once = up.size(0), self.weights, tiles.block_f // self.size
        if self._masking is None:
            constants = {
                "E": experts, "S": self.size, "STRIDE": up.stride(0), "LOGIT_STRIDE": logits.stride(0),
                "H_STRIDE": h.stride(0), "BLOCK_T": tiles.block_t, "BLOCK_E": at_once,
                "ACTIVATION": self.activation, "SKIP": tiles.skip, "num_warps": tiles.warps,
            }  # fmt: skip
            self._masking = ReadyKernel(kernels.masked_activation_kernel, constants)
        self._masking(
            -(-tokens // tiles.block_t) * -(-experts // at_once), True, gate, up, weights.gate_bias, weights.up_bias,
            logits, self._router_bias, h, self.routing.threshold, tokens,
        )  # fmt: skip

    def project_down(self, h: Tensor) -> Tensor:
        """The output [T, D] of intermediate activations [T, F]."""
        bias = self.weights.down_bias
        if self._plain_down:
            return functional.linear(h, self._down, bias)  # type: ignore[arg-type]
        down = floating_weight(self.weights, "down", h.dtype)
        return functional.linear(h, down.T, None if bias is None else bias.to(h.dtype))


class MaskedLaunch(PrefillLaunch):
    """The path `masked`; see `PrefillLaunch`."""

    def _tile(self, x: Tensor, tiles: ActivationTiles | None) -> None:
        tokens = x.size(0)
        self.tiles = fit_activation(tiles or activation_tiles(tokens), tokens, self.experts, self.size)

    def _settle(self, x: Tensor) -> None:
        super()._settle(x)
        self._at_once = _rows_at_once(self.weights, self.routing) if _is_stacked(self.weights) else None
        self._skinny: SkinnyProduct | None = None
        if self._at_once is None:
            return
        inputs, total = self.neurons if self.weights.gate is None else 2 * self.neurons, self._at_once.size(0)
        self._with_router = total > inputs
        parts = [self.neurons] * (inputs // self.neurons)
        if self._with_router:
            parts += [self.experts, total - inputs - self.experts]
        self._parts = parts
        tiles = skinny_tiles(x, self._at_once)
        if tiles is not None:
            self._skinny = SkinnyProduct(x, self._at_once, tiles)

    def activations(self, x: Tensor, logits: Tensor | None = None) -> Tensor:
        """The intermediate activations [T, F], zero where an expert is off."""
        return self.mask(*self.project(x, logits))

    def project(self, x: Tensor, logits: Tensor | None = None) -> tuple[Tensor | None, Tensor, Tensor]:
        """Products of x with gate and up, [T, F] with one row stride, and logits [T, E] without the router's bias."""
        if self._at_once is None:
            gate, up = self.inputs(x.dtype)
            products = None if gate is None else functional.linear(x, gate)
            return products, functional.linear(x, up), self.router_products(x, logits)
        if self._with_router:
            self.routing.rounded_weight()
        # By cuBLAS except where `skinny_product_kernel` is faster.
        skinny = self._skinny
        both = functional.linear(x, self._at_once) if skinny is None else skinny(x, self._at_once)
        gated, parts = self.weights.gate is not None, both.split_with_sizes(self._parts, 1)
        own = parts[1 + gated] if self._with_router else self.router_products(x, logits)
        return parts[0] if gated else None, parts[gated], own

    def mask(self, gate: Tensor | None, up: Tensor, logits: Tensor) -> Tensor:
        """The intermediate activations [T, F] from the products of `project`."""
        h = up.new_empty((up.size(0), self.neurons))
        self._mask(self.tiles, self.experts, gate, up, logits, h)
        return h


class GroupedLaunch(PrefillLaunch):
    """The path `grouped`; see `PrefillLaunch`."""

    def _tile(self, x: Tensor, tiles: GroupedTiles | None) -> None:
        tiles = fit_grouped(tiles or grouped_tiles(x), x.size(1))
        self.programs = multiprocessors(x.device) * tiles.per_sm
        columns = self.size if self.weights.gate is None else 2 * self.size
        self.core = self.routing.core
        self._core_tiles = _core_tiles(x.size(0), self.core, self.size)
        self._constants = {
            "D": x.size(1), "E": self.experts, "S": self.size, "P": self.programs,
            "E_PAD": triton.next_power_of_2(self.experts), "N": max(columns, 16), "BLOCK_T": tiles.block_t,
            "BLOCK_K": tiles.block_k, "ACTIVATION": self.activation, "STAGES": tiles.stages,
            "DOT_DTYPE": dot_dtype(x), "num_warps": tiles.warps,
        }  # fmt: skip

    def _settle(self, x: Tensor) -> None:
        super()._settle(x)
        self._listing: ReadyKernel | None = None
        self._grouping: ReadyKernel | None = None

    def activations(self, x: Tensor, logits: Tensor | None = None) -> Tensor:
        """The intermediate activations [T, F], zero where an expert is off."""
        h, counts = self.zeros(x)
        gate, up = self.inputs(x.dtype)
        logits = self.router_products(x, logits)
        if self.core < self.experts:
            self.group(x, gate, up, counts, self.list_tokens(counts, logits), h)
        if self.core:
            self.compute_core(x, gate, up, logits, h)
        return h

    def zeros(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Zeros for the activations [T, F] and, as int32 of E numbers or more, for the number of tokens of experts."""
        # One memory, which is filled once: a row holds the numbers of all its experts, as they have 8 neurons or more.
        tokens = x.size(0)
        h, row = x.new_zeros((tokens + 1, self.neurons)).split_with_sizes((tokens, 1))
        return h, row.view(torch.int32)

    def list_tokens(self, counts: Tensor, logits: Tensor) -> Tensor:
        """Writes into `counts` how many tokens each expert has; which, in the first places of [E, T] int32.

        Experts of the core keep their count, 0. Logits [T, E] are without the router's bias.
        """
        tokens = logits.size(0)
        lists = torch.empty((self.experts, tokens), dtype=torch.int32, device=logits.device)
        if self._listing is None:
            constants = {"E": self.experts, "FIRST": self.core, "LOGIT_STRIDE": logits.stride(0)}
            constants |= {"BLOCK_T": LIST_TOKENS, "BLOCK_E": LIST_EXPERTS, "num_warps": 4}
            self._listing = ReadyKernel(kernels.list_tokens_kernel, constants)
        programs = -(-tokens // LIST_TOKENS) * -(-(self.experts - self.core) // LIST_EXPERTS)
        self._listing(programs, True, logits, self._router_bias, counts, lists, self.routing.threshold, tokens)
        return lists

    def group(self, x: Tensor, gate: Tensor | None, up: Tensor, counts: Tensor, lists: Tensor, h: Tensor) -> Tensor:
        """Writes the activations of the pairs of token and expert in `lists` into h [T, F], and gives it back."""
        weights, aligned = self.weights, x.data_ptr() % 16 == 0
        if self._grouping is None:
            self._grouping = ReadyKernel(kernels.grouped_kernel, self._constants)
        self._grouping(
            self.programs, aligned, x, gate, up, weights.gate_bias, weights.up_bias, counts, lists, h, x.size(0)
        )
        return h

    def compute_core(self, x: Tensor, gate: Tensor | None, up: Tensor, logits: Tensor, h: Tensor) -> None:
        """Writes the activations of the core into h [T, F], by dense products; zeros for tokens that leave it.

        Logits [T, E] are without the router's bias.
        """
        assert self._core_tiles is not None
        rows = self.core * self.size
        products = None if gate is None else functional.linear(x, gate[:rows])
        self._mask(self._core_tiles, self.core, products, functional.linear(x, up[:rows]), logits, h)


class SkinnyProduct:
    """x [T, K] times the transpose of contiguous weights [N, K], for few tokens; x is contiguous, too."""

    def __init__(self, x: Tensor, weight: Tensor, tiles: SkinnyTiles):
        (tokens, hidden), self.rows = x.shape, weight.size(0)
        tiles = fit_skinny(tiles, hidden)
        per_program = skinny_rows(tiles, self.rows, multiprocessors(x.device))
        self.programs = triton.cdiv(self.rows, per_program)
        self._kernel = ReadyKernel(
            kernels.skinny_product_kernel,
            {
                "N": self.rows, "K": hidden, "ROWS": per_program, "BLOCK_T": _skinny_block(tokens),
                "BLOCK_N": tiles.block_n, "BLOCK_K": tiles.block_k, "X_FIRST": tiles.x_first, "STAGES": tiles.stages,
                "DOT_DTYPE": dot_dtype(x), "num_warps": tiles.warps,
            },
        )  # fmt: skip

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """The product [T, N]."""
        out = x.new_empty((x.size(0), self.rows))
        self._kernel(self.programs, x.data_ptr() % 16 == 0, x, weight, out, x.size(0))
        return out


def _core_tiles(tokens: int, core: int, size: int) -> ActivationTiles | None:
    """How the first `core` experts of so many neurons are set to zero where they are off; `None` without a core."""
    return fit_activation(activation_tiles(tokens), tokens, core, size) if core else None


def _rows_at_once(weights: FfnWeights, routing: Routing) -> Tensor:
    """The rows of `stacked` that one product takes: gate and up, and the router where it follows them."""
    assert weights.stacked is not None
    rows = len(weights.up) if weights.gate is None else 2 * len(weights.up)
    own = routing.weight if routing.rounded is None else routing.rounded
    with_router = routing.logits is None and _is_at(own, weights.stacked, rows)
    return weights.stacked if with_router else weights.stacked[:rows]


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
