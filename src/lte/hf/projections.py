"""Which modules the projections of an FFN may be."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from lte.nn.sparse_ffn import FfnLayout


def is_plain_projection(projection: Any, layout: FfnLayout) -> bool:
    """Whether a projection is the family's own kind of linear layer with floating-point weights.

    Adapters and quantisers put other classes there; some quantisers keep the class and a floating-point dtype, and
    make the weight a tensor subclass.
    """
    plain = type(projection) is _projection_class(layout) and type(projection.weight) is nn.Parameter
    return plain and projection.weight.is_floating_point()


def projection_name(layout: FfnLayout) -> str:
    """The class of the family's projections in words."""
    return "Conv1D" if layout.transposed else "nn.Linear"


def _projection_class(layout: FfnLayout) -> type[nn.Module]:
    return Conv1D if layout.transposed else nn.Linear
