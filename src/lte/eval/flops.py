"""Work per token: FLOPs and weight bytes of the block linears, from the shapes of a model's own modules.

Convention of the paper's Table 1, which its numbers imply: 2 FLOPs per parameter of the attention and FFN projections,
no LM head, no embeddings, no attention scores, in units of 2^30. Dense LLaMA-7B then has 12.06 GFLOPs per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from lte.hf.families import dense_ffns, family_of
from lte.hf.install import sparse_ffns

GFLOP = 2**30


@dataclass(frozen=True)
class LinearWeights:
    """Parameters of a model's linear layers.

    Attributes:
        attention: in the attention projections, all layers together.
        ffn: in the FFN projections, by layer.
        router: in the routers, by layer; zeros for a dense model.
    """

    attention: int
    ffn: list[int]
    router: list[int]


def meta_model(config: PreTrainedConfig | str) -> nn.Module:
    """The model of a config (or of a folder's config) without memory for its weights."""
    if isinstance(config, str):
        config = AutoConfig.from_pretrained(config)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def count_linear_weights(model: nn.Module) -> LinearWeights:
    """Counts the weights that every token reads in a dense model, and the routers of a sparse one."""
    sparse = sparse_ffns(model)
    ffns: dict[str, nn.Module] = dict(sparse) if sparse else dense_ffns(model, family_of(model.config))
    linear = {name: module.weight.numel() for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    ffn = [sum(n for name, n in linear.items() if name.startswith(f"{path}.")) for path in ffns]
    head_size = head.weight.numel() if isinstance(head, nn.Linear) else 0
    router = [sum(p.numel() for p in module.router.parameters()) for module in sparse.values()]
    return LinearWeights(sum(linear.values()) - head_size - sum(ffn), ffn, router or [0] * len(ffn))


def flops_per_token(model: nn.Module | PreTrainedConfig | str, sparsity: float | Sequence[float] = 0.0) -> float:
    """FLOPs per token at a given FFN sparsity, routers included.

    Args:
        model: a model, its config, or a folder.
        sparsity: share of FFN neurons not computed: one number, or one per layer.
    """
    return 2.0 * _weights_read(model, sparsity)


def bytes_per_token(
    model: nn.Module | PreTrainedConfig | str, sparsity: float | Sequence[float] = 0.0, *, bytes_per_weight: int = 2
) -> float:
    """Weight bytes that decoding one token at batch size 1 reads from the block linears and the fp32 routers.

    The LM head and the key-value cache are not part of it; the routers are counted with 4 bytes a weight.
    """
    weights = count_linear_weights(_as_model(model))
    router = sum(weights.router)
    return bytes_per_weight * (_weights_read(model, sparsity) - router) + 4.0 * router


def _weights_read(model: Any, sparsity: float | Sequence[float]) -> float:
    weights = count_linear_weights(_as_model(model))
    by_layer = [sparsity] * len(weights.ffn) if isinstance(sparsity, int | float) else list(sparsity)
    if len(by_layer) != len(weights.ffn) or any(not 0 <= share <= 1 for share in by_layer):
        raise ValueError(
            f"sparsity must be one share in [0, 1] or one for each of {len(weights.ffn)} layers, got sparsity={sparsity}"
        )
    ffn = sum(count * (1 - share) for count, share in zip(weights.ffn, by_layer, strict=True))
    return weights.attention + ffn + sum(weights.router)


def _as_model(model: Any) -> nn.Module:
    return model if isinstance(model, nn.Module) else meta_model(model)
