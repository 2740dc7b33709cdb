"""FFNs that lie in their block: the block calls up projection, sparse FFN and down projection one by one."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lte
from tests.hf.accelerated_models import TOLERANCE
from tests.tiny_models import (
    EXPERT_SIZE,
    MODEL_TYPES,
    NEURONS,
    auto_class,
    logits_of,
    row_of,
    tiny_dense_model,
    tiny_sparse_model,
)

Measure = Callable[[Tensor, Tensor], float]


SPREAD = [model_type for model_type in MODEL_TYPES if row_of(model_type).layout.spread]


@pytest.mark.parametrize("model_type", SPREAD)
def test_chunks_of_a_spread_ffn_are_refused(model_type: str, tmp_path: Path) -> None:
    message = f"chunk_size_feed_forward must be 0 for {model_type}, got chunk_size_feed_forward=4"
    dense = tiny_dense_model(model_type, chunk_size_feed_forward=4)
    with pytest.raises(ValueError, match=message):
        lte.sparsify_(dense, lte.LteConfig(expert_size=EXPERT_SIZE))
    tiny_sparse_model(model_type).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        auto_class(model_type).from_pretrained(tmp_path, chunk_size_feed_forward=4)


@pytest.mark.parametrize("model_type", SPREAD)
def test_blocks_are_stock_again_without_hooks(model_type: str) -> None:
    row = row_of(model_type)
    model = lte.densify_(lte.accelerate_(tiny_sparse_model(model_type)))
    stock = tiny_dense_model(model_type)
    assert [(name, type(module)) for name, module in model.named_modules()] == [
        (name, type(module)) for name, module in stock.named_modules()
    ]
    assert not any(module._forward_pre_hooks for module in model.modules())
    blocks = [module for module in model.modules() if type(module) is row.stock_class(row.ffn_class)]
    assert all("ffn" not in vars(block.get_submodule(name)) for block in blocks for name in row.layout.projections)


@pytest.mark.parametrize("model_type", SPREAD)
def test_another_up_projection_is_read(model_type: str, tokens: Tensor) -> None:
    model, twin = tiny_sparse_model(model_type), tiny_sparse_model(model_type)
    for network, replaces in ((model, True), (twin, False)):
        torch.manual_seed(3)
        ffn = next(iter(lte.sparse_ffns(network).values()))
        up = nn.Linear(32, NEURONS)
        if replaces:
            ffn.block[0].set_submodule(ffn.layout.up, up)
        else:
            ffn.part(ffn.layout.up).load_state_dict(up.state_dict())
    assert torch.equal(logits_of(model, tokens), logits_of(twin, tokens))


def test_without_an_up_projection_of_its_own_the_routing_is_refused() -> None:
    ffn = next(iter(lte.sparse_ffns(tiny_sparse_model("opt")).values()))
    with pytest.raises(ValueError, match="fc1 must be the up projection that the FFN was built around"):
        ffn(torch.zeros(1, NEURONS))


def adapted(model: Any) -> Any:
    torch.manual_seed(1)
    layout = next(iter(lte.sparse_ffns(model).values())).layout
    config = peft.LoraConfig(r=2, target_modules=list(layout.projections), init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize("model_type", SPREAD)
def test_adapters_on_an_accelerated_model(
    model_type: str, tokens: Tensor, calls: list[int], relative_rms: Measure
) -> None:
    plain = adapted(tiny_sparse_model(model_type))
    fast = adapted(lte.accelerate_(tiny_sparse_model(model_type)))
    assert relative_rms(logits_of(fast, tokens), logits_of(plain, tokens)) <= TOLERANCE
    assert not calls, "the kernels know of no adapters"
    merged = fast.merge_and_unload()
    assert relative_rms(logits_of(merged, tokens), logits_of(plain, tokens)) <= TOLERANCE
    assert calls == [14] * 2


@pytest.mark.parametrize("model_type", SPREAD)
@pytest.mark.parametrize("weights", ["native", "int8"])
def test_accelerated_copies_and_casts(
    model_type: str, weights: Any, tokens: Tensor, calls: list[int], relative_rms: Measure
) -> None:
    model = lte.accelerate_(tiny_sparse_model(model_type), weights)
    expected = logits_of(model, tokens)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        calls.clear()
        assert torch.equal(logits_of(twin, tokens), expected)
        assert calls == [14] * 2
        with torch.no_grad():
            next(iter(lte.sparse_ffns(twin).values())).router.bias.fill_(-9)
        assert not torch.equal(logits_of(twin, tokens), expected)
    assert torch.equal(logits_of(model, tokens), expected)
    calls.clear()
    assert relative_rms(logits_of(model.to(torch.bfloat16), tokens), expected) < 0.2
    assert calls == [14] * 2
    assert lte.decelerate_(model).dtype == torch.bfloat16


@pytest.mark.parametrize("model_type", SPREAD)
def test_int8_weights_refuse_what_they_cannot_do(model_type: str, tokens: Tensor) -> None:
    model = lte.accelerate_(tiny_sparse_model(model_type), "int8")
    expected = logits_of(model, tokens)
    with pytest.raises(ValueError, match="int8 weights must run in hard mode"):
        model(tokens)
    with pytest.raises(ValueError, match="weights must be floating-point to be saved, got int8"):
        model.state_dict()
    with pytest.raises(ValueError, match="weights must be floating-point to load others into them, got int8"):
        model.load_state_dict(tiny_sparse_model(model_type).state_dict())
    assert torch.equal(logits_of(model, tokens), expected)


@pytest.mark.parametrize("model_type", SPREAD)
def test_as_many_neurons_as_the_width_are_refused_by_the_kernels(model_type: str) -> None:
    model = tiny_sparse_model(model_type, **{row_of(model_type).neurons_field: 32})
    with pytest.raises(ValueError, match=r"must not have as many neurons as hidden states are wide .*, got 32 of both"):
        lte.accelerate_(model)


@pytest.mark.parametrize("model_type", ["opt", "bert"])
def test_a_compiled_accelerated_model(model_type: str, tokens: Tensor, relative_rms: Measure) -> None:
    torch.compiler.reset()
    model = lte.accelerate_(tiny_sparse_model(model_type))
    step = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    with torch.no_grad():
        assert relative_rms(step(tokens).logits, model(tokens).logits) <= TOLERANCE
