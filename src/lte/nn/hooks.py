"""Looking at what modules get."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from torch import nn

K = TypeVar("K")


@contextmanager
def before_each_call(modules: Mapping[K, nn.Module], action: Callable[[K, tuple[Any, ...]], object]) -> Iterator[None]:
    """Calls `action(key, args)` before each call of each module in the block; for eager calls of this thread only."""
    thread = threading.get_ident()

    def hook(key: K, module: nn.Module, args: tuple[Any, ...]) -> None:
        if threading.get_ident() == thread:
            action(key, args)

    handles = [module.register_forward_pre_hook(partial(hook, key)) for key, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
