from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

import lte
from lte.config import GFLOP
from lte.eval.flops import count_linear_weights, flops_per_token, meta_model
from tests.tiny_models import (
    HIDDEN,
    LAYERS,
    NEURONS,
    num_ffns,
    num_inputs,
    tiny_config,
    tiny_dense_model,
    tiny_sparse_model,
)

LLAMA_7B = LlamaConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
)


def test_dense_llama_7b_has_the_flops_of_the_paper() -> None:
    assert flops_per_token(LLAMA_7B) / GFLOP == 12.0625


@pytest.mark.parametrize(("sparsity", "paper"), [(0.84, 5.38), (0.93, 4.65), (0.69, 6.59)])
def test_lte_llama_7b_has_the_flops_of_the_paper_with_its_routers(sparsity: float, paper: float) -> None:
    config = lte.LteConfig(expert_size=32)
    flops = flops_per_token(LLAMA_7B, sparsity, lte_config=config) / GFLOP
    assert flops == pytest.approx(paper, abs=0.01)
    without = flops_per_token(LLAMA_7B, sparsity, lte_config=config, include_routers=False) / GFLOP
    assert without == pytest.approx(paper, abs=0.1)
    assert without < paper - 0.07


def test_the_routers_are_one_percent_of_the_ffn() -> None:
    weights = count_linear_weights(LLAMA_7B, lte.LteConfig(expert_size=32))
    assert sum(weights.router) / sum(weights.ffn) == pytest.approx(0.0104, abs=5e-5)


def test_every_family_is_counted_by_its_shapes(model_type: str) -> None:
    """Attention with 4 heads and 2 key-value heads of width 8 where the family has them, FFN of D x F matrices."""
    config, layers = tiny_config(model_type), num_ffns(model_type)
    weights = count_linear_weights(config)
    width, key_value_heads = 8, 2 if "num_key_value_heads" in {field.name for field in fields(config)} else 4
    # A decoder layer of T5 has two, for its own tokens and for the encoder's.
    attentions = 3 * LAYERS if layers > LAYERS else LAYERS
    assert weights.attention == attentions * HIDDEN * width * 2 * (4 + key_value_heads)
    assert weights.ffn == [(num_inputs(model_type) + 1) * HIDDEN * NEURONS] * layers
    assert weights.router == [0] * layers


def test_model_config_and_folder_agree(model_type: str, tmp_path: Path) -> None:
    model = tiny_sparse_model(model_type)
    model.save_pretrained(tmp_path)
    expected = flops_per_token(model, 0.5)
    assert flops_per_token(model.config, 0.5) == expected
    assert flops_per_token(tmp_path, 0.5) == flops_per_token(str(tmp_path), 0.5) == expected
    dense = tiny_dense_model(model_type)
    assert flops_per_token(dense, 0.5, lte_config=model.lte_config) == expected


@pytest.mark.parametrize("rank", [None, 3])
def test_sparse_flops_are_the_active_part_and_the_routers(rank: int | None) -> None:
    model = lte.sparsify_(tiny_dense_model(), lte.LteConfig(expert_size=8, grouping="contiguous", router_rank=rank))
    experts = NEURONS // 8
    router = HIDDEN * experts if rank is None else rank * (HIDDEN + experts)
    weights = count_linear_weights(model)
    assert weights.router == [router] * LAYERS
    ffn = 3 * HIDDEN * NEURONS
    assert flops_per_token(model, [0.25, 0.75]) == 2 * (weights.attention + LAYERS * (ffn / 2 + router))
    assert flops_per_token(model, 0.5) == flops_per_token(model, [0.25, 0.75])
    assert flops_per_token(model, include_routers=False) == flops_per_token(tiny_dense_model())


def test_a_smaller_ffn_costs_what_the_same_sparsity_costs() -> None:
    smaller = tiny_config("llama", intermediate_size=NEURONS // 2)
    assert flops_per_token(smaller) == flops_per_token(tiny_config("llama"), 0.5)


def test_a_headless_model_has_the_same_flops() -> None:
    tied = tiny_dense_model(tie_word_embeddings=True)
    assert flops_per_token(tied.model) == flops_per_token(tied)


@pytest.mark.parametrize("sparsity", [-0.1, 1.1, [0.5], [0.5, 0.5, 0.5], [0.5, float("nan")], float("nan")])
def test_wrong_sparsity_is_refused(sparsity: Any) -> None:
    with pytest.raises(ValueError, match=r"sparsity must be one share in \[0, 1\] or one for each of 2"):
        flops_per_token(tiny_config("llama"), sparsity)


def test_an_lte_config_for_an_lte_model_is_refused() -> None:
    with pytest.raises(ValueError, match="lte_config must be None for an LTE model"):
        flops_per_token(tiny_sparse_model(), lte_config=lte.LteConfig())


def test_an_unknown_family_is_refused() -> None:
    config = tiny_config("llama")
    config.model_type = "no family"
    with pytest.raises(ValueError, match="model_type must be one of"):
        flops_per_token(config)


def test_a_config_takes_no_memory() -> None:
    assert all(parameter.is_meta for parameter in meta_model(LLAMA_7B).parameters())
