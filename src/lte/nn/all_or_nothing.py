"""Changes of a model that are made as a whole, or not at all."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lte.nn.shards import local, place_

Undo = Callable[[], object]


class _Open(threading.local):
    """What undoes the changes so far of the innermost block that is open in a thread."""

    undo: list[Undo] | None = None


_OPEN = _Open()


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Puts a model back as it was if the block ends in an exception of any kind, an interruption included.

    That is: which modules it has, their classes, attributes and hooks, and which parameters and buffers. Numbers that
    are written into tensors, or tensors that are put into parameters, are undone by what `on_failure` was given.
    """
    kept = [(module, type(module), dict(vars(module)), _contents(module)) for module in model.modules()]
    outer, undo = _OPEN.undo, list[Undo]()
    _OPEN.undo = undo
    try:
        yield
    except BaseException:
        _OPEN.undo = None
        for module, kind, attributes, contents in kept:
            _put_back(module, kind, attributes, contents)
        for action in reversed(undo):
            action()
        raise
    else:
        if outer is not None:
            outer += undo
    finally:
        _OPEN.undo = outer


def on_failure(action: Undo) -> None:
    """Has `action` called when `all_or_nothing` puts modules back, in the innermost open block or one around it."""
    if _OPEN.undo is not None:
        _OPEN.undo.append(action)


def keep_data(parameters: Iterable[nn.Parameter]) -> None:
    """Has parameters get back on failure the tensors that they hold now, and whether they were trained.

    The tensors of a GPU are kept in the memory of the host: there they would take what the change is to free.
    """
    held = [(p, local(p).detach()) for p in parameters]
    kept = [(p, data.cpu() if p.is_cuda else data, p.device, p.requires_grad, p.grad) for p, data in held]

    def put_back() -> None:
        for parameter, data, device, trained, grad in kept:
            parameter.grad = None
            parameter.requires_grad_(False)
            place_(parameter, data.to(device))
            parameter.requires_grad_(trained)
            parameter.grad = grad

    on_failure(put_back)


def keep_numbers(tensors: Iterable[Tensor]) -> None:
    """Has tensors get back on failure the numbers that they hold now; these are copied."""
    if _OPEN.undo is None:
        return
    kept = [(tensor, tensor.detach().clone()) for tensor in tensors]

    @torch.no_grad()
    def put_back() -> None:
        for tensor, numbers in kept:
            tensor.copy_(numbers)

    on_failure(put_back)


def _contents(module: nn.Module) -> dict[str, Any]:
    """Copies of the dictionaries, sets and lists that a module holds: its parameters, buffers, submodules and hooks."""
    held = ((name, value) for name, value in vars(module).items() if isinstance(value, dict | set | list))
    return {name: value.copy() for name, value in held}


def _put_back(module: nn.Module, kind: type, attributes: dict[str, Any], contents: dict[str, Any]) -> None:
    module.__class__ = kind
    vars(module).clear()
    vars(module).update(attributes)
    for name, content in contents.items():
        # In place, as the handles of hooks know their dictionary.
        held = attributes[name]
        held.clear()
        held.extend(content) if isinstance(held, list) else held.update(content)
