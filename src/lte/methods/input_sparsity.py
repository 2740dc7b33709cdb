"""Linear layers that skip columns of their weight, those of inputs that matter little for the token.

Shapes: K inputs and O outputs of a projection.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lte.hf.families import Family, block_name, dense_ffns
from lte.nn.metering import MeteredModule, OfThread, Reading, metered_modules

Linears = Literal["ffn", "block"]


class InputSparse(MeteredModule):
    """What a projection gains: inputs [..., K] are set to 0 where `keeps` says so, which skips columns [O, K].

    The class of a projection is replaced and nothing else, so that its parameters keep their names.

    Attributes:
        is_down: whether the inputs are FFN neurons.
    """

    is_down = False

    def keeps(self, x: Tensor) -> Tensor:
        """Which inputs are used, bool [..., K]."""
        raise NotImplementedError

    @property
    def matrix(self) -> Tensor:
        """The weight as [O, K]."""
        weight: Any = self.weight
        return weight.T if isinstance(self, Conv1D) else weight

    @property
    def dense_weights(self) -> int:
        """O K."""
        return self.matrix.numel()

    @property
    def dense_neurons(self) -> int:
        """K."""
        return self.matrix.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] to [..., O]."""
        if self.observer is not None:
            self.observer(x)
            return super().forward(x)
        kept = self.keeps(x)
        if self.metering:
            count = kept.sum(-1)
            self.reading = Reading(count * self.matrix.shape[0], neurons=count if self.is_down else None)
        return super().forward(x * kept.to(x.dtype))


def sparse_pair(sparse: type[InputSparse]) -> dict[type[nn.Module], type[nn.Module]]:
    """The classes that a kind of `InputSparse` makes of the projections of all families."""
    name = sparse.__name__
    return {stock: type(f"{name}{stock.__name__}", (sparse, stock), {}) for stock in (nn.Linear, Conv1D)}


def remove_input_sparsity_(model: Any, family: Family, stock_config: Any) -> None:
    """Gives the projections of `make_input_sparse_` their stock classes back, and takes off what was set up."""
    for projection in metered_modules(model).values():
        stock = next(base for base in type(projection).__mro__ if base in (nn.Linear, Conv1D))
        for name in list(projection._buffers):
            delattr(projection, name)
        for name in ("target_sparsity", "is_down", "metering", "_of_thread", "observer"):
            vars(projection).pop(name, None)
        projection.__class__ = stock  # type: ignore[assignment]


def projections_of(model: Any, family: Family, linears: Linears) -> dict[str, Any]:
    """The plain projections of the FFNs, or of the whole transformer blocks, by qualified name in depth order.

    Raises:
        ValueError: for the whole blocks of an encoder-decoder.
    """
    if linears == "block" and model.config.is_encoder_decoder:
        raise ValueError(
            f"linears must be 'ffn' for {family.model_type}, whose decoder reads tokens of both sides, got "
            f"linears={linears!r}"
        )
    ffns = dense_ffns(model, family)
    if linears == "ffn":
        return {
            f"{name}.{part}": ffn.get_submodule(part)
            for name, ffn in ffns.items()
            for part in family.layout.projections
        }
    return {
        f"{block}.{name}": module
        for block in dict.fromkeys(map(block_name, ffns))
        for name, module in model.get_submodule(block).named_modules()
        if type(module) in (nn.Linear, Conv1D)
    }


def make_input_sparse_(
    model: Any,
    family: Family,
    linears: Linears,
    classes: dict[type[nn.Module], type[nn.Module]],
    initialise_: Callable[[Any], None],
) -> None:
    """Gives projections the classes of a method in place.

    Args:
        model: a dense model, on any device.
        family: its row.
        linears: which projections.
        classes: from `sparse_pair`.
        initialise_: sets up each of the projections.

    Raises:
        ValueError: as `projections_of`.
    """
    downs = {ffn.get_submodule(family.layout.down) for ffn in dense_ffns(model, family).values()}
    for projection in projections_of(model, family, linears).values():
        projection.__class__ = classes[type(projection)]
        projection.is_down, projection._of_thread = projection in downs, OfThread()
        initialise_(projection)
