"""The routing that the inspector shows is that of the hard path, for every family, plain and accelerated."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lte
import lte.eval.inference
from lte.eval.flops import count_linear_weights, flops_per_token
from lte.eval.next_tokens import next_tokens
from lte.eval.sparsity import measure_sparsity
from lte.eval.token_routing import (
    TokenRouting,
    counts_at,
    record_routing,
    record_text,
    routed_part,
    selectivity,
    strongest_tokens,
    text_cost,
)
from tests.tiny_models import EXPERT_SIZE, LAYERS, NEURONS, VOCAB, tiny_dense_model, tiny_sparse_model

EXPERTS = NEURONS // EXPERT_SIZE


def row_of(length: int, seed: int = 5) -> list[int]:
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def used_neurons(model: Any, ids: list[int]) -> np.ndarray:
    """How many neurons the down projections saw at work, [L, T]; no switched-on expert here is all zeros."""
    seen: list[Tensor] = []
    part = routed_part(model)
    ffns = lte.sparse_ffns(part).values()
    hooks = [
        ffn.part(ffn.layout.down).register_forward_pre_hook(
            lambda module, args: seen.append(args[0].reshape(len(ids), EXPERTS, -1).ne(0).any(-1).sum(-1))
        )
        for ffn in ffns
    ]
    with torch.no_grad():
        part(input_ids=torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return EXPERT_SIZE * torch.stack(seen).numpy()


def routing_of(logits: np.ndarray) -> TokenRouting:
    return TokenRouting(np.packbits(logits > 0, axis=-1), logits.astype(np.float32), EXPERT_SIZE)


def test_it_is_what_is_measured_and_what_the_ffns_compute(model_type: str) -> None:
    model, ids = tiny_sparse_model(model_type), row_of(9)
    routing = record_routing(model, ids)
    batch = torch.tensor([ids])
    measured = measure_sparsity(model, [{"input_ids": batch, "labels": batch}])
    assert routing.shape == (LAYERS, 9, EXPERTS)
    assert routing.expert_use.tolist() == measured.expert_use[:LAYERS]
    assert routing.layer_sparsity == pytest.approx(measured.layer_sparsity[:LAYERS])
    np.testing.assert_array_equal(routing.active_experts * EXPERT_SIZE, used_neurons(model, ids))
    assert 0 < routing.sparsity < 1


@pytest.mark.parametrize("length", [1, 7, 33])
def test_an_accelerated_model_records_the_same_path(length: int) -> None:
    model, ids = tiny_sparse_model("llama", hidden_size=64), row_of(length)
    plain = record_routing(model, ids)
    lte.accelerate_(model)
    routing = record_routing(model, ids)
    batch = torch.tensor([ids])
    assert routing.expert_use.tolist() == measure_sparsity(model, [{"input_ids": batch}]).expert_use
    np.testing.assert_array_equal(routing.packed, plain.packed)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_sparse_model().train()
    ffns = list(lte.sparse_ffns(model).values())
    ffns[0].set_mode("soft")
    record_routing(model, row_of(4))
    assert model.training
    assert [ffn.mode for ffn in ffns] == ["soft", "hard"]
    assert not any(ffn.record_logits or ffn.logits is not None for ffn in ffns)


def test_what_cannot_be_recorded() -> None:
    with pytest.raises(ValueError, match="model must be an LTE model, got one without sparse FFNs"):
        record_routing(tiny_dense_model(), [3])
    with pytest.raises(ValueError, match="token_ids must hold at least one token, got none"):
        record_routing(tiny_sparse_model(), [])
    model = tiny_sparse_model()
    with torch.no_grad():
        next(iter(lte.sparse_ffns(model).values())).router.bias[0] = float("nan")
    with pytest.raises(ValueError, match="router scores must be numbers, got NaN or infinity"):
        record_routing(model, row_of(3))


class TestStrongestTokens:
    # One layer, one expert of two; the tokens a b a c, with scores that can be seen at once.
    LOGITS = np.array([[[-1.0, 1], [2, -1], [3, -1], [0.5, -1]]])
    IDS = (10, 11, 10, 12)

    def test_the_best_place_of_each_token_in_order(self) -> None:
        found = strongest_tokens(routing_of(self.LOGITS), self.IDS, 4)
        assert found.positions[0].tolist() == [[2, 1, 3, -1], [0, -1, -1, -1]]
        assert found.switched_on[0].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
        expected = torch.sigmoid(torch.tensor([3.0, 2, 0.5])).tolist()
        assert found.scores[0, 0, :3].tolist() == pytest.approx(expected)

    def test_no_more_than_asked_for(self) -> None:
        assert strongest_tokens(routing_of(self.LOGITS), self.IDS, 1).positions.tolist() == [[[2], [0]]]

    def test_an_expert_that_nothing_switches_on(self) -> None:
        found = strongest_tokens(routing_of(-np.abs(self.LOGITS)), self.IDS, 2)
        assert (found.positions == -1).all()
        assert not found.scores.any()

    def test_other_tokens_than_those_routed(self) -> None:
        with pytest.raises(ValueError, match="token_ids must be the 4 tokens of the routing, got 3"):
            strongest_tokens(routing_of(self.LOGITS), self.IDS[:3])


def test_selectivity_by_hand() -> None:
    # Tokens 7 7 8 8 9: an expert for 7 alone, one of half the places of each, one always on, one never, one for 9.
    on = np.array([[1, 1, 0, 0, 1], [1, 0, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]])
    found = selectivity(routing_of(np.where(on.T, 1.0, -1.0)[None]), [7, 7, 8, 8, 9])[0]
    # The first: p = 2/4 of the tokens that occur twice, q = 1; the token that occurs once says nothing.
    assert found[:3].tolist() == pytest.approx([0.5, 0, 0])
    assert np.isnan(found[3:]).all()


def test_counts_at_other_thresholds_are_those_of_the_scores() -> None:
    model, ids = tiny_sparse_model(), row_of(9)
    routing = record_routing(model, ids)
    found = counts_at(routing, np.array([routing.threshold_logit, 0.3, 1e9]))
    np.testing.assert_array_equal(found[0], routing.active_experts.sum(0))
    np.testing.assert_array_equal(found[1], (routing.logits > 0.3).sum((0, 2)))
    assert not found[2].any()


def test_surprise_and_entropy_are_those_of_the_models_own_logits(model_type: str) -> None:
    model, ids = tiny_sparse_model(model_type), row_of(9)
    routing, predictions = record_text(model, ids)
    np.testing.assert_array_equal(routing.packed, record_routing(model, ids).packed)
    if "bert" in model_type or model_type.startswith(("electra", "t5")):
        assert predictions is None
        return
    assert predictions is not None
    with torch.no_grad(), lte.eval.inference.hard_inference(model):
        chances = model(input_ids=torch.tensor([ids])).logits[0].double().softmax(-1)
    bits = -chances.log2()
    assert np.isnan(predictions.surprise[0])
    expected = [bits[place, token].item() for place, token in enumerate(ids[1:])]
    np.testing.assert_allclose(predictions.surprise[1:], expected, rtol=1e-4)
    np.testing.assert_allclose(predictions.entropy, (chances * bits).sum(-1), rtol=1e-4)
    best = chances.topk(5)
    np.testing.assert_array_equal(predictions.likeliest, best.indices)
    np.testing.assert_allclose(predictions.probabilities, best.values, rtol=1e-4)


def test_logits_that_are_no_numbers() -> None:
    with pytest.raises(ValueError, match="logits must be numbers, got NaN or infinity"):
        next_tokens(torch.full((3, 8), float("nan")), [1, 2, 3])
    # A vocabulary entry that is ruled out is none of them.
    logits = torch.zeros(2, 4)
    logits[:, 3] = -float("inf")
    assert next_tokens(logits, [1, 2]).entropy.tolist() == pytest.approx([np.log2(3)] * 2)


def test_costs_by_hand() -> None:
    model = tiny_sparse_model()
    # Layer 0 computes all of its FFN, layer 1 a quarter, over two tokens.
    logits = -np.ones((2, 2, EXPERTS))
    logits[0], logits[1, 0, : EXPERTS // 2] = 1, 1
    routing = routing_of(logits)
    attention = LAYERS * (32 * 32 * 2 + 32 * 16 * 2)
    ffn, router = 3 * 32 * 64, 32 * EXPERTS
    cost = text_cost(model, routing)
    assert cost.flops == {"attention": 2 * attention, "ffn": 2 * 1.25 * ffn, "routers": 2 * 2 * router}
    assert cost.dense_flops == {"attention": 2 * attention, "ffn": 2 * 2 * ffn, "routers": 0}
    assert cost.bytes == {"attention": 2 * attention, "ffn": 2 * 1.25 * ffn, "routers": 4 * 2 * router}
    assert cost.dense_bytes == {"attention": 2 * attention, "ffn": 2 * 2 * ffn, "routers": 0}
    assert routing.union == (EXPERTS + EXPERTS // 2) / (2 * EXPERTS)


@pytest.mark.parametrize("model_type", ["llama", "bert", "gpt2", "opt"])
def test_costs_add_up_to_those_of_the_other_reports(model_type: str) -> None:
    model = tiny_sparse_model(model_type)
    routing = record_routing(model, row_of(6))
    cost = text_cost(model, routing)
    assert sum(cost.flops.values()) == pytest.approx(flops_per_token(model, routing.layer_sparsity))
    assert sum(cost.bytes.values()) == pytest.approx(
        flops_per_token(model, routing.layer_sparsity) + 2 * sum(count_linear_weights(model).router)
    )


def test_an_encoder_decoder_is_its_encoder() -> None:
    model = tiny_sparse_model("t5")
    routing = record_routing(model, row_of(6))
    cost = text_cost(model, routing)
    # Half of the FFNs; the decoder has twice the encoder's attention weights.
    assert cost.dense_flops["ffn"] == 2 * LAYERS * 2 * 32 * 64
    assert cost.dense_flops["attention"] == 2 * LAYERS * 4 * 32 * 32
