"""What is particular to one family or a few: dropout within the FFN, precision, Conv1D, chunks, layer variants."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

import lte
from tests.tiny_models import EXPERT_SIZE, auto_class, logits_of, tiny_dense_model, tiny_sparse_model

CONTIGUOUS = lte.LteConfig(expert_size=EXPERT_SIZE, grouping="contiguous")


def test_dropout_stays_where_the_family_has_it(model_type: str, tokens: Tensor) -> None:
    """With all experts on, the same random numbers must hit the same activations."""
    dense = tiny_dense_model(model_type).train()
    sparse = lte.sparsify_(copy.deepcopy(dense), CONTIGUOUS)
    found = []
    for model in (dense, sparse):
        torch.manual_seed(4)
        found.append(logits_of(model, tokens))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", ["t5", "t5 gated", "gpt2", "distilbert"])
def test_kernels_do_not_run_while_dropout_within_the_ffn_is_on(
    model_type: str, tokens: Tensor, calls: list[int]
) -> None:
    model = lte.accelerate_(tiny_sparse_model(model_type)).train()
    logits_of(model, tokens)
    assert not calls
    logits_of(model.eval(), tokens)
    assert calls


@pytest.mark.parametrize("model_type", ["t5", "t5 gated"])
def test_t5_in_float16_keeps_wide_down_projections(model_type: str, tokens: Tensor, tmp_path: Path) -> None:
    """As stock T5 does; the kernels take weights of one dtype."""
    tiny_sparse_model(model_type).save_pretrained(tmp_path)
    model = auto_class(model_type).from_pretrained(tmp_path, dtype=torch.float16).eval()
    ffns = lte.sparse_ffns(model).values()
    assert {(ffn.part("wo").weight.dtype, ffn.part(ffn.layout.up).weight.dtype) for ffn in ffns} == {
        (torch.float32, torch.float16)
    }
    with pytest.raises(ValueError, match="must hold weights of one dtype"):
        lte.accelerate_(model)
    lte.accelerate_(model.to(torch.bfloat16))
    assert logits_of(model, tokens).isfinite().all()


def test_conv1d_stays_conv1d() -> None:
    model = lte.accelerate_(tiny_sparse_model("gpt2"))
    for ffn in lte.sparse_ffns(model).values():
        assert type(ffn.part("c_fc")) is type(ffn.part("c_proj")) is Conv1D
        assert ffn.part("c_fc").weight.shape == (32, 64)
        assert ffn.part("c_fc").weight.stride() == (1, 32)
        assert ffn.part("c_proj").weight.is_contiguous()


def test_distilbert_in_chunks_computes_the_same(tokens: Tensor, relative_rms) -> None:
    dense = tiny_dense_model("distilbert", chunk_size_feed_forward=7)
    sparse = lte.sparsify_(copy.deepcopy(dense), CONTIGUOUS)
    assert relative_rms(logits_of(sparse, tokens), logits_of(dense, tokens)) <= 1e-5


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    ("opt", {"enable_bias": False}),
    ("bert", {"is_decoder": True, "add_cross_attention": True}),
    ("gpt2", {"n_inner": None}),
    ("phi", {"qk_layernorm": True}),
    ("gpt_neox", {"use_parallel_residual": False}),
]


@pytest.mark.parametrize(("model_type", "settings"), VARIANTS, ids=str)
def test_variants_of_the_layer(
    model_type: str, settings: dict[str, Any], tokens: Tensor, tmp_path: Path, relative_rms
) -> None:
    dense = tiny_dense_model(model_type, **settings)
    sparse = lte.sparsify_(copy.deepcopy(dense), lte.LteConfig(expert_size=EXPERT_SIZE))
    assert relative_rms(logits_of(sparse, tokens), logits_of(dense, tokens)) <= 1e-5
    sparse.save_pretrained(tmp_path)
    loaded = auto_class(model_type).from_pretrained(tmp_path).eval()
    assert torch.equal(logits_of(loaded, tokens), logits_of(sparse, tokens))
    assert relative_rms(logits_of(lte.accelerate_(loaded), tokens), logits_of(sparse, tokens)) <= 1e-5
    assert relative_rms(logits_of(lte.densify_(loaded), tokens), logits_of(dense, tokens)) <= 1e-5
