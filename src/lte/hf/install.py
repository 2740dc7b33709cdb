"""The sparse FFNs of a model: finding them, and building them around a family's own projections."""

from __future__ import annotations

from operator import attrgetter

import torch
from torch import nn

from lte.config import LteConfig
from lte.hf.families import Family, dense_ffns
from lte.nn.clustering import check_expert_size
from lte.nn.router import Router
from lte.nn.sparse_ffn import FfnLayout, SparseFfn


def sparse_ffns(model: nn.Module) -> dict[str, SparseFfn]:
    """The sparse FFNs of `model` by qualified name, in depth order; empty for a dense model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseFfn)}


def require_sparse_ffns(model: nn.Module) -> dict[str, SparseFfn]:
    """As `sparse_ffns`, but a model without any is a `ValueError`."""
    found = sparse_ffns(model)
    if not found:
        raise ValueError(
            "model must be an LTE model, got one without sparse FFNs; call lte.sparsify_(model, ...) first"
        )
    return found


def install_sparse_ffns_(model: nn.Module, family: Family, config: LteConfig) -> None:
    """Replaces the stock FFNs of `model` by `SparseFfn`s around the same projections, on any device."""
    check_unchunked(model, family)
    for index, (name, ffn) in enumerate(dense_ffns(model, family).items()):
        weight = family.layout.matrix(ffn.get_submodule(family.layout.up))
        num_experts = check_expert_size(num_neurons(ffn, family.layout), config.expert_size)
        router = Router(
            weight.shape[1],
            num_experts,
            config.router_rank,
            device=weight.device,
            dtype=torch.float32,
        )
        if not weight.is_meta and config.router_rank:
            generator = torch.Generator(weight.device).manual_seed(config.seed + index)
            router.reset_parameters(generator)
        layout = family.layout
        parts = ffn if layout.spread else {part: ffn.get_submodule(part) for part in layout.parts}
        activation = attrgetter(layout.activation)(ffn)
        sparse = SparseFfn(parts, activation, layout, router, config.threshold)
        place = f"{name}.{layout.activation}" if layout.spread else name
        model.set_submodule(place, sparse.train(ffn.training))


def check_unchunked(model: nn.Module, family: Family) -> None:
    """Refuses blocks that call a spread FFN chunk by chunk: its routing would be recorded for the last chunk alone.

    Raises:
        ValueError: for a `chunk_size_feed_forward` of such a model.
    """
    chunk = getattr(getattr(model, "config", None), "chunk_size_feed_forward", 0)
    if family.layout.spread and chunk:
        raise ValueError(
            f"chunk_size_feed_forward must be 0 for {family.model_type}, got chunk_size_feed_forward={chunk}"
        )


def num_neurons(ffn: nn.Module, layout: FfnLayout) -> int:
    """F of an FFN, stock or sparse."""
    if isinstance(ffn, SparseFfn):
        return ffn.num_neurons
    return layout.matrix(ffn.get_submodule(layout.down)).shape[1]
