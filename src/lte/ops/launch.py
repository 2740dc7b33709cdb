"""How the decode kernels are launched: fixed tables of tile sizes, never tuned while a program runs.

`benchmarks/decode_kernel.py --tune` measures candidates; its winners are written into the tables by hand.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from lte.ops.arguments import MAX_TOKENS

# Programs in Triton's interpreter and in kernels that are compiled for a GPU that is not there.
_FEW_PROGRAMS = 6


@dataclass(frozen=True, kw_only=True)
class OneTokenTiles:
    """Tile sizes of `decode_one_kernel`.

    Attributes:
        block_n: neurons of one expert that a program takes at a time.
        warps: warps of a program.
        stages: depth of its asynchronous copies; 1 loads to registers.
        per_sm: programs per multiprocessor; all must run at once.
        dependent: whether it begins while the kernel before it ends (programmatic dependent launch, sm_90 and later).
    """

    block_n: int = 2
    warps: int = 8
    stages: int = 3
    per_sm: int = 1
    dependent: bool = False


@dataclass(frozen=True, kw_only=True)
class ManyTokenTiles:
    """Tile sizes of `decode_many_kernel`.

    Attributes:
        block_n: neurons that a program takes at a time in gate and up, at most those of an expert.
        block_k: columns of D that it takes at a time there.
        block_d: columns of D of a tile of the down projection, for experts of 32 neurons.
        share: neurons of which a program takes a multiple in gate and up.
        span: whether those that it takes at a time may be of two experts; without, they are of one.
        prefetch: of how many experts, a power of two or 0, it asks for its part of the down projection while it waits
            for the others' gate and up.
        warps: warps of a program.
        stages: depth of the asynchronous copies in gate and up; 1 loads to registers.
        down_stages: the same in the down projection.
        per_sm: programs per multiprocessor; all must run at once.
        dependent: whether it begins while the kernel before it ends (programmatic dependent launch, sm_90 and later).
    """

    block_n: int = 32
    block_k: int = 256
    block_d: int = 128
    share: int = 16
    span: bool = False
    prefetch: int = 0
    warps: int = 4
    stages: int = 4
    down_stages: int = 8
    per_sm: int = 1
    dependent: bool = False


_ONE = OneTokenTiles()
_MANY = ManyTokenTiles()
_MANY_FP32 = replace(_MANY, block_n=16, block_k=64, block_d=32, stages=2, down_stages=3)
# results/decode_kernel/equal_shares_4_and_8_tokens.txt: 4 and 8 tokens of LLaMA2-7B's widths on an H200.
_MANY_EQUAL = replace(_MANY, share=1, span=True, prefetch=4)

# (architecture, bytes per weight); an architecture without rows takes those of the next older.
_ONE_TOKEN: dict[tuple[int, int], OneTokenTiles] = {
    (arch, size): replace(_ONE, dependent=arch >= 90) for arch in (80, 90) for size in (1, 2, 4)
}
_MANY_TOKENS: dict[tuple[int, int], ManyTokenTiles] = {
    (arch, size): replace(_MANY_FP32 if size == 4 else _MANY, dependent=arch >= 90)
    for arch in (80, 90)
    for size in (1, 2, 4)
} | {(90, 2): replace(_MANY_EQUAL, dependent=True)}


def interpreted() -> bool:
    """Whether Triton runs its kernels in its interpreter, on tensors of any device."""
    return bool(triton.knobs.runtime.interpret)


def architecture(device: torch.device) -> int:
    """The compute capability as one number, 90 for an H100; 80 in the interpreter."""
    if interpreted() or device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    if interpreted() or device.type != "cuda":
        return _FEW_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count


def check_device(x: Tensor) -> None:
    """Raises a `ValueError` unless Triton can run on the device of x."""
    if not (interpreted() or x.is_cuda):
        raise ValueError(f"x must be on a CUDA device, got x={x.device}; SparseFfn computes the same on a CPU")


def _row(weight: Tensor) -> tuple[int, int]:
    arch = max((known for known, _ in _ONE_TOKEN if known <= architecture(weight.device)), default=80)
    return arch, weight.element_size()


def one_token_tiles(weight: Tensor, expert_size: int) -> OneTokenTiles:
    """The tiles for weights [F, D] of one expert size S."""
    tiles = _ONE_TOKEN[_row(weight)]
    # The table is for D = 4096: narrower rows are taken more at a time, in the same memory.
    columns = triton.next_power_of_2(weight.shape[1])
    return replace(tiles, block_n=min(max(tiles.block_n * 4096 // columns, 1), expert_size, 16))


def many_token_tiles(weight: Tensor, tokens: int, expert_size: int) -> ManyTokenTiles:
    """The tiles for weights [F, D] of one expert size S, and 2 to `MAX_TOKENS` tokens."""
    assert tokens <= MAX_TOKENS
    return fit_many(_MANY_TOKENS[_row(weight)], weight.shape[1], expert_size)


def fit_many(tiles: ManyTokenTiles, hidden: int, expert_size: int) -> ManyTokenTiles:
    """The tiles made no larger than the matrices; a tile of the down projection keeps its bytes."""
    columns = max(triton.next_power_of_2(hidden), 16)
    block_d = max(tiles.block_d * 32 // max(expert_size, 16), 16)
    return replace(
        tiles,
        block_n=min(tiles.block_n, expert_size),
        share=min(tiles.share, expert_size),
        block_k=min(tiles.block_k, columns),
        block_d=min(block_d, columns),
    )
