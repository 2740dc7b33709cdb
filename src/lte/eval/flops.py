"""Work per token: weights and FLOPs of the block linears, read off the modules of a model.

Convention of the paper's Table 1, which its numbers imply: 2 FLOPs per weight of the attention and FFN
projections; no LM head, no embeddings, no attention scores, no biases; the routers of a sparse model count in
full; in units of 2^30. Dense LLaMA-7B has 12.0625 of these GFLOPs per token (paper: 12.06). With experts of
32 neurons, LTE at FFN sparsities of 84, 93 and 69% has 5.37, 4.65 and 6.58 (paper: 5.38, 4.65 and 6.59), and
5.29, 4.56 and 6.50 without its routers, which are 1.04% of the FFN: the paper's numbers include them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from lte.config import LteConfig
from lte.hf.checkpoints import reading
from lte.hf.families import block_name, dense_ffns, family_of
from lte.hf.install import install_sparse_ffns_, sparse_ffns, wrapped_ffns
from lte.nn.wrapped_ffn import WrappedFfn

ModelLike = nn.Module | PreTrainedConfig | str | Path


@dataclass(frozen=True)
class LinearWeights:
    """How many weights a model's linear layers have.

    Attributes:
        attention: in all linear layers of the blocks but the FFNs, all layers together.
        ffn: in the FFN projections, by layer.
        router: in the routers, by layer; zeros for a dense model.
    """

    attention: int
    ffn: list[int]
    router: list[int]


def count_linear_weights(model: ModelLike, lte_config: LteConfig | None = None) -> LinearWeights:
    """Counts the weights of the linear layers of a dense or LTE model, without its biases.

    Args:
        model: a model, its config, or a folder or hub name that holds it.
        lte_config: what a dense model would be converted with, to count the routers that it would get.

    Raises:
        ValueError: for an unknown family, a model without FFNs, or an `lte_config` for an LTE model.
    """
    module = model if isinstance(model, nn.Module) else meta_model(model)
    if lte_config is not None:
        if sparse_ffns(module):
            raise ValueError("lte_config must be None for an LTE model, which has its own, got one")
        module = meta_model(module.config)  # type: ignore[arg-type]
        install_sparse_ffns_(module, family_of(module.config), lte_config)
    total = _linear_weights(block_linears(module))
    layout = family_of(module.config).layout
    parts = [ffn.part if isinstance(ffn, WrappedFfn) else ffn.get_submodule for ffn in _ffns(module).values()]
    ffn = [_linear_weights(part(name) for name in layout.projections) for part in parts]
    routers = [[p.numel() for p in layer.router.parameters() if p.ndim == 2] for layer in sparse_ffns(module).values()]
    router = [sum(sizes) for sizes in routers] or [0] * len(ffn)
    return LinearWeights(total - sum(ffn), ffn, router)


def flops_per_token(
    model: ModelLike,
    sparsity: float | Sequence[float] = 0.0,
    *,
    lte_config: LteConfig | None = None,
    include_routers: bool = True,
) -> float:
    """FLOPs per token at a given FFN sparsity: 2 (attention + sum_l (1 - s_l) FFN_l + routers) weights.

    Divide by `GFLOP` for the paper's unit.

    Args:
        model: a dense or LTE model, its config, or a folder or hub name that holds it.
        sparsity: share of FFN neurons not computed: one number, or one per layer.
        lte_config: what a dense model would be converted with, to count the routers that it would get.
        include_routers: whether routers count.

    Raises:
        ValueError: for an unknown family, or a sparsity outside [0, 1] or of another number of layers.
    """
    weights = count_linear_weights(model, lte_config)
    routers = sum(weights.router) if include_routers else 0
    layers = len(weights.ffn)
    by_layer = list(sparsity) if isinstance(sparsity, Iterable) else [float(sparsity)] * layers
    if len(by_layer) != layers or not all(0 <= share <= 1 for share in by_layer):
        raise ValueError(
            f"sparsity must be one share in [0, 1] or one for each of {layers} layers, got sparsity={sparsity}"
        )
    skipped = sum(count * share for count, share in zip(weights.ffn, by_layer, strict=True))
    return 2.0 * (weights.attention + sum(weights.ffn) - skipped + routers)


def meta_model(config: PreTrainedConfig | str | Path) -> nn.Module:
    """The model of a config, or of the config in a folder, without memory for its weights.

    It has the family's own head, a language model's.
    """
    if not isinstance(config, PreTrainedConfig):
        with reading(config):
            config = AutoConfig.from_pretrained(config)
    auto_class = getattr(transformers, next(iter(family_of(config).models)))
    with torch.device("meta"):
        return auto_class.from_config(config)


def block_linears(model: nn.Module) -> list[Any]:
    """The linear layers of the transformer blocks, those of the FFNs included; routers and predictors are none."""
    blocks = dict.fromkeys(map(block_name, _ffns(model)))
    parts = [module for name in blocks for module in model.get_submodule(name).modules()]
    return [module for module in parts if isinstance(module, nn.Linear | Conv1D)]


def _ffns(model: Any) -> dict[str, nn.Module]:
    """The FFNs of a model of any kind, stock or wrapped.

    Raises:
        ValueError: for an unknown family, or a model without FFNs.
    """
    ffns: dict[str, nn.Module] = dict(wrapped_ffns(model)) or dense_ffns(model, family_of(model.config))
    if not ffns:
        raise ValueError(f"model must hold FFNs of its family, got none in {type(model).__name__}")
    return ffns


def _linear_weights(modules: Iterable[nn.Module]) -> int:
    return sum(module.weight.numel() for module in modules if isinstance(module, nn.Linear | Conv1D))
