"""How the kernels are launched: fixed tables of tile sizes, never tuned while a program runs.

`benchmarks/decode_kernel.py --tune` measures candidates; its winners are written into the table by hand.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from lte.ops.arguments import MAX_TOKENS


@dataclass(frozen=True, kw_only=True)
class DecodeTiles:
    """Tile sizes of the decode kernels.

    Attributes:
        block_n: neurons per program of `gate_up_kernel`.
        block_k: columns of D that it takes at a time.
        gate_up_warps: its warps.
        gate_up_stages: depth of its asynchronous copies; 1 loads to registers.
        block_d: columns of D per program of `down_kernel`, for experts of 32 neurons.
        splits: programs that share the active experts of one tile, a power of two.
        down_warps: its warps.
        down_stages: depth of its asynchronous copies.
        fused_router: whether `gate_up_kernel` computes the logits, or a launch of their own does.
        pdl: whether a kernel starts while the one before it drains (sm_90 and newer).
    """

    block_n: int = 8
    block_k: int = 512
    gate_up_warps: int = 4
    gate_up_stages: int = 1
    block_d: int = 256
    splits: int = 32
    down_warps: int = 4
    down_stages: int = 1
    fused_router: bool = True
    pdl: bool = False


_ONE = DecodeTiles()
_MANY = DecodeTiles(
    block_n=16, block_k=256, gate_up_stages=3, block_d=64, splits=8, down_stages=3, fused_router=False
)  # fmt: skip
_MANY_FP32 = replace(_MANY, block_k=64, gate_up_stages=2, block_d=32, down_stages=2)

# (architecture, bytes per weight, gated, one token); an architecture without rows takes those of the next older.
_TILES: dict[tuple[int, int, bool, bool], DecodeTiles] = {
    (arch, size, gated, one): replace(
        _ONE if one else _MANY_FP32 if size == 4 else _MANY,
        pdl=arch >= 90,
    )
    for arch in (80, 90)
    for size in (1, 2, 4)
    for gated in (False, True)
    for one in (False, True)
}


def interpreted() -> bool:
    """Whether Triton runs its kernels in its interpreter, on tensors of any device."""
    return bool(triton.knobs.runtime.interpret)


def architecture(device: torch.device) -> int:
    """The compute capability as one number, 90 for an H100; 80 in the interpreter."""
    if interpreted() or device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def check_device(x: Tensor) -> None:
    """Raises a `ValueError` unless Triton can run on the device of x."""
    if not (interpreted() or x.is_cuda):
        raise ValueError(f"x must be on a CUDA device, got x={x.device}; SparseFfn computes the same on a CPU")


def decode_tiles(weight: Tensor, gated: bool, tokens: int, expert_size: int) -> DecodeTiles:
    """The tiles for weights [F, D] of one expert size S, and 1 to `MAX_TOKENS` tokens."""
    assert tokens <= MAX_TOKENS
    arch = max((known for known, *_ in _TILES if known <= architecture(weight.device)), default=80)
    tiles = _TILES[arch, weight.element_size(), gated, tokens == 1]
    return fit_tiles(tiles, weight.shape[1], expert_size)


def fit_tiles(tiles: DecodeTiles, hidden: int, expert_size: int) -> DecodeTiles:
    """The tiles made no larger than the matrices; a program of `down_kernel` keeps its bytes per step."""
    columns = triton.next_power_of_2(hidden)
    block_d = max(tiles.block_d * 32 // max(expert_size, 16), 16)
    return replace(
        tiles,
        block_n=min(tiles.block_n, expert_size),
        block_k=min(tiles.block_k, max(columns, 16)),
        block_d=min(block_d, max(columns, 16)),
    )
