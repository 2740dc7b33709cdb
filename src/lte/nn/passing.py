"""The projections of an accelerated FFN that is spread over its block, which go on being called one by one.

Shapes: D hidden size, F neurons, which must differ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lte.nn.sparse_ffn import SparseFfn


class PassingUp(nn.Linear):
    """What the up projection is while the FFN is accelerated.

    Where the kernels compute the FFN, it hands the hidden states on to it, which sees by their width what it got; its
    output is passed on by `PassingDown`. Everywhere else both are plain.
    """

    # In a tuple, or it would become a submodule.
    ffn: tuple[Any]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] itself or x W_up [..., F]."""
        return x if "_is_replica" not in self.__dict__ and self.ffn[0].takes(x) else super().forward(x)

    def _load_from_state_dict(self, *args: Any) -> None:
        # The FFN refuses as well, but its turn comes after this one's.
        if not self.weight.is_floating_point():
            raise ValueError(
                "weights must be floating-point to load others into them, got int8; call lte.decelerate_(model) first"
            )
        super()._load_from_state_dict(*args)


class PassingDown(nn.Linear):
    """What the down projection is while the FFN is accelerated, see `PassingUp`."""

    ffn: tuple[Any]

    def forward(self, x: Tensor) -> Tensor:
        """x itself if it is the FFN's output [..., D], else x W_down for x [..., F]."""
        return x if x.shape[-1] == self.out_features else super().forward(x)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PassingDown:
        super()._apply(fn, recurse)
        # The last of the three in its block: only now do all lie where they shall.
        self.ffn[0].refresh_()
        return self


def install_passing_(ffn: SparseFfn) -> None:
    """Makes the plain `nn.Linear` projections of a spread FFN passing ones, in place."""
    for name, passing in ((ffn.layout.up, PassingUp), (ffn.layout.down, PassingDown)):
        projection = ffn.part(name)
        projection.__class__ = passing
        projection.ffn = (ffn,)


def remove_passing_(ffn: SparseFfn) -> None:
    """The inverse of `install_passing_`."""
    for name in ffn.layout.projections:
        # Adapters may have been put around a projection, or another taken its place.
        for module in ffn.part(name).modules():
            if isinstance(module, PassingUp | PassingDown):
                vars(module).pop("ffn", None)
                module.__class__ = nn.Linear  # type: ignore[assignment]
