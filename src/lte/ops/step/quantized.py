"""Quantised weights as step.cu reads them.

Shapes: N rows, K columns, g numbers of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from lte.ops.step.plan import DecoderLayer, Quantized

SLAB = 1024  # columns of a stage
# Where the columns of a word of eight lie, the lowest four bits first: a shift and a mask give a pair of neighbours.
MIXED = (0, 2, 4, 6, 1, 3, 5, 7)


def packed_rows(values: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """Rows of a matrix whose groups run along the rows: the half bytes of each slab, and behind them its pairs.

    Args:
        values: uint8 [N, K] from 0 to 15.
        scales: [N, K / g].
        zeros: [N, K / g].

    Returns:
        uint8 [N, bytes of a row].
    """
    columns = values.shape[1]
    group = columns // scales.shape[1]
    halves = values.unflatten(1, (-1, 8))[..., MIXED].flatten(1)
    halves = halves[:, ::2] | halves[:, 1::2] << 4
    pairs = torch.stack((scales, zeros), -1).flatten(1).view(torch.uint8)
    each = pairs.shape[1] // scales.shape[1]
    pieces = []
    for start in range(0, columns, SLAB):
        end = min(start + SLAB, columns)
        some = pairs[:, start // group * each : end // group * each]
        pieces += [halves[:, start // 2 : end // 2], functional.pad(some, (0, -some.shape[1] % 16))]
    return torch.cat(pieces, 1)


def packed_down(values: Tensor, scales: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor]:
    """The transposed down projection [F, D], whose groups run along the neurons.

    Args:
        values: uint8 [F, D] from 0 to 15.
        scales: [F / g, D].
        zeros: [F / g, D].

    Returns:
        The half bytes, uint8 [F, D / 2], and pairs [F / g, D in whole stages of 512, 2].
    """
    pairs = torch.stack((scales, zeros), -1)
    return values[:, ::2] | values[:, 1::2] << 4, functional.pad(pairs, (0, 0, 0, -values.shape[1] % 512))


def packed_layer(layer: DecoderLayer) -> dict[str, Tensor | None]:
    """What the kernel reads of a layer in place of its quantised matrices, and `down_pairs`."""
    read: dict[str, Tensor | None] = {"down_pairs": None}
    for name, matrix in vars(layer).items():
        if isinstance(matrix, Quantized):
            read[name], pairs = packed(matrix, name == "down")
            read["down_pairs"] = pairs if name == "down" else read["down_pairs"]
    return read


def output_scales(layer: DecoderLayer) -> Tensor | None:
    """The scales of all outputs of a layer in turn, fp32; matrices that have none hold places of zeros."""
    matrices = {name: getattr(layer, name) for name in ("q", "k", "v", "out", "gate", "up", "down")}
    if not any(isinstance(matrix, Quantized) and matrix.bits == 8 for matrix in matrices.values()):
        return None
    scales = []
    for name, matrix in matrices.items():
        if isinstance(matrix, Quantized) and matrix.bits == 8:
            scales.append(matrix.scales.float().flatten())
        elif matrix is not None:
            scales.append(torch.zeros(matrix.shape[name == "down"], device=layer.norm1.device))
    return torch.cat(scales)


def packed(matrix: Quantized, transposed: bool = False) -> tuple[Tensor, Tensor | None]:
    """The memory of one matrix, and the pairs of a transposed one of 4 bits."""
    if matrix.bits == 8:
        return matrix.values.contiguous(), None
    zeros = torch.zeros_like(matrix.scales) if matrix.zeros is None else matrix.zeros.to(matrix.scales.dtype)
    values = (matrix.values + 8).to(torch.uint8)
    return (
        packed_down(values, matrix.scales, zeros) if transposed else (packed_rows(values, matrix.scales, zeros), None)
    )
