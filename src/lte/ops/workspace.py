"""By what the programs of a kernel wait for each other: memory that outlives the launch."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

COUNTERS = 1024
MAX_EXPERTS = 4096
STREAMS = 64


@dataclass(frozen=True)
class Workspace:
    """The memory of one stream.

    Attributes:
        counters: int32 [COUNTERS]: the barrier's, that of programs which are past it, the tag of the next launch, an
            unused one, and one per tile of columns; all but the tag are zero between launches.
        masks: int64 [MAX_EXPERTS]: which tokens each expert is active for, under the tag of the launch that wrote it.
    """

    counters: Tensor
    masks: Tensor


@functools.cache
def _all_streams(device: torch.device) -> list[Workspace]:
    counters = torch.zeros(STREAMS, COUNTERS, dtype=torch.int32, device=device)
    counters[:, 2] = 1
    masks = torch.zeros(STREAMS, MAX_EXPERTS, dtype=torch.int64, device=device)
    return [Workspace(*parts) for parts in zip(counters, masks, strict=True)]


@functools.cache
def _slots(device: torch.device) -> dict[int, int]:
    return {}


def workspace(device: torch.device) -> Workspace:
    """The workspace of the current stream.

    All are allocated at the first call, which must not be inside the capture of a CUDA graph: `accelerate_` makes it.
    Two graphs that were captured on one stream share a workspace, so they must not be replayed at the same time.
    """
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    slots = _slots(device)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    slot = slots.setdefault(stream, len(slots) % STREAMS)
    return _all_streams(device)[slot]
