"""Rounding a model's weights by torchao, dense or LTE, as a user would who wants fewer bytes."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn

from lte.config import WEIGHT_GROUPS, WEIGHTS, check_choice
from lte.eval.flops import block_linears
from lte.methods import method_of
from lte.nn.torchao_weights import is_torchao, stored_bytes


def round_weights_(model: Any, weights: str) -> Any:
    """Rounds all linear layers of the blocks and the head in place, weight-only, and returns the model.

    8 bits have a scale for each output (`Int8WeightOnlyConfig`). 4 bits have a scale and a zero for each group of
    inputs. On a GPU and in bf16 they are what the kernels of `Int4WeightOnlyConfig` read; elsewhere torchao has no such
    kernel, and its reference (`IntxWeightOnlyConfig`, whose zeros are whole multiples of the scale) expands 4 bits for
    each product.
    Routers, embeddings and norms stay as they are. A head that shares its weights with the embedding gets its own.

    Args:
        model: dense, LTE or of another method whose projections are `nn.Linear`, before `accelerate_`.
        weights: one of `lte.config.WEIGHTS`; `native` leaves the model as it is.

    Raises:
        ValueError: for an unknown name, without torchao, for other linear layers, groups that do not divide what they
            read, or a pruned model, whose zeros would no longer be ones.
    """
    check_choice("weights", weights, WEIGHTS)
    if weights == "native":
        return model
    check_torchao(weights)
    method = method_of(model)
    if method is not None and method.zeroes_weights:
        raise ValueError(f"weights must be native for a model pruned by {method.config.name}, got weights={weights}")
    linears = [*block_linears(model), *([] if (head := model.get_output_embeddings()) is None else [head])]
    group = WEIGHT_GROUPS.get(weights)
    for linear in linears:
        if not isinstance(linear, nn.Linear) or is_torchao(linear.weight):
            raise ValueError(
                f"weights must be native for a model with a {type(linear).__name__} of {type(linear.weight).__name__}, "
                f"got weights={weights}; torchao rounds floating-point nn.Linear layers"
            )
        if group is not None and linear.in_features % group:
            raise ValueError(
                f"weights must have groups that divide the {linear.in_features} inputs of a layer, got weights="
                f"{weights} with groups of {group}; take smaller ones"
            )
    from torchao.quantization import quantize_

    config, chosen = _config(weights, linears[0].weight), {id(linear) for linear in linears}
    quantize_(model, config, filter_fn=lambda module, name: id(module) in chosen)
    return model


def check_torchao(weights: str) -> None:
    """Raises a `ValueError` for weights that only torchao can make, if that is not installed."""
    if weights != "native" and importlib.util.find_spec("torchao") is None:
        raise ValueError(f"torchao must be installed for weights={weights}, got none: pip install torchao")


def _config(weights: str, like: Any) -> Any:
    from torchao.quantization import (
        Int4WeightOnlyConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        MappingType,
        PerGroup,
    )

    if weights == "int8":
        return Int8WeightOnlyConfig()
    group = WEIGHT_GROUPS[weights]
    if like.is_cuda and like.dtype == torch.bfloat16:
        return Int4WeightOnlyConfig(group_size=group, int4_packing_format="tile_packed_to_4d")
    bits: Any = getattr(torch, "int4")  # noqa: B009 - the stubs of torch lack it
    return IntxWeightOnlyConfig(weight_dtype=bits, granularity=PerGroup(group), mapping_type=MappingType.ASYMMETRIC)


def bytes_per_weight(model: Any) -> float:
    """Mean over the weights of the linear layers in the blocks: 2 for those that nobody rounded."""
    linears = block_linears(model)
    return sum(stored_bytes(linear.weight) for linear in linears) / sum(linear.weight.numel() for linear in linears)


def memory_bytes(model: Any) -> float:
    """Bytes of all weights of a model: 16 bits each, 32 of routers and predictors, and rounded ones as they are."""
    shared = {id(parameter): parameter for parameter in model.parameters()}
    own = {id(linear.weight) for linear in block_linears(model)}
    selectors = {id(p) for module in _selectors(model) for p in module.parameters()} - own
    return sum((4.0 * p.numel() if key in selectors else stored_bytes(p)) for key, p in shared.items())


def _selectors(model: Any) -> list[nn.Module]:
    """The routers and predictors that methods add to FFNs."""
    from lte.hf.install import wrapped_ffns

    found = []
    for ffn in wrapped_ffns(model).values():
        parts = {part.partition(".")[0] for part in ffn.layout.parts}
        found += [module for name, module in ffn.named_children() if name not in parts]
    return found
