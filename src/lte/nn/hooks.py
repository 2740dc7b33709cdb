"""Looking at what modules get."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from torch import nn

K = TypeVar("K")


class Look:
    """A hook that looks at what a module gets in this thread, and changes nothing."""

    def __init__(self, key: K, action: Callable[[K, tuple[Any, ...]], object]):
        self.action, self.thread = partial(action, key), threading.get_ident()

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if threading.get_ident() == self.thread:
            self.action(args)


@contextmanager
def before_each_call(modules: Mapping[K, nn.Module], action: Callable[[K, tuple[Any, ...]], object]) -> Iterator[None]:
    """Calls `action(key, args)` before each call of each module in the block; for eager calls of this thread only."""
    handles = [module.register_forward_pre_hook(Look(key, action)) for key, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
