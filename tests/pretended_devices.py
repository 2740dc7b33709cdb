"""Tensors of the CPU that pretend to lie on GPUs, and refuse what real ones would: devices that are mixed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

CPU, FIRST, SECOND = torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)
# What takes tensors of several devices, and what takes indices of the CPU.
_COPIES, _INDEXES = {"copy_", "_to_copy"}, {"index", "index_put_", "_index_put_impl_"}
# By the place of a storage, which is kept so that no other gets it.
_places: dict[int, tuple[Any, torch.device]] = {}


def place_of(tensor: Tensor) -> torch.device:
    """Where a tensor pretends to lie."""
    return _places.get(tensor.untyped_storage()._cdata, (None, CPU))[1]


def pretend_(tensors: Tensor | list[Tensor], device: torch.device) -> None:
    """Has tensors, and all views of them, pretend to lie on a device."""
    for tensor in [tensors] if isinstance(tensors, Tensor) else tensors:
        storage = tensor.untyped_storage()
        _places[storage._cdata] = storage, device


def tensors_of(module: nn.Module) -> list[Tensor]:
    """All parameters and buffers."""
    return [*module.parameters(), *module.buffers()]


class _Operators(TorchDispatchMode):
    """Refuses mixed devices in each operator, those of backward passes included; results lie where it ran."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        # The CPU's single numbers go everywhere.
        places = [place_of(each) for each in given if each.ndim or place_of(each) != CPU]
        if name in _COPIES:
            places = places[:1]
        elif name in _INDEXES and places and places[0] != CPU:
            places = [place for place in places if place != CPU]
        # Of several devices PyTorch makes groups of tensors, by where they really lie.
        if not name.startswith(("_foreach", "_fused")) and len(set(places)) > 1:
            raise RuntimeError(f"Expected all tensors to be on the same device, but {name} got {places}")
        found = func(*args, **(kwargs or {}))
        before = {each.untyped_storage()._cdata for each in given}
        made = [each for each in tree_leaves(found) if isinstance(each, Tensor)]
        sources = args[0] if name.startswith("_foreach") else ()
        where = [place_of(each) for each in sources] or [(places or [CPU])[0]] * len(made)
        for each, place in zip(made, where, strict=False):
            if each.untyped_storage()._cdata not in before:
                pretend_(each, place)
        return found


class _Moved(torch.autograd.Function):
    """A copy on another device."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, device: torch.device) -> Tensor:
        ctx.place, found = place_of(tensor), tensor.clone()
        pretend_(found, device)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        found = gradients[0].clone()
        pretend_(found, ctx.place)
        return found, None


class _Calls(TorchFunctionMode):
    """Has devices that calls name be pretended ones."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            return place_of(args[0])
        if func is Tensor.pin_memory:
            return args[0]
        if func in (Tensor.to, Tensor.cpu):
            return _moved(args[0], [*args[1:], *kwargs.values()], CPU if func is Tensor.cpu else None)
        device = kwargs.pop("device", None)
        found = func(*args, **kwargs)
        if name == "new_tensor":
            device = place_of(args[0])
        if device is not None and isinstance(found, Tensor):
            pretend_(found, torch.device(device))
        return found


def _moved(tensor: Tensor, wanted: list[Any], device: torch.device | None) -> Tensor:
    """`Tensor.to`."""
    for each in wanted:
        if isinstance(each, Tensor):
            device, tensor = place_of(each), tensor.to(each.dtype)
        elif isinstance(each, torch.dtype):
            tensor = tensor.to(each)
        elif isinstance(each, str | torch.device):
            device = torch.device(each)
    return tensor if device in (None, place_of(tensor)) else _Moved.apply(tensor, device)


@contextmanager
def pretended_devices() -> Iterator[None]:
    """Inside the block tensors may pretend; those of the CPU that do not lie there."""
    with _Operators(), _Calls():
        try:
            yield
        finally:
            _places.clear()


def spread_(model: Any) -> None:
    """Puts the first half of a decoder's layers on one GPU and the others on a second one, as a `device_map` does."""
    layers = list(model.model.layers)
    pretend_(tensors_of(model), FIRST)
    for module in (*layers[len(layers) // 2 :], model.model.norm, model.lm_head):
        pretend_(tensors_of(module), SECOND)
        module.register_forward_pre_hook(
            lambda module, args, kwargs: tree_map_only(Tensor, lambda each: each.to(SECOND), (args, kwargs)),
            with_kwargs=True,
        )
    model.register_forward_hook(lambda module, args, output: tree_map_only(Tensor, lambda each: each.to(FIRST), output))
    model.hf_device_map = {"first": 0, "second": 1}


def offload_(model: nn.Module, units: list[nn.Module]) -> None:
    """Has the weights of a model lie on the CPU but while it computes, as FSDP's do that are offloaded."""
    pretend_(list(model.buffers()), FIRST)
    for unit in (*units, model):
        own = list(unit.parameters())
        unit.register_forward_pre_hook(lambda module, args, own=own: pretend_(own, FIRST))
        unit.register_forward_hook(lambda module, args, output, own=own: pretend_(own, CPU))
