"""A second sparse FFN on the parameters of another, with a threshold of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch import Tensor, nn

from lte.nn.accelerated import AcceleratedFfn
from lte.nn.laid_out import BUFFERS
from lte.nn.metering import OfThread
from lte.nn.sparse_ffn import SparseFfn

# Of each module all that were made of it or of one another; not in them, as copies and pickles would take them along.
_TWINS: WeakKeyDictionary[nn.Module, WeakSet[nn.Module]] = WeakKeyDictionary()


def shallow_copy(module: nn.Module) -> Any:
    """A module of the same class with the same parameters, buffers and submodules, not copies of them."""
    made = module.__class__.__new__(module.__class__)
    # Submodules, parameters and hooks are in dictionaries, each of which the new module has to itself.
    made.__dict__ = {name: _own(value) for name, value in module.__dict__.items()}
    family = _TWINS.setdefault(module, WeakSet((module,)))
    family.add(made)
    _TWINS[made] = family
    return made


def twins_of(module: nn.Module) -> Iterator[nn.Module]:
    """What was made of a module by `shallow_copy`, what it was made of, and so on, as long as somebody has them."""
    yield from [twin for twin in _TWINS.get(module, ()) if twin is not module]


def train_twins_(model: nn.Module, mode: bool) -> None:
    """Puts the twins of a model's modules into train or eval mode, too; modules that both have are in it already."""
    if _TWINS:
        for module in model.modules():
            for twin in twins_of(module):
                twin.training = mode


def _own(value: Any) -> Any:
    return value.copy() if isinstance(value, dict) else value


def second_ffn(ffn: SparseFfn) -> SparseFfn:
    """An FFN on the parameters of another, whose threshold and mode can be set without changing the other's."""
    made: Any = shallow_copy(ffn)
    made._of_thread = OfThread()
    # In a tuple, or it would become a submodule.
    made._first = (ffn,)
    if isinstance(made, AcceleratedFfn):
        _share_(made)
    return made


def is_second(ffn: SparseFfn) -> bool:
    """Whether another FFN has the parameters of this one; a copy of a draft alone has its own."""
    first = vars(ffn).get("_first")
    return first is not None and any(twin is ffn for twin in twins_of(first[0]))


def accelerate_seconds_(ffn: AcceleratedFfn) -> None:
    """Has FFNs that were made of one before it was accelerated, or otherwise, run on the kernels as it does.

    Their thresholds and modes stay.
    """
    for second in twins_of(ffn):
        if not (isinstance(second, SparseFfn) and is_second(second) and vars(second)["_first"][0] is ffn):
            continue
        for name, value in vars(ffn).items():
            if name not in vars(second) or name in ("acceleration", "_trainable", "_activation", "_kinds"):
                setattr(second, name, _own(value))
        second._buffers.update(ffn._buffers)
        second._non_persistent_buffers_set |= ffn._non_persistent_buffers_set
        _share_(second)
        accelerate_seconds_(second)  # type: ignore[arg-type]


def _share_(ffn: SparseFfn) -> None:
    ffn.__class__ = SharedFfn
    assert isinstance(ffn, SharedFfn)
    ffn._follow_()


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
        for name in (*BUFFERS, "dtype", "_width", "_device", "_rounds_router", "_arch", "_mesh"):
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
