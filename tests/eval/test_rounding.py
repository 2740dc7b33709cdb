"""Weights that torchao rounds: the numbers, the quality, and the bytes."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

import lte
from lte.eval.cost import measured_cost
from lte.eval.flops import block_linears
from lte.eval.perplexity import evaluate_model
from lte.eval.rounding import bytes_per_weight, memory_bytes, round_weights_
from lte.methods import METHODS
from tests.methods.methods import made
from tests.tiny_models import tiny_dense_model, tiny_sparse_model

pytest.importorskip("torchao")


def batches() -> list[dict[str, Any]]:
    ids = torch.randint(3, 99, (4, 12), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": ids, "labels": ids}]


def linears(model: Any) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if type(module) is nn.Linear}


def rounded_by_hand(weight: torch.Tensor, weights: str) -> torch.Tensor:
    """8 bits with a scale for each row, 4 bits with 15 steps between the ends of each group, of which 0 is one."""
    if weights == "int8":
        scale = weight.abs().amax(1, keepdim=True) / 127.5
        return (weight / scale).round().clamp(-128, 127) * scale
    groups = weight.unflatten(1, (-1, 32))
    low, high = groups.amin(-1, keepdim=True).clamp_max(0), groups.amax(-1, keepdim=True).clamp_min(0)
    scale = (high - low) / 15
    zero = (-8 - (low / scale).round()).clamp(-8, 7)
    return (((groups / scale).round() + zero).clamp(-8, 7) - zero).mul(scale).flatten(1)


@pytest.mark.parametrize("weights", ["int8", "int4-32"])
@pytest.mark.parametrize("kind", ["dense", "lte"])
def test_quality_is_that_of_rounded_weights_in_hard_mode(kind: str, weights: str) -> None:
    model = tiny_dense_model() if kind == "dense" else tiny_sparse_model()
    by_hand = copy.deepcopy(model)
    with torch.no_grad():
        for linear in linears(by_hand).values():
            linear.weight = nn.Parameter(rounded_by_hand(linear.weight, weights))
    assert round_weights_(model, weights) is model
    found, measurement = evaluate_model(model, batches(), progress=False)
    expected, as_expected = evaluate_model(by_hand, batches(), progress=False)
    assert found.nll_per_token == pytest.approx(expected.nll_per_token, rel=1e-4)
    if kind == "lte":
        assert measurement is not None
        assert as_expected is not None
        assert 0.2 < measurement.sparsity == pytest.approx(as_expected.sparsity, abs=2e-3)
    before = evaluate_model(tiny_dense_model() if kind == "dense" else tiny_sparse_model(), batches(), progress=False)
    assert found.nll_per_token != before[0].nll_per_token


def test_native_weights_stay() -> None:
    model = tiny_dense_model()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    round_weights_(model, "native")
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert bytes_per_weight(model) == 2


@pytest.mark.parametrize("weights", ["int8", "int4-32"])
def test_bytes_are_of_bits_and_scales(weights: str) -> None:
    model = tiny_sparse_model()
    _, measurement = evaluate_model(model, batches(), progress=False)
    native = measured_cost(model, measurement)
    round_weights_(model, weights)
    blocks = [linear for name, linear in linears(model).items() if name != "lm_head"]
    # 8 bits and an fp32 scale for each row; 4 bits, and two numbers of 16 bits for 32 of them.
    total = sum(
        linear.out_features * (linear.in_features + 4 if weights == "int8" else linear.in_features * (0.5 + 4 / 32))
        for linear in blocks
    )
    count = sum(linear.in_features * linear.out_features for linear in blocks)
    assert len(blocks) == len(block_linears(model)) == 14
    assert bytes_per_weight(model) == pytest.approx(total / count)
    cost = measured_cost(model, measurement)
    assert measurement is not None
    assert measurement.selector_weights is not None
    routers = 4 * measurement.selector_weights
    ratio = (cost.bytes_per_token - routers) / (native.bytes_per_token - routers)
    assert ratio == pytest.approx(total / count / 2)
    assert (cost.sparsity, cost.flops_per_token) == (native.sparsity, native.flops_per_token)
    dense = round_weights_(tiny_dense_model(), weights)
    assert measured_cost(dense, None).bytes_per_token == pytest.approx(total)
    head = 99 * (32 + 4 if weights == "int8" else 32 * (0.5 + 4 / 32))
    norms, embedding = 2 * 5 * 32, 2 * 99 * 32
    assert memory_bytes(dense) == pytest.approx(total + head + norms + embedding)
    router = 4 * 2 * (8 * 32 + 8)
    assert memory_bytes(model) == pytest.approx(total + head + norms + embedding + router)


@pytest.mark.parametrize("method", [name for name in METHODS if not METHODS[name].zeroes_weights])
def test_every_method_is_measured_in_8_bits(method: str) -> None:
    model = made(method, target_sparsity=0.5)
    before, _ = evaluate_model(model, batches(), progress=False)
    round_weights_(model, "int8")
    found, measurement = evaluate_model(model, batches(), progress=False)
    assert found.nll_per_token == pytest.approx(before.nll_per_token, rel=0.05)
    assert found.nll_per_token != before.nll_per_token
    assert math.isfinite(measured_cost(model, measurement).bytes_per_token)


def test_rounded_lte_models_are_accelerated() -> None:
    model = round_weights_(tiny_sparse_model(), "int8")
    before, _ = evaluate_model(model, batches(), progress=False)
    after, _ = evaluate_model(lte.accelerate_(model), batches(), progress=False)
    assert after == before


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_dense_model()
    with pytest.raises(ValueError, match="weights must be one of native, int8, int4, int4-64, int4-32, got weights="):
        round_weights_(model, "int3")
    with pytest.raises(
        ValueError, match="weights must have groups that divide the 32 inputs of a layer, got weights=int4 "
    ):
        round_weights_(model, "int4")
    with pytest.raises(
        ValueError, match="weights must be native for a model with a Conv1D of Parameter, got weights=int8"
    ):
        round_weights_(tiny_dense_model("gpt2"), "int8")
    round_weights_(model, "int8")
    with pytest.raises(
        ValueError, match="weights must be native for a model with a Linear of Int8Tensor, got weights="
    ):
        round_weights_(model, "int8")
    pruned = made("wanda", target_sparsity=0.5)
    with pytest.raises(ValueError, match="weights must be native for a model pruned by wanda, got weights=int8"):
        round_weights_(pruned, "int8")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="torchao must be installed for weights=int8, got none: pip install torchao"):
        round_weights_(tiny_dense_model(), "int8")
