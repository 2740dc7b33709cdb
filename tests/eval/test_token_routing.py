"""The routing that the inspector shows is that of the hard path, for every family, plain and accelerated."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lte
from lte.eval.flops import count_linear_weights, flops_per_token
from lte.eval.sparsity import measure_sparsity
from lte.eval.token_routing import TokenRouting, record_routing, routed_part, strongest_tokens, text_cost
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
