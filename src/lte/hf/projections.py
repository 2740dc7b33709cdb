"""Which modules the projections of an FFN may be, and LoRA adapters of peft on them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lte.nn.sparse_ffn import FfnLayout


def is_plain_projection(projection: Any, layout: FfnLayout) -> bool:
    """Whether a projection is the family's own kind of linear layer with floating-point weights.

    Adapters and quantisers put other classes there; some quantisers keep the class and a floating-point dtype, and
    make the weight a tensor subclass.
    """
    plain = type(projection) is _projection_class(layout) and type(projection.weight) is nn.Parameter
    return plain and projection.weight.is_floating_point()


def base_of(projection: Any) -> Any:
    """The layer under the LoRA adapters of peft; a projection without any is its own."""
    return projection.base_layer if hasattr(projection, "lora_A") else projection


def permute_adapters_(projection: Any, index: Tensor, *, inputs: bool) -> None:
    """Reorders what LoRA adapters on a projection read (`inputs`) or write, as its weight was reordered.

    Args:
        projection: with or without adapters.
        index: new place i holds what was at `index[i]`.
        inputs: whether the neurons are what the projection reads, as down's are.
    """
    for adapter in getattr(projection, "lora_A", ()):
        if inputs:
            weight = projection.lora_A[adapter].weight
            weight.copy_(weight[:, index])
            continue
        magnitudes = getattr(projection, "lora_magnitude_vector", {})
        dora = [magnitudes[adapter].weight] if adapter in magnitudes else []
        for rows in (projection.lora_B[adapter].weight, projection.lora_B[adapter].bias, *dora):
            if rows is not None:
                rows.copy_(rows[index])


def projection_name(layout: FfnLayout) -> str:
    """The class of the family's projections in words."""
    return "Conv1D" if layout.transposed else "nn.Linear"


def _projection_class(layout: FfnLayout) -> type[nn.Module]:
    return Conv1D if layout.transposed else nn.Linear
