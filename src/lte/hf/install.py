"""The sparse FFNs of a model: finding them, and building them around a family's own projections."""

from __future__ import annotations

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
        parts = {part: ffn.get_submodule(part) for part in family.layout.parts}
        activation = getattr(ffn, family.layout.activation)
        sparse = SparseFfn(parts, activation, family.layout, router, config.threshold)
        model.set_submodule(name, sparse.train(ffn.training))


def num_neurons(ffn: nn.Module, layout: FfnLayout) -> int:
    """F of a stock FFN."""
    return layout.matrix(ffn.get_submodule(layout.down)).shape[1]
