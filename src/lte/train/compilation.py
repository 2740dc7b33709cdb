"""Compiled layers in training, and the rows of few widths that they want."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from lte.hf.families import block_name, dense_ffns, family_of
from lte.hf.install import wrapped_ffns
from lte.nn.sparse_ffn import SparseFfn

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


def checkpoint_compiled_(model: nn.Module) -> None:
    """Fits the checkpointing of activations of a model, once it is on, to compiled layers that record for the loss.

    A layer that is computed again must be the graph of the forward pass, so it records there, too: another one saves
    other tensors, which checkpointing refuses. What it then keeps is let go at once, as all activations would stay with
    it. Transformers 5.23 checkpoints inside of what `layer.compile` compiles, where dynamo goes on eagerly: the layer's
    forward pass is compiled there. Older versions checkpoint around it.
    """
    compiled = cache(torch.compile)
    layers: list[Any] = list(model.modules())
    for layer in layers:
        checkpoint = vars(layer).get("_gradient_checkpointing_func")
        if getattr(checkpoint, "func", None) is _checkpointed:
            checkpoint = checkpoint.args[0]  # of an earlier training
        if checkpoint is not None:
            ffns = [module for module in layer.modules() if isinstance(module, SparseFfn)]
            layer._gradient_checkpointing_func = partial(_checkpointed, checkpoint, compiled, ffns)


def _checkpointed(
    checkpoint: Any, compiled: Any, ffns: list[SparseFfn], function: Any, *args: Any, **kwargs: Any
) -> Any:
    if isinstance(function, partial) and function.args:
        # The layer's plain forward; one code for all layers.
        function = partial(compiled(function.func), *function.args, **function.keywords)

    def computed(*inputs: Any) -> Any:
        try:
            return function(*inputs)
        finally:
            # The second time it may be left by an exception, once all that was missing is there.
            if torch._C._current_graph_task_id() != -1:
                for ffn in ffns:
                    ffn.logits = None
                    ffn.forget_outputs()

    return checkpoint(computed, *args, **kwargs)
