"""What the modules of a method say of their own work, token by token, in the pass that is measured."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Reading:
    """What a module read in its last forward pass, for each token [...].

    Attributes:
        weights: how many of the model's own weights, [...].
        selector: how many weights of a router or predictor, which are in fp32, for every token.
        neurons: how many FFN neurons were computed and used, [...]; `None` where the module does not decide that.
        logits: of a router that switches experts by a threshold, [..., E]; `None` for other modules.
        threshold_logit: that threshold, as a logit.
    """

    weights: Tensor
    selector: int = 0
    neurons: Tensor | None = None
    logits: Tensor | None = None
    threshold_logit: float = 0.0


class OfThread(threading.local):
    """What the parts of one call hand on to each other, and the last call to who made it: in each thread its own.

    On a module itself, calls in other threads would meet it. Copies of a module, pickled ones included, start without.

    Attributes:
        inputs: what the up projection of a spread FFN has read, one place for each call of its block that is not over.
        left: what the last call has left: `reading`, see `MeteredModule`; `logits` of a router, [..., E]; `routing`, of
            which an FFN makes its auxiliary loss; `output` and `own` of a sparse FFN; `context`, cache and positions of
            the call at work. A dictionary, as compiled code would not write attributes back.
    """

    def __init__(self) -> None:
        self.inputs: list[Tensor | None] = []
        self.left: dict[str, Any] = dict.fromkeys(("reading", "logits", "routing", "output", "own", "context"))

    def __reduce__(self) -> tuple[type[OfThread], tuple[()]]:
        return OfThread, ()


class MeteredModule(nn.Module):
    """A module of a method.

    Attributes:
        metering: whether the forward pass keeps a `reading`.
        reading: of the last forward pass in this thread.
        observer: while set, the module computes densely and hands it what it works on; see `lte.methods.calibration`.
        target_sparsity: what the method's config says, for those that keep a fixed share.
    """

    metering = False
    observer: Callable[..., None] | None = None
    target_sparsity = 0.0
    _of_thread: OfThread

    def __init__(self) -> None:
        super().__init__()
        self._of_thread = OfThread()

    @property
    def reading(self) -> Reading | None:
        return self._of_thread.left["reading"]

    @reading.setter
    def reading(self, reading: Reading | None) -> None:
        self._of_thread.left["reading"] = reading

    @property
    def dense_weights(self) -> int:
        """How many weights the module reads for a token if it skips nothing, without any selector."""
        raise NotImplementedError

    @property
    def dense_neurons(self) -> int:
        """F, where `Reading.neurons` is given."""
        raise NotImplementedError


def metered_modules(model: nn.Module) -> dict[str, MeteredModule]:
    """The modules of a method in `model` by qualified name, in depth order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MeteredModule)}
