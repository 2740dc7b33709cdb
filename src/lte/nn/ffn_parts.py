"""Gate, up and down of a sparse FFN by their roles, whatever its family calls and fuses; and their int8 form.

Shapes: D hidden size, F neurons.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from lte.nn.shards import local, place_
from lte.nn.sparse_ffn import SparseFfn
from lte.ops.layout import by_neuron
from lte.ops.quantize import dequantize_rows, quantize_rows

Role = Literal["gate", "up", "down"]
ROLES: tuple[Role, ...] = ("gate", "up", "down")


def projection_of(ffn: SparseFfn, role: Role) -> Any:
    """The module that holds a role, `None` if the FFN has no gate; fused gate and up have the same."""
    layout = ffn.layout
    names = {"gate": layout.up if layout.fused else layout.gate, "up": layout.up, "down": layout.down}
    name = names[role]
    return None if name is None else ffn.part(name)


def weight_of(ffn: SparseFfn, role: Role) -> Tensor | None:
    """The weight [F, D] of a role, a view of its parameter; `None` if there is no gate.

    Under tensor parallelism F is that of this process.
    """
    projection = projection_of(ffn, role)
    if projection is None:
        return None
    matrix = local(ffn.layout.matrix(projection))
    return matrix.T if role == "down" else _half(ffn, role, matrix)


def bias_of(ffn: SparseFfn, role: Role) -> Tensor | None:
    """The bias of a role, [F] for gate and up, [D] for down; `None` if there is none."""
    bias = getattr(projection_of(ffn, role), "bias", None)
    if bias is not None:
        bias = local(bias)
    return bias if bias is None or role == "down" else _half(ffn, role, bias)


def _half(ffn: SparseFfn, role: Role, rows: Tensor) -> Tensor:
    """The rows of gate or up out of those of their projection."""
    return rows.chunk(2)[role == "up"] if ffn.layout.fused else rows


@torch.no_grad()
def quantize_projections_(ffn: SparseFfn) -> dict[Role, Tensor]:
    """Rounds the weights to int8 in their parameters, which need no gradient then; returns the scales by role.

    Those of gate and up [F] are per neuron, that of down [D] per output: weights of one neuron differ too much in size
    between outputs to share a scale.
    """
    scales: dict[Role, Tensor] = {}
    for name in ffn.layout.projections:
        weight, down = ffn.part(name).weight, name == ffn.layout.down
        values, scale = quantize_rows(local(ffn.layout.matrix(ffn.part(name))).detach())
        weight.grad = None
        weight.requires_grad_(False)
        values = by_neuron(values) if down else values.contiguous()
        place_(weight, values.T if ffn.layout.transposed else values)
        for role in ROLES:
            if projection_of(ffn, role) is ffn.part(name):
                scales[role] = scale if down else _half(ffn, role, scale)
    return scales


@torch.no_grad()
def dequantize_projections_(ffn: SparseFfn, scales: dict[Role, Tensor], dtype: torch.dtype) -> None:
    """The inverse of `quantize_projections_`, but for the rounding; the parameters are contiguous then."""
    for name in ffn.layout.projections:
        projection = ffn.part(name)
        rows = torch.cat([scales[role] for role in ROLES if projection_of(ffn, role) is projection])
        weight = dequantize_rows(local(ffn.layout.matrix(projection)).detach(), rows, dtype)
        place_(projection.weight, (weight.T if ffn.layout.transposed else weight).contiguous())
