"""Sums over the processes of a training, with gradients: what is about a whole batch is about all of its parts.

Where losses are averaged over processes, as gradients are, a loss of the sums of all has the gradient of one process
with the whole batch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _SumOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        # Every process has a loss of the sum; each part has a gradient in all of them.
        gradient = grad_outputs[0].clone()
        dist.all_reduce(gradient)
        return gradient


def num_sharing() -> int:
    """How many processes share a batch; 1 where none is started."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum of a tensor of one shape over all processes, all of which must call this; itself where there is one."""
    return tensor if num_sharing() == 1 else _SumOverProcesses.apply(tensor)
