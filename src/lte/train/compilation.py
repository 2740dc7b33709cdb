"""Compiled layers in training, and the rows of few widths that they want."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lte.hf.families import block_name, dense_ffns, family_of
from lte.hf.install import wrapped_ffns

COMPILED_MULTIPLE = 64
"""Rows are padded to a multiple of so many tokens where layers are compiled."""


def few_widths(collator: Any) -> Any:
    """The collator, if it is one of ours, with batches of few widths."""
    if not hasattr(collator, "multiple"):
        return collator
    collator = copy.copy(collator)
    collator.multiple = COMPILED_MULTIPLE
    return collator


@contextmanager
def compiled_layers(model: nn.Module, teacher: nn.Module | None, compiles: bool) -> Iterator[None]:
    """Compiles the decoder layers of both in place, inside the block, if `compiles`: one compilation serves all layers,
    and parameter names stay."""
    if not compiles:
        yield
        return
    # Student and teacher, with gradients and without, each switching, each number of rows: more than the 8 after which
    # dynamo would go on eagerly, without a word.
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, 64)
    networks: list[Any] = [network for network in (model, teacher) if network is not None]
    layers = [
        network.get_submodule(block_name(name))
        for network in networks
        for name in wrapped_ffns(network) or dense_ffns(network, family_of(network.config))
    ]
    for layer in layers:
        layer.compile()
    try:
        yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None
