"""What a method's modules say of their own work, token by token, in the pass that is measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Reading:
    """What a module read in its last forward pass, for each token [...].

    Attributes:
        weights: how many of the model's own weights, [...].
        selector: how many weights of a router or predictor, which are in fp32, for every token.
        neurons: how many FFN neurons were computed and used, [...]; `None` where the module does not decide that.
    """

    weights: Tensor
    selector: int = 0
    neurons: Tensor | None = None


class MeteredModule(nn.Module):
    """A module of a method.

    Attributes:
        metering: whether the forward pass keeps a `reading`.
        reading: of the last forward pass.
        observer: while set, the module computes densely and hands it what it works on; see `lte.methods.calibration`.
    """

    metering = False
    reading: Reading | None = None
    observer: Callable[..., None] | None = None

    @property
    def dense_weights(self) -> int:
        """How many weights the module reads for a token if it skips nothing, without any selector."""
        raise NotImplementedError

    @property
    def dense_neurons(self) -> int:
        """F, where `Reading.neurons` is given."""
        raise NotImplementedError


def metered_modules(model: nn.Module) -> dict[str, MeteredModule]:
    """The modules of a method in `model` by qualified name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MeteredModule)}
