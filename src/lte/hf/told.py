"""What a device tells the host without being waited for."""

from __future__ import annotations

import torch
from torch import Tensor


def runs_ahead(device: torch.device) -> bool:
    """Whether the next step begins before the host knows if there is one: GPUs would wait for it, CPUs compute it."""
    return device.type == "cuda"


class Told:
    """Whole numbers of each step, which a GPU copies before the step that follows: the host waits for no more.

    Args:
        count: how many.
        like: a tensor on the device.
    """

    def __init__(self, count: int, like: Tensor):
        self._stream = torch.cuda.current_stream(like.device) if like.is_cuda else None
        self._event = torch.cuda.Event() if like.is_cuda else None
        self._memory = torch.empty(count, dtype=torch.int64, device="cpu", pin_memory=like.is_cuda)

    def tell(self, numbers: Tensor) -> None:
        """Sends the numbers [count] of a step on their way; those before must have been waited for."""
        self._memory.copy_(numbers, non_blocking=True)
        if self._event is not None:
            self._event.record(self._stream)

    def wait(self) -> Tensor:
        """The numbers, in memory of their own."""
        if self._event is not None:
            self._event.synchronize()
        return self._memory.clone()
