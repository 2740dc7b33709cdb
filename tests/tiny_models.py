"""Tiny random models of every family, dense and sparse."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

import lte
from lte.hf.families import FAMILIES, Family

VOCAB, HIDDEN, NEURONS, LAYERS, EXPERT_SIZE = 99, 32, 64, 2, 8
PAD = 0
# Rows that differ only in their config: the `model_type`, and what the config says.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {"t5 gated": ("t5", {"feed_forward_proj": "gated-gelu"})}
MODEL_TYPES = [*FAMILIES, *VARIANTS]
# What a tiny model needs to be told in its family's own words.
OWN_SETTINGS: dict[str, dict[str, Any]] = {"t5": {"decoder_start_token_id": PAD, "num_decoder_layers": LAYERS}}


def row_of(model_type: str) -> Family:
    """The row of the family table, also for the name of a variant."""
    if model_type not in VARIANTS:
        return FAMILIES[model_type]
    row = FAMILIES[VARIANTS[model_type][0]].gated
    assert row is not None
    return row


def auto_class(model_type: str) -> Any:
    """The Auto class of the family's own head."""
    return getattr(transformers, next(iter(row_of(model_type).models)))


def is_causal(model_type: str) -> bool:
    """Whether the family's own head predicts the next token."""
    return next(iter(row_of(model_type).models)) == "AutoModelForCausalLM"


def num_ffns(model_type: str) -> int:
    """FFNs of a tiny model: those of an encoder and a decoder, or of one of them."""
    return 2 * LAYERS if row_of(model_type).model_type == "t5" else LAYERS


def num_inputs(model_type: str) -> int:
    """How many matrices [F, D] read the hidden states: gate and up, or up alone."""
    layout = row_of(model_type).layout
    return 2 if layout.fused or layout.gate is not None else 1


@torch.no_grad()
def logits_of(model: Any, tokens: Tensor, **kwargs: Any) -> Tensor:
    """Logits of a model of any kind; encoder-decoders read the tokens on both sides."""
    if model.config.is_encoder_decoder:
        kwargs["decoder_input_ids"] = tokens
    return model(tokens, **kwargs).logits


def tiny_config(model_type: str, **overrides: Any) -> Any:
    """A stock config of the family: vocabulary 99, D 32, F 64, 2 layers."""
    family = row_of(model_type)
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        family.neurons_field: NEURONS,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    own = {**OWN_SETTINGS.get(family.model_type, {}), **VARIANTS.get(model_type, ("", {}))[1]}
    return family.stock_class(family.config_class)(**{**settings, **own, **overrides})


def tiny_dense_model(model_type: str = "llama", **overrides: Any) -> Any:
    """A stock model of the family with its own head in eval mode, with weights large enough for logits that differ."""
    torch.manual_seed(0)
    family = row_of(model_type)
    model = family.stock_class(next(iter(family.models.values())))(tiny_config(model_type, **overrides))
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and id(parameter) not in embeddings:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.eval()


def zero_dropout_(model: Any) -> Any:
    """Switches all dropout off, which would hide what a test compares."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "layerdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


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
