"""Looking at what modules get."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn

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


@contextmanager
def watched_activations(ffns: Mapping[K, Any], look: Callable[[K, Tensor, Tensor], object]) -> Iterator[None]:
    """Calls `look(key, x, h)` before each call of each sparse FFN: its input [..., D], and activations [..., F].

    The activations are those before any switching; they are computed once more for it.
    """
    inputs: dict[Any, Tensor] = {}
    spread = {key: ffn for key, ffn in ffns.items() if ffn.block}

    def keep(key: K, args: tuple[Any, ...]) -> None:
        inputs[key] = args[0]

    def compute(key: K, args: tuple[Any, ...]) -> None:
        ffn = ffns[key]
        # The module of a spread FFN gets what its up projection gives.
        hidden = ffn.activation_function(args[0]) if ffn.block else ffn.intermediate(args[0])
        look(key, inputs.pop(key) if ffn.block else args[0], hidden)

    readers = {key: ffn.reader for key, ffn in spread.items()}
    with before_each_call(readers, keep), before_each_call(ffns, compute):
        yield
