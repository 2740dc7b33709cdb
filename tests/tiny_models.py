"""Tiny random models of every family, dense and sparse."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import lte
from lte.hf.families import FAMILIES

VOCAB, HIDDEN, NEURONS, LAYERS, EXPERT_SIZE = 99, 32, 64, 2, 8
PAD = 0


def tiny_config(model_type: str, **overrides: Any) -> Any:
    """A stock config of the family: vocabulary 99, D 32, F 64, 2 layers."""
    family = FAMILIES[model_type]
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": NEURONS,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return family.stock_class(family.config_class)(**{**settings, **overrides})


def tiny_dense_model(model_type: str = "llama", **overrides: Any) -> Any:
    """A stock causal LM of the family in eval mode, with weights large enough for logits that differ."""
    torch.manual_seed(0)
    family = FAMILIES[model_type]
    model = family.stock_class(family.models["AutoModelForCausalLM"])(tiny_config(model_type, **overrides))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return model.eval()


@torch.no_grad()
def randomise_routers_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every router random weights, so that about half of the experts are active per token."""
    generator = torch.Generator().manual_seed(seed)
    for ffn in lte.sparse_ffns(model).values():
        for parameter in ffn.router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def tiny_sparse_model(model_type: str = "llama", *, routed: bool = True, **overrides: Any) -> Any:
    """An LTE model of the family in hard mode; with `routed` its routers are random."""
    model = tiny_dense_model(model_type, **overrides)
    lte.sparsify_(model, lte.LteConfig(expert_size=EXPERT_SIZE, grouping="random"))
    return randomise_routers_(model) if routed else model
