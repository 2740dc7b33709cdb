"""A second sparse FFN on the parameters of another, with a threshold of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lte.nn.accelerated import AcceleratedFfn
from lte.nn.laid_out import BUFFERS
from lte.nn.metering import OfThread
from lte.nn.sparse_ffn import SparseFfn


def shallow_copy(module: nn.Module) -> Any:
    """A module of the same class with the same parameters, buffers and submodules, not copies of them."""
    made = module.__class__.__new__(module.__class__)
    # Submodules, parameters and hooks are in dictionaries, each of which the new module has to itself.
    made.__dict__ = {name: _own(value) for name, value in module.__dict__.items()}
    return made


def _own(value: Any) -> Any:
    return value.copy() if isinstance(value, dict) else value


def second_ffn(ffn: SparseFfn) -> SparseFfn:
    """An FFN on the parameters of another, whose threshold and mode can be set without changing the other's."""
    made: Any = shallow_copy(ffn)
    made._of_thread = OfThread()
    if isinstance(made, AcceleratedFfn):
        made.__class__ = SharedFfn
        assert isinstance(made, SharedFfn)
        # In a tuple, or it would become a submodule.
        made._first = (ffn,)
        made._follow_()
    return made


class SharedFfn(AcceleratedFfn):
    """An `AcceleratedFfn` whose parameters another lays out: both run the kernels on the same memory."""

    _first: tuple[Any]

    def _lay_out_(self) -> None:
        """Has the other FFN lay out what was moved, and takes it from there."""
        first = self._first[0]
        if not isinstance(first, AcceleratedFfn):
            raise ValueError(
                "the model of a draft must stay accelerated, got one that lte.decelerate_ changed; make the draft anew"
            )
        first.refresh_()
        self._follow_()

    def _follow_(self) -> None:
        first = self._first[0]
        for name in (*BUFFERS, "dtype", "_width", "_device", "_rounds_router", "_arch"):
            setattr(self, name, getattr(first, name))
        self._runner, self._watched, self._seen = self._bind(), tuple(self._watch()), tuple(self._look())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SharedFfn:
        """Moves or casts the FFN that lays out the parameters."""
        self._first[0]._apply(fn, recurse)
        self._follow_()
        return self

    def remove_(self) -> None:
        """Refuses: the parameters are laid out by the other FFN."""
        raise ValueError("a draft must be left accelerated as its model is, got lte.decelerate_ of it; decelerate that")
