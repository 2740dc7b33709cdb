"""A sparse FFN whose weights torchao quantised: plain PyTorch by modules, read by whole decoding steps."""

from __future__ import annotations

from typing import Any

from torch import nn

from lte.nn.ffn_parts import ROLES, projection_of
from lte.nn.laid_out import Acceleration
from lte.nn.sparse_ffn import SparseFfn
from lte.nn.torchao_weights import is_torchao
from lte.ops.step.plan import Matrix


class QuantizedFfn(SparseFfn):
    """What a `SparseFfn` is whose projections torchao quantised, while it is accelerated.

    Called as a module it computes what it did before, by torchao's own kernels, all neurons for a token: so prompts are
    read. Whole decoding steps read the bits of the active experts alone.

    Attributes:
        acceleration: how it runs; its weights are `native`, as nothing is rounded any further.
    """

    acceleration: Acceleration

    @staticmethod
    def fits(ffn: SparseFfn) -> bool:
        """Whether all projections are linear layers with weights of torchao, in a module of their own."""
        parts = [ffn.part(name) for name in ffn.layout.projections]
        return not ffn.block and all(type(part) is nn.Linear and is_torchao(part.weight) for part in parts)

    @staticmethod
    def install_(ffn: SparseFfn, acceleration: Acceleration) -> None:
        """Makes a `SparseFfn` that `fits` a `QuantizedFfn`."""
        ffn.__class__ = QuantizedFfn
        assert isinstance(ffn, QuantizedFfn)
        ffn.acceleration = acceleration

    def remove_(self) -> None:
        """Makes it a `SparseFfn` again."""
        del self.acceleration
        self.__class__ = SparseFfn  # type: ignore[assignment]

    def matrices(self, read: Any) -> dict[str, Matrix | None]:
        """The matrices by their role, [F, D] each, as `read(projection, transposed)` gives those of a projection."""
        found: dict[str, Matrix | None] = dict.fromkeys(ROLES)
        for role in ROLES:
            projection = projection_of(self, role)
            if projection is not None:
                matrix = read(projection, role == "down")
                if self.layout.fused and role != "down":
                    matrix = matrix.split([len(matrix) // 2] * 2)[role == "up"]
                found[role] = matrix
        return found
