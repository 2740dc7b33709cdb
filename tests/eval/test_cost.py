"""Costs that are counted while a model runs, against counts by hand; shapes D 32, F 64, 2 layers, experts of 8."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import lte
from lte.eval.cost import measured_cost
from lte.eval.flops import block_linears, count_linear_weights, flops_per_token
from lte.eval.perplexity import evaluate_model
from lte.eval.sparsity import Measurement, SparsityCounter, measure_sparsity
from tests.methods.methods import calibration_batches, made
from tests.tiny_models import HIDDEN, LAYERS, NEURONS, randomise_routers_, tiny_dense_model

D, F, E = HIDDEN, NEURONS, 8
HALF = F // 2
ATTENTION = D * 8 * 2 * (4 + 2)
# Weights read per token and layer of a gated FFN at a target of one half, and those of routers and predictors.
BY_HAND = {
    "kla": (2 * D * F + D * HALF, 0),
    "kla experts": (3 * D * F, 0),
    "wina": (2 * F * D // 2 + D * HALF, 0),
    "random_router": (3 * D * HALF, D * E),
    "noisy_topk": (3 * D * HALF, D * E),
    "sigma_moe": (3 * D * HALF, D * E),
    "moefication": (3 * D * HALF, D * E + E * E),
    "moefication ground truth": (D * F + 2 * D * HALF, 0),
    "deja_vu": (3 * D * HALF, 3 * (D + F)),
}


def applied(method: str, model_type: str = "llama", **settings: Any) -> Any:
    return made(method, model_type, **settings)


@pytest.mark.parametrize("method", BY_HAND)
def test_costs_are_those_counted_by_hand(method: str) -> None:
    model = applied(method)
    found = measure_sparsity(model, calibration_batches())
    weights, selector = BY_HAND[method]
    assert found.sparsity == 0.5
    assert found.layer_sparsity == [0.5] * LAYERS
    assert found.tokens == 72
    assert found.weights_read == LAYERS * weights
    assert found.selector_weights == LAYERS * selector
    cost = measured_cost(model, found)
    assert cost.flops_per_token == 2 * LAYERS * (ATTENTION + weights + selector)
    assert cost.bytes_per_token == 2 * LAYERS * (ATTENTION + weights) + 4 * LAYERS * selector
    assert cost.weight_sparsity == pytest.approx(1 - (ATTENTION + weights) / (ATTENTION + 3 * D * F))


@pytest.mark.parametrize(("model_type", "matrices"), [("phi3", 3), ("gpt2", 2), ("bert", 2), ("opt", 2)])
def test_experts_of_all_kinds_of_ffn_are_counted(model_type: str, matrices: int) -> None:
    found = measure_sparsity(applied("random_router", model_type), calibration_batches())
    assert found.weights_read == LAYERS * matrices * D * HALF
    assert found.dense_weights == LAYERS * matrices * D * F


def test_cats_reads_the_gate_in_full_so_half_of_the_neurons_is_two_thirds_of_the_bytes() -> None:
    found = measure_sparsity(applied("cats"), calibration_batches())
    assert found.sparsity == pytest.approx(0.5, abs=0.01)
    assert found.weights_read == pytest.approx(LAYERS * (D * F + 2 * D * F * (1 - found.sparsity)))
    assert found.weights_read / found.dense_weights == pytest.approx(2 / 3, abs=0.01)


@pytest.mark.parametrize("allocation", ["uniform", "greedy"])
def test_teal_meets_its_target_in_weights(allocation: Any) -> None:
    found = measure_sparsity(applied("teal", allocation=allocation), calibration_batches())
    assert 1 - found.weights_read / found.dense_weights == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("method", ["teal", "wina"])
def test_attention_is_sparse_as_well_if_asked(method: str) -> None:
    model = applied(method, linears="block")
    found = measure_sparsity(model, calibration_batches())
    assert found.dense_weights == LAYERS * (ATTENTION + 3 * D * F)
    assert measured_cost(model, found).weight_sparsity == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("linears", ["ffn", "block"])
def test_zeros_of_pruned_weights_cost_a_bit_each(linears: Any) -> None:
    cost = measured_cost(applied("wanda", linears=linears), None)
    pruned = 3 * D * F + (ATTENTION if linears == "block" else 0)
    whole = ATTENTION + 3 * D * F
    assert cost.sparsity == 0
    assert cost.weight_sparsity == pytest.approx(pruned / 2 / whole)
    assert cost.flops_per_token == 2 * LAYERS * (whole - pruned / 2)
    # 9 of 16 bits: two of four values with 2 bits of index each, or half of the values and a bitmap.
    assert cost.bytes_per_token == 2 * LAYERS * (whole - pruned + 9 / 16 * pruned)


def test_a_statically_pruned_model_knows_what_is_gone() -> None:
    cost = measured_cost(applied("static_pruning"), None)
    assert cost.sparsity == 0.5
    assert cost.weight_sparsity == pytest.approx(3 * D * HALF / (ATTENTION + 3 * D * F))
    assert cost.flops_per_token == 2 * LAYERS * (ATTENTION + 3 * D * HALF)
    assert cost.bytes_per_token == 2 * LAYERS * (ATTENTION + 3 * D * HALF)


def test_dense_and_lte_models_cost_what_they_always_did() -> None:
    dense = tiny_dense_model()
    cost = measured_cost(dense, None)
    assert (cost.sparsity, cost.weight_sparsity) == (0, 0)
    assert (cost.flops_per_token, cost.bytes_per_token) == (flops_per_token(dense), flops_per_token(dense))
    sparse: Any = randomise_routers_(lte.sparsify_(dense, lte.LteConfig(expert_size=8, grouping="random")))
    _, found = evaluate_model(sparse, calibration_batches(), progress=False)
    assert found is not None
    cost = measured_cost(sparse, found)
    assert cost.sparsity == found.sparsity
    assert cost.flops_per_token == pytest.approx(flops_per_token(sparse, found.layer_sparsity), rel=1e-12)
    assert cost.bytes_per_token == pytest.approx(
        flops_per_token(sparse, found.layer_sparsity) + 2 * sum(count_linear_weights(sparse).router), rel=1e-12
    )
    weights = 2 * (cost.flops_per_token / 2 - LAYERS * D * E) + 4 * LAYERS * D * E
    assert cost.bytes_per_token == pytest.approx(weights)


def test_a_measurement_of_an_earlier_version_tells_no_cost() -> None:
    model = applied("lte")
    found = measure_sparsity(model, calibration_batches())
    names = ("sparsity", "tokens", "active_fraction", "expert_use", "score_histogram", "near_threshold", "threshold")
    earlier = Measurement.from_dict({name: value for name, value in found.to_dict().items() if name in names})
    since = {"weights_read": None, "dense_weights": None, "selector_weights": None, "union_sparsity": {}}
    assert earlier == replace(found, **since)
    with pytest.raises(ValueError, match="measurement must say what was read, got one of an earlier version"):
        measured_cost(model, earlier)


def test_zeros_that_no_method_made_save_nothing() -> None:
    dense = tiny_dense_model()
    expected = measured_cost(dense, None)
    with torch.no_grad():
        dense.model.layers[0].mlp.up_proj.weight[:, :16] = 0
    assert measured_cost(dense, None) == expected


def test_quality_and_cost_come_from_one_pass() -> None:
    model = applied("cats")
    calls: list[None] = []
    model.register_forward_pre_hook(lambda *args: calls.append(None))
    perplexity, found = evaluate_model(model, calibration_batches(), progress=False)
    assert len(calls) == 2
    assert found == measure_sparsity(model, calibration_batches())
    assert perplexity.tokens == 64
    assert not any(module.metering for module in model.modules() if hasattr(module, "metering"))


def test_only_tokens_that_count_are_counted(tokens: Tensor) -> None:
    model = applied("cats")
    labels = tokens.clone()
    labels[0] = -100
    found = measure_sparsity(model, [{"input_ids": tokens, "labels": labels}])
    alone = measure_sparsity(model, [{"input_ids": tokens[1:], "labels": tokens[1:]}])
    assert found.tokens == 7
    assert found.weights_read == pytest.approx(alone.weights_read)


def test_both_sides_of_an_encoder_decoder_are_counted_by_their_own_tokens(tokens: Tensor) -> None:
    model = applied("random_router", "t5")
    labels = torch.cat([tokens, torch.full_like(tokens[:, :2], -100)], 1)
    found = measure_sparsity(model, [{"input_ids": tokens, "labels": labels}])
    assert found.tokens == 14 + 14
    assert found.sparsity == 0.5
    assert len(found.layer_sparsity) == 2 * LAYERS


def test_faults_are_told() -> None:
    with pytest.raises(
        ValueError, match="model must be an LTE model or hold modules of another method, got LlamaForCausalLM"
    ):
        measure_sparsity(tiny_dense_model(), calibration_batches())
    model = applied("cats")
    with SparsityCounter(model) as counter:
        with pytest.raises(ValueError, match="model must run in hard mode before each update, got no reading"):
            counter.update(torch.ones(2, 3, dtype=torch.bool))
        model(calibration_batches()[0]["input_ids"])
        with pytest.raises(ValueError, match=r"mask must be \[B, T\] of the last forward pass"):
            counter.update(dict.fromkeys(counter.layers, torch.ones(2, 3, dtype=torch.bool)))
        with pytest.raises(ValueError, match="batches must hold at least one counted token, got none"):
            counter.result()


def test_the_linears_of_the_blocks_are_found_whatever_their_class() -> None:
    for method in ("cats", "teal", "deja_vu"):
        assert len(block_linears(applied(method))) == len(block_linears(tiny_dense_model()))
