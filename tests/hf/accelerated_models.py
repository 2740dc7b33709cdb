"""What the tests of acceleration share."""

from __future__ import annotations

from typing import Any

from torch import nn

import lte
from lte.nn.accelerated import AcceleratedFfn

TOLERANCE = 1e-5


def first_ffn(model: Any) -> AcceleratedFfn:
    ffn = next(iter(lte.sparse_ffns(model).values()))
    assert isinstance(ffn, AcceleratedFfn)
    return ffn


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the distinct storages of all parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
