"""What is done to an accelerated model reaches the kernels: copies, casts, other weights, adapters."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import lte
from tests.hf.accelerated_models import TOLERANCE, first_ffn
from tests.tiny_models import NEURONS, logits_of, randomise_routers_, tiny_sparse_model

Measure = Callable[[Tensor, Tensor], float]


@pytest.mark.parametrize("weights", ["native", "int8"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_models_of_their_own(duplicate: Callable[[Any], Any], weights: Any, tokens: Tensor) -> None:
    model = lte.accelerate_(tiny_sparse_model(), weights)
    expected = logits_of(model, tokens)
    other = duplicate(model)
    assert lte.is_accelerated(other)
    assert torch.equal(logits_of(other, tokens), expected)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(logits_of(model, tokens), expected)
    assert not logits_of(other, tokens).any()
    lte.decelerate_(other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casts(dtype: torch.dtype, tokens: Tensor, relative_rms: Measure) -> None:
    model = lte.accelerate_(tiny_sparse_model())
    expected = logits_of(tiny_sparse_model().to(dtype), tokens)
    assert model.to(dtype) is model
    ffn = first_ffn(model)
    assert ffn.stacked is not None
    assert ffn.router_rows is not None
    assert ffn.stacked.dtype == ffn.router_rows.dtype == dtype
    assert ffn.up_proj.weight.untyped_storage().data_ptr() == ffn.stacked.untyped_storage().data_ptr()
    # The plain model rounds its router's input otherwise, so near the threshold they may differ.
    assert relative_rms(logits_of(model, tokens), expected) <= 0.1
    stacked = ffn.stacked
    model.to(dtype)
    assert ffn.stacked is stacked


def test_to_another_device_and_back() -> None:
    model = lte.accelerate_(tiny_sparse_model()).to("meta")
    assert first_ffn(model).stacked.is_meta
    model.to_empty(device="cpu")
    model.load_state_dict(tiny_sparse_model().state_dict())
    assert first_ffn(model).stacked.device.type == "cpu"


@pytest.mark.parametrize("assign", [False, True])
def test_loading_other_weights(assign: bool, tokens: Tensor, relative_rms: Measure) -> None:
    model = lte.accelerate_(tiny_sparse_model())
    other = randomise_routers_(tiny_sparse_model(), seed=3)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    model.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
    ffn = first_ffn(model)
    # Before the next call: compiled code does not look whether anything changed.
    assert torch.equal(ffn.router_rows, ffn.router.weight)
    assert ffn.stacked is not None
    assert torch.equal(ffn.stacked[:NEURONS], ffn.gate_proj.weight)
    assert relative_rms(logits_of(model, tokens), logits_of(other, tokens)) <= TOLERANCE


def test_weights_that_are_replaced_are_seen(tokens: Tensor, relative_rms: Measure) -> None:
    model, plain = lte.accelerate_(tiny_sparse_model()), tiny_sparse_model()
    for network in (model, plain):
        for ffn in lte.sparse_ffns(network).values():
            ffn.up_proj.weight.data = ffn.up_proj.weight.data * 2
            with torch.no_grad():
                ffn.router.weight.neg_()
                ffn.router.bias.neg_()
    assert relative_rms(logits_of(model, tokens), logits_of(plain, tokens)) <= TOLERANCE


def test_adapters_that_come_later_count(tokens: Tensor, calls: list[int], relative_rms: Measure) -> None:
    wrapped = []
    for model in (tiny_sparse_model(), lte.accelerate_(tiny_sparse_model())):
        torch.manual_seed(1)
        config = peft.LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False)
        wrapped.append(peft.get_peft_model(model, config).eval())
    expected = logits_of(wrapped[0], tokens)
    assert relative_rms(expected, logits_of(tiny_sparse_model(), tokens)) > 0.01
    assert relative_rms(logits_of(wrapped[1], tokens), expected) <= TOLERANCE
    assert not calls
    merged = wrapped[1].merge_and_unload()
    assert relative_rms(logits_of(merged, tokens), expected) <= TOLERANCE
    assert calls


def test_autocast_is_as_for_the_plain_model(tokens: Tensor) -> None:
    model = tiny_sparse_model()
    with torch.autocast("cpu", torch.bfloat16):
        expected = logits_of(model, tokens)
        assert torch.equal(logits_of(lte.accelerate_(model), tokens), expected)
