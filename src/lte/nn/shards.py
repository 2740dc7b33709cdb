"""Parameters of which each process holds a part: those of FSDP2 (`DTensor`) and of DeepSpeed's ZeRO.

What reads or sets a parameter outside of its module's forward pass goes through here; of a parameter that lies whole in
this process it does what plain PyTorch does. All processes must call with the same parameters in the same order.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor lies in parts: of FSDP2 or tensor parallelism, or of ZeRO-3."""
    return isinstance(tensor, DTensor) or hasattr(tensor, "ds_id")


def whole_shape(tensor: Tensor) -> torch.Size:
    """The shape of a tensor with all of its parts; a parameter of ZeRO-3 is empty outside of passes."""
    return getattr(tensor, "ds_shape", tensor.shape)


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """A tensor with all of its parts, without a gradient; itself where it is not in parts."""
    if isinstance(tensor, DTensor):
        detached: Any = tensor.detach()
        return detached.full_tensor()
    if hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, its very memory; the tensor itself where it is not in parts."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def place_(parameter: Tensor, values: Tensor) -> None:
    """Makes a parameter, or this process's part of it, a view of values of the same shape that lie elsewhere."""
    if isinstance(parameter, DTensor):
        parameter._local_tensor = values.detach()
    else:
        parameter.data = values


@torch.no_grad()
def assign_(parameter: Tensor, value: Tensor) -> None:
    """Sets a parameter to a whole tensor of its shape, in place; of one in parts every process keeps its own.

    Parts are those of one tensor, that of the first process of the parameter's mesh: what others have computed may be
    as good and not fit to it, singular vectors of another sign, say.

    DeepSpeed's optimiser has a copy in fp32 of what it trains, from which it makes the parameter after each step: that
    one is set, too.
    """
    if isinstance(parameter, DTensor):
        value = value.to(parameter.dtype)
        parameter.copy_(distribute_tensor(value, parameter.device_mesh, parameter.placements))
        return
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(value)
    else:
        parameter.copy_(value)
    if hasattr(parameter, "_hp_mapping") or hasattr(parameter, "_z3_optimizer"):
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(parameter, whole(parameter).float())


@torch.no_grad()
def scale_and_shift_(parameter: Tensor, factor: float, shift: Tensor | float) -> None:
    """parameter = factor * parameter + shift, in place; the shift is one number."""
    if isinstance(parameter, DTensor):
        parameter.mul_(factor).add_(float(shift))
    elif hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        assign_(parameter, whole(parameter) * factor + shift)
    else:
        parameter.mul_(factor).add_(shift.to(parameter.device) if isinstance(shift, Tensor) else shift)


def agreed(numbers: Sequence[float], parameter: Tensor) -> list[float]:
    """Numbers that all processes go by: those of the first one where a parameter lies in parts.

    The last bits of sums may differ between devices. Where one process went another way than the others, they would
    wait for each other for ever.
    """
    if not is_sharded(parameter) or not dist.is_initialized():
        return list(numbers)
    # As objects, which PyTorch sends from a device that the backend knows: NCCL alone knows no tensors of a CPU.
    found = [list(numbers)]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def whole_state(model: nn.Module, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """The weights of a sharded model on the CPU, in the first process; the others get nothing.

    Args:
        model: all processes must call with.
        names: of weights in its state; `None` takes all.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if names is not None and name not in names:
            continue
        gathered = whole(tensor)
        if dist.get_rank() == 0:
            found[name] = gathered.detach().to("cpu", copy=True)
    return found
