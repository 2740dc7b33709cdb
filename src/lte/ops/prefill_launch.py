"""How the kernels for many tokens are launched: fixed tables of tile sizes, never tuned while a program runs.

`benchmarks/prefill.py --tune` measures candidates; its winners are written into the tables by hand.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from lte.ops.launch import architecture, interpreted


@dataclass(frozen=True, kw_only=True)
class ActivationTiles:
    """Tile sizes of `masked_activation_kernel`.

    Attributes:
        block_t: tokens of a program.
        block_f: neurons of a program.
        warps: warps of a program.
        skip: whether the products of inactive experts are not read; their readers then wait for the logits first.
    """

    block_t: int = 4
    block_f: int = 512
    warps: int = 4
    skip: bool = False


@dataclass(frozen=True, kw_only=True)
class GroupedTiles:
    """Tile sizes of `grouped_kernel`.

    Attributes:
        block_t: tokens of one expert that a program takes at a time.
        block_k: columns of D that it takes at a time.
        warps: warps of a program.
        stages: depth of its asynchronous copies.
        per_sm: programs per multiprocessor.
    """

    block_t: int = 128
    block_k: int = 64
    warps: int = 4
    stages: int = 4
    per_sm: int = 2


@dataclass(frozen=True, kw_only=True)
class SkinnyTiles:
    """Tile sizes of `skinny_product_kernel`.

    Attributes:
        block_n: rows of the weight that a program takes at most.
        block_k: columns of D that it takes at a time.
        warps: warps of a program; fewer than 4 use the tensor cores without warp groups.
        stages: depth of its asynchronous copies.
        per_sm: programs per multiprocessor that share the rows equally; 0 for `block_n` rows each, however many
            programs that makes.
        x_first: whether x is the first factor of the tensor cores, not the weight.
    """

    block_n: int = 64
    block_k: int = 128
    warps: int = 4
    stages: int = 3
    per_sm: int = 0
    x_first: bool = False


# Of `list_tokens_kernel`: tokens and experts of a program.
LIST_TOKENS, LIST_EXPERTS = 128, 16

# (up to as many tokens, tiles), the last row for all others. Products of up to 256 tokens lie in the L2 cache, where
# leaving reads out gains little.
_ACTIVATION: tuple[tuple[int, ActivationTiles], ...] = (
    (8, ActivationTiles(block_t=1)),
    (256, ActivationTiles()),
    (1024, ActivationTiles(block_t=2, skip=True)),
    (2**31, ActivationTiles(block_t=1, block_f=1024, warps=2, skip=True)),
)

# An expert is expected to get one token of so many.
_TOKENS_FOR_ONE = 10
# (architecture, bytes per number) -> (up to as many tokens per expert, tiles); an architecture without rows takes
# those of the next older.
_GROUPED_16 = (
    (32, GroupedTiles(block_t=32)),
    (64, GroupedTiles(block_t=64, per_sm=3)),
    (2**31, GroupedTiles(warps=8)),
)
_GROUPED_32 = ((2**31, GroupedTiles(block_t=32, block_k=32, stages=2)),)
_GROUPED: dict[tuple[int, int], tuple[tuple[int, GroupedTiles], ...]] = {
    (arch, size): _GROUPED_32 if size == 4 else _GROUPED_16 for arch in (80, 90) for size in (2, 4)
}

# (architecture, bytes per number) -> (up to as many tokens, tiles, or `None` for cuBLAS). What cuBLAS takes differs by
# architecture, so one without a row keeps it. Shared memory holds all programs of a multiprocessor at once.
_SKINNY: dict[tuple[int, int], tuple[tuple[int, SkinnyTiles | None], ...]] = {
    (90, 2): (
        (32, SkinnyTiles()),
        (64, SkinnyTiles(block_k=64, per_sm=4)),
        (2**31, None),
    ),
}
# Rows of the weight from which on programs of whole rows of K fill a GPU; below, cuBLAS may split K.
SKINNY_MIN_ROWS = 16384


def last_tokens() -> set[int]:
    """Numbers of tokens after which the next number may take another kernel, for each device and dtype."""
    grouped = {_TOKENS_FOR_ONE * limit for rows in _GROUPED.values() for limit, _ in rows}
    skinny = {limit for rows in _SKINNY.values() for limit, tiles in rows if tiles is not None}
    # The room of a program of `skinny_product_kernel` grows by powers of two.
    powers = {2**power for power in range(max(skinny).bit_length())}
    return {limit for limit, _ in _ACTIVATION} | grouped | skinny | powers


def activation_tiles(tokens: int) -> ActivationTiles:
    """The tiles for T tokens."""
    return next(tiles for limit, tiles in _ACTIVATION if tokens <= limit)


def fit_activation(tiles: ActivationTiles, tokens: int, experts: int, expert_size: int) -> ActivationTiles:
    """The tiles made no larger than the matrix, and no smaller than an expert."""
    widest = triton.next_power_of_2(experts) * expert_size
    return replace(
        tiles,
        block_t=min(tiles.block_t, triton.next_power_of_2(tokens)),
        block_f=max(min(tiles.block_f, widest), expert_size),
    )


def grouped_tiles(x: Tensor) -> GroupedTiles:
    """The tiles for x [T, D]."""
    arch = max((known for known, _ in _GROUPED if known <= architecture(x.device)), default=80)
    return next(tiles for limit, tiles in _GROUPED[arch, x.element_size()] if len(x) <= _TOKENS_FOR_ONE * limit)


def fit_grouped(tiles: GroupedTiles, hidden: int) -> GroupedTiles:
    """The tiles made no larger than the matrices, and large enough for tensor cores."""
    return replace(tiles, block_k=min(tiles.block_k, max(triton.next_power_of_2(hidden), 16)))


def skinny_tiles(x: Tensor, weight: Tensor) -> SkinnyTiles | None:
    """The tiles for x [T, K] times a weight [N, K], `None` where the product is left to cuBLAS."""
    # Rows of other lengths are not aligned to the 16 bytes of a copy.
    if len(weight) < SKINNY_MIN_ROWS or weight.shape[1] % 8 or x.dtype != weight.dtype:
        return None
    rows = _SKINNY.get((architecture(x.device), x.element_size()), ())
    return next((tiles for limit, tiles in rows if len(x) <= limit), None)


def fit_skinny(tiles: SkinnyTiles, hidden: int) -> SkinnyTiles:
    """The tiles made no larger than the matrices, and large enough for tensor cores."""
    return replace(tiles, block_k=min(tiles.block_k, max(triton.next_power_of_2(hidden), 16)))


def skinny_rows(tiles: SkinnyTiles, rows: int, multiprocessors: int) -> int:
    """Of a weight's N rows, how many each program takes: at most `block_n`, a multiple of 8."""
    if not tiles.per_sm:
        return tiles.block_n
    programs = multiprocessors * tiles.per_sm
    rounds = triton.cdiv(rows, programs * tiles.block_n)
    return 8 * triton.cdiv(rows, 8 * programs * rounds)


def dot_dtype(x: Tensor) -> tl.dtype:
    """The dtype in which tensor cores multiply numbers of the dtype of x."""
    if x.dtype == torch.float16:
        return tl.float16
    # The interpreter computes tl.dot in bf16 wrongly, without an error.
    return tl.bfloat16 if x.dtype == torch.bfloat16 and not interpreted() else tl.float32
