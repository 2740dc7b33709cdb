"""The counters by which the programs of a kernel wait for each other: zero before and after every launch."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

WORDS = 1024
STREAMS = 64


@functools.cache
def _counters(device: torch.device) -> Tensor:
    return torch.zeros(STREAMS, WORDS, dtype=torch.int32, device=device)


@functools.cache
def _slots(device: torch.device) -> dict[int, int]:
    return {}


def workspace(device: torch.device) -> Tensor:
    """The counters [WORDS] of the current stream, zero; launches on other streams have others.

    They are allocated at the first call, which should not be inside the capture of a CUDA graph: `accelerate_` makes
    it. Two graphs that were captured on one stream share counters, so they must not be replayed at the same time.
    """
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    slots = _slots(device)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    slot = slots.setdefault(stream, len(slots) % STREAMS)
    return _counters(device)[slot]
